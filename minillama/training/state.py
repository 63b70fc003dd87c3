"""Training state: what a checkpoint has beside the model folder, saved and restored to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minillama.errors import InputError
from minillama.model import Decoder
from minillama.runs.checkpoint import Checkpoint
from minillama.tokenizer import Tokenizer
from minillama.training.guard import Guard
from minillama.training.objectives import MODEL, Objective
from minillama.training.objectives.base import digest
from minillama.training.optim.groups import load_optimizer_state, optimizer_state

RESERVED = ("objective", "models")  # prefixes of names in a checkpoint, beside those of models


@dataclass
class Progress:
    """Progress that a checkpoint restores besides tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class TrainingState:
    """All that the next step depends on beside the configuration.

    Args:
        objective: its state, its data's fingerprint and its companions' SHA-256.
        tokenizer: its fingerprint.
        optimizers: their state, by parameter name.
        guard: the last losses.
        progress: steps, tokens, seconds.

    Raises:
        ValueError: a model of the objective has a reserved name.
    """

    objective: Objective
    tokenizer: Tokenizer
    optimizers: Sequence[torch.optim.Optimizer]
    guard: Guard
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.masters: dict[str, nn.Module] = dict(self.objective.models)
        odd = [name for name in self.masters if name in RESERVED or "/" in name]
        if odd:
            raise ValueError(f"models of an objective cannot be named {odd}")
        self.companions = {name: digest(companion) for name, companion in self.objective.companions.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Optimizer state as PARAMETER/NAME, the objective's as objective/NAME, further models as models/NAME/KEY."""
        found = optimizer_state(self.optimizers)
        found |= {f"objective/{name}": value for name, value in self.objective.state_dict().items()}
        for name, master in self.masters.items():
            if name != MODEL:
                found |= {f"models/{name}/{key}": value for key, value in master.state_dict().items()}
        return found

    def run(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """JSON values of run.json; `record` is the line of the last step taken."""
        return {
            **asdict(self.progress),
            "data": self.objective.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "guard": self.guard.state(),
            "record": dict(record),
            **({"companions": self.companions} if self.companions else {}),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's state.

        Raises:
            InputError: it was made with other data, another tokenizer, or beside other frozen models.
        """
        self._check(checkpoint)
        model = self.masters[MODEL]
        device = next(model.parameters()).device
        model.load_state_dict(Decoder.from_pretrained(checkpoint.path, torch.float32, device).state_dict())
        tensors = checkpoint.optimizer_tensors()
        self.objective.load_state_dict(_taken(tensors, "objective/"))
        for name, master in self.masters.items():
            if name != MODEL:
                master.load_state_dict(_taken(tensors, f"models/{name}/"))
        load_optimizer_state(self.optimizers, tensors)
        run = checkpoint.run
        self.progress = Progress(run["step"], run["tokens"], run["seconds"])
        self.guard.restore(run["guard"])

    def _check(self, checkpoint: Checkpoint) -> None:
        run = checkpoint.run
        before, now = dict(run.get("companions", {})), self.companions
        same = {name: (before.get(name, "none"), now.get(name, "none")) for name in sorted({*before, *now})}
        same |= {"data": (run["data"], self.objective.fingerprint)}
        same |= {"tokenizer": (run["tokenizer"], self.tokenizer.fingerprint)}
        for name, (expected, found) in same.items():
            if expected != found:
                raise InputError(
                    f"the {name} is not what the checkpoint was trained on",
                    where=checkpoint.path,
                    found=f"fingerprint {found[:16]}",
                    expected=expected[:16],
                    fix=f"bring the {name} back, or start a new run",
                )


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors removed by name prefix, named without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
