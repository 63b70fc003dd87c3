"""Configuration differences, and those that a run may be resumed with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from minillama.errors import InputError
from minillama.runs.config import RunConfig, to_table

# Settings on which neither the data nor the meaning of the parameters depends. All else makes it another run.
HARMLESS = (
    r"name|data\.cache|tokenizer\.path|model\.preset"
    r"|(validate|sample|checkpoint|guard|metrics|log|parallel)\..*"
    r"|train\.(steps|micro_batch_size|dtype|device|compile|checkpointing|deterministic|init_from|init_embeddings)"
    r"|optim\.(lr|muon_lr|schedule|warmup_steps|decay_fraction|final_fraction|weight_decay|grad_clip)"
)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattened table: dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> `KEY = AFTER, was BEFORE`, of the keys whose values differ; None for a key that is missing."""
    a, b = flat(before), flat(after)
    changed = [key for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    return {key: f"{key} = {b.get(key)}, was {a.get(key)}" for key in changed}


def check_resumed(saved: RunConfig, wanted: RunConfig, where: object) -> list[str]:
    """Differences from the resumed run, one line each.

    Raises:
        InputError: a difference that would make it another run.
    """
    lines = differences(to_table(saved), to_table(wanted))
    harmful = [line for key, line in lines.items() if not re.fullmatch(HARMLESS, key)]
    if (saved.optim.muon_lr > 0) != (wanted.optim.muon_lr > 0):  # parameters would go to another optimizer
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
