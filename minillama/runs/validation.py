"""Settings of a run's validation."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillama.errors import InputError


@dataclass(frozen=True)
class ValidateConfig:
    """Validation on held-out text and on evaluation sets."""

    every: int = field(default=100, metadata={"min": 0})
    """Steps between validations; there is one at step 0 and one at the end as well. 0: a quarter of the run."""
    tokens: int = field(default=0, metadata={"min": 0})
    """Held-out tokens that are scored; 0: all."""
    tasks: tuple[str, ...] = ()
    """Evaluation sets whose accuracy is measured, piqa arc_easy ..., see `minillama eval`."""
    data: str = ""
    """Folder of these sets."""
    items: int = field(default=100, metadata={"min": 1})
    """Items of each, the first ones."""

    def __post_init__(self) -> None:
        if self.tasks and not self.data:
            raise InputError("there is no folder of the evaluation sets", where="validate.data", fix="name it")
