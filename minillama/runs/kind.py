"""What the settings of any objective say of it, and the commands that follow a training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar, Literal


def typed(command: str) -> list[str]:
    """Words that run a command, as this one was: by the script of a clone, or `minillama`."""
    is_script = Path(sys.argv[0]).name in ("train.py", "generate.py")
    return ["python", str(Path(sys.argv[0]).with_name(f"{command}.py"))] if is_script else ["minillama", command]


def generate(model: str, prompt: str) -> list[str]:
    """Arguments that continue a prompt."""
    given = [f"--prompt={prompt}"] if prompt.startswith("-") else ["--prompt", prompt]
    return [*typed("generate"), "--model", model, *given]


class Kind:
    """What the settings of an objective say of it."""

    special_tokens: ClassVar[tuple[str, ...]] = ()
    """That the tokenizer needs for it."""
    reads: ClassVar[str] = "text"
    """What `load_data` makes of the sources: text (or conversations), records or preferences."""
    trains: ClassVar[str] = "lm"
    """The `objective` of the models that it is for."""
    head: ClassVar[Literal["lm", "score"]] = "lm"
    """The `head` of the model that is trained."""
    has_reference: ClassVar[bool] = False
    """Whether the start model, frozen, is needed all along."""
    has_rollouts: ClassVar[bool] = False
    """Whether a whole copy of the model decodes beside it."""
    has_critic: ClassVar[bool] = False
    """Whether a second model of its shape is trained."""
    has_average: ClassVar[bool] = False
    """Whether an average of the trained weights is kept."""
    texts: ClassVar[int] = 1
    """Sequences of an example."""
    soft_labels: ClassVar[bool] = False
    """Whether it reads the probability of a preference."""

    def commands(self, model: str, prompt: str) -> dict[str, list[str]]:
        """What to do with the trained model."""
        return {"generate": generate(model, prompt)}
