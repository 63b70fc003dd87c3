"""Training state: what a checkpoint has beside the model folder, saved and restored to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from minillama.errors import InputError
from minillama.runs.checkpoint import Checkpoint, CheckpointCopy
from minillama.runs.parts import Place, Stored
from minillama.training.guard import Guard
from minillama.training.model_folder import ModelFolder
from minillama.training.objectives import MODEL, Objective
from minillama.training.optim.groups import load_optimizer_state, optimizer_state
from minillama.training.ranks import Ranks
from minillama.training.sharded import gathered, is_sharded, load, local, part

RESERVED = ("objective", "models")  # prefixes of names in a checkpoint, beside those of models


@dataclass
class TrainingState:
    """All that the next step depends on beside the configuration.

    Args:
        objective: its state, its data's fingerprint and its companions' SHA-256.
        folder: how its model is written, beside the tokenizer.
        step: optimizer steps taken.
        tokens: read in them.
        seconds: spent, over all starts of the run.

    Raises:
        ValueError: a model of the objective has a reserved name.
    """

    objective: Objective
    folder: ModelFolder
    optimizers: Sequence[torch.optim.Optimizer]
    guard: Guard
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.masters: dict[str, nn.Module] = dict(self.objective.models)
        odd = [name for name in self.masters if name in RESERVED or "/" in name]
        if odd:
            raise ValueError(f"models of an objective cannot be named {odd}")
        self.fingerprints = {"data": self.objective.fingerprint, "tokenizer": self.folder.tokenizer.fingerprint}
        self.companions = {name: digest(companion) for name, companion in self.objective.companions.items()}

    def count(self, tokens: int, seconds: float) -> None:
        """Account for a step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds

    def copy(self, record: Mapping[str, Any]) -> CheckpointCopy:
        """Contents of a checkpoint, on the CPU; `record` is the line of the last step taken.

        The first process has the model, and each its parts of sharded optimizer state.

        Beside optimizer state (PARAMETER/NAME) are the objective's own (objective/NAME) and further models
        (models/NAME/KEY).
        """
        tensors = optimizer_state(self.optimizers)
        tensors |= {f"objective/{name}": value for name, value in self.objective.state_dict().items()}
        for name, master in self.masters.items():
            if name != MODEL:
                tensors |= {f"models/{name}/{key}": value for key, value in master.state_dict().items()}
        run = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            **self.fingerprints,
            "guard": self.guard.state(),
            "record": dict(record),
            **({"companions": self.companions} if self.companions else {}),
        }
        ranks = Ranks.current()
        model, places = gathered(self.folder.tensors(), ranks.leads), {}
        if ranks.parts > 1:
            places = {name: Place(part(t), tuple(t.shape)) for name, t in tensors.items() if is_sharded(t)}
            tensors = {name: local(t) for name, t in tensors.items() if name in places or ranks.leads}
        return CheckpointCopy(
            model, gathered(tensors, ranks.index < ranks.parts), run, places, ranks.index, ranks.parts
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint's state.

        Raises:
            InputError: it was made with other data, another tokenizer, or beside other frozen models.
        """
        self._check(checkpoint)
        self.folder.read(checkpoint.path)
        tensors = checkpoint.optimizer_tensors()
        self.objective.load_state_dict({name: stored.whole() for name, stored in _pop(tensors, "objective/").items()})
        for name, master in self.masters.items():
            if name != MODEL:
                load(master, {key: stored.whole() for key, stored in _pop(tensors, f"models/{name}/").items()})
        load_optimizer_state(self.optimizers, tensors)
        run = checkpoint.run
        self.step, self.tokens, self.seconds = run["step"], run["tokens"], run["seconds"]
        self.guard.restore(run["guard"])

    def _check(self, checkpoint: Checkpoint) -> None:
        saved = {name: checkpoint.run[name] for name in self.fingerprints} | checkpoint.run.get("companions", {})
        own = self.fingerprints | self.companions
        for name in sorted({*saved, *own}):
            expected, found = saved.get(name, "none"), own.get(name, "none")
            if expected != found:
                raise InputError(
                    f"the {name} is not what the checkpoint was trained on",
                    where=checkpoint.path,
                    found=f"fingerprint {found[:16]}",
                    expected=expected[:16],
                    fix=f"bring the {name} back, or start a new run",
                )


def digest(model: nn.Module) -> str:
    """SHA-256 of a model's tensors, in the order of their names."""
    found = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _pop(tensors: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    """Tensors removed by name prefix, named without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
