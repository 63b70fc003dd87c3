"""Trainable parameters per stage, by name; frozen ones keep their bits and cost no optimizer memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from minillama.errors import InputError
from minillama.model.lora import DEFAULT, adapter_names
from minillama.runs.config import RunConfig
from minillama.runs.sections import Stage
from minillama.training.optim.groups import named_parameters

Models = Mapping[str, nn.Module]


def trained(stage: Stage, models: Models) -> int:
    """Number of parameters that a stage trains."""
    return sum(parameter.numel() for name, parameter in _candidates(models) if stage.trains(name))


def _candidates(models: Models) -> list[tuple[str, nn.Parameter]]:
    """Parameters that may be trained: of a model with adapters those of its own, not of a reference."""
    own = f".adapters.{DEFAULT}."
    frozen = {id(p) for m in models.values() if adapter_names(m) for name, p in m.named_parameters() if own not in name}
    return [(name, parameter) for name, parameter in named_parameters(models) if id(parameter) not in frozen]


def check(stages: Sequence[Stage], models: Models) -> None:
    """Stage check: every glob names a parameter, as MODEL/PARAMETER of others than the decoder.

    Raises:
        InputError: a glob names none, or a stage would train nothing.
    """
    names = [name for name, _ in _candidates(models)] + ["lm_head.weight"]  # a tied head may be named as well
    for number, stage in enumerate(stages):
        where = f"stages.{number}.trainable"
        for pattern in stage.trainable:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=1, cutoff=0)
                raise InputError("no parameter has such a name", where=where, found=pattern, expected=f"as {near[0]!r}")
        if not trained(stage, models):
            fix = "name model.embed_tokens.*, which is the head as well"
            raise InputError("this stage trains nothing", where=where, found=", ".join(stage.trainable), fix=fix)


def describe(config: RunConfig, models: Models, step: int) -> str:
    """`stage 1 of 3, to step 500: trains 204,607,488 of 6,885,486,592 parameters (2.97%)`."""
    stage = config.stage(step)
    number, count = config.stages.index(stage) + 1, trained(stage, models)
    total = sum(parameter.numel() for _, parameter in named_parameters(models))
    last = stage.until_step if number < len(config.stages) else config.train.steps
    return (
        f"stage {number} of {len(config.stages)}, to step {min(last, config.train.steps)}: "
        f"trains {count:,} of {total:,} parameters ({count / total:.2%})"
    )


def enter(stage: Stage, models: Iterable[Models], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Stage transition: freeze what the stage does not train, and discard its optimizer state."""
    for same in models:
        for name, parameter in _candidates(same):
            parameter.requires_grad_(stage.trains(name))
    for optimizer in optimizers:
        for frozen in [parameter for parameter in optimizer.state if not parameter.requires_grad]:
            del optimizer.state[frozen]
