"""Configuration differences, and those that a run may be resumed with."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from minillama.errors import InputError
from minillama.runs.config import RunConfig, to_table

# Settings on which neither the data nor the meaning of the parameters depends. All else makes it another run.
HARMLESS = (
    "name",
    "data.cache",
    "train.steps",
    "train.micro_batch_size",
    "train.dtype",
    "train.device",
    "train.compile",
    "train.checkpointing",
    "train.deterministic",
    "train.init_from",
    "train.init_embeddings",
    "tokenizer.path",
    "model.preset",
    "validate.*",
    "sample.*",
    "checkpoint.*",
    "guard.*",
    "metrics.*",
    "optim.lr",
    "optim.muon_lr",
    "optim.schedule",
    "optim.warmup_steps",
    "optim.decay_fraction",
    "optim.final_fraction",
    "optim.weight_decay",
    "optim.grad_clip",
)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattened table: dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> both values, of the keys whose values differ; None for a key that is missing."""
    a, b = flat(before), flat(after)
    return {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}


def check_resumed(saved: RunConfig, wanted: RunConfig, where: object) -> list[str]:
    """Differences from the resumed run, one line each.

    Raises:
        InputError: a difference that would make it another run.
    """
    changed = differences(to_table(saved), to_table(wanted))
    lines = {key: f"{key} = {after}, was {before}" for key, (before, after) in changed.items()}
    harmful = [line for key, line in lines.items() if not any(fnmatchcase(key, pattern) for pattern in HARMLESS)]
    before, after = changed.get("optim.muon_lr", (0, 0))
    if (before > 0) != (after > 0):  # parameters would go to another optimizer
        harmful.append(lines["optim.muon_lr"])
    if harmful:
        raise InputError(
            "a run cannot be resumed with these changes",
            where=where,
            found="; ".join(harmful),
            expected="the run's own settings; others are steps, rates, validation, sampling, checkpoints, the device",
            fix="leave them as they were, or start a new run with --train.init_from of this one's model",
        )
    return list(lines.values())
