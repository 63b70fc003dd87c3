"""Trainable parameters per stage, by name; frozen ones keep their bits and cost no optimizer memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import nn

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.runs.config import RunConfig, Stage
from minillama.training.optim.groups import named_parameters


def trained(config: ModelConfig, stage: Stage) -> int:
    """Trainable parameter count of a stage, from shapes."""
    return sum(math.prod(shape) for name, shape in config.tensors().items() if stage.trains(name))


def check(config: RunConfig) -> None:
    """Stage check: every glob of a stage names a parameter, and every stage trains one.

    Raises:
        InputError: one names none, or a stage would train nothing.
    """
    names = [*config.model.tensors(), "lm_head.weight"]  # a tied head is the embedding, and may be named as well
    for number, stage in enumerate(config.stages):
        where = f"stages.{number}.trainable"
        for pattern in stage.trainable:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=1, cutoff=0)
                raise InputError("no parameter has such a name", where=where, found=pattern, expected=f"as {near[0]!r}")
        if not trained(config.model, stage):
            fix = "name model.embed_tokens.*, which is the head as well"
            raise InputError("this stage trains nothing", where=where, found=", ".join(stage.trainable), fix=fix)


def describe(config: RunConfig, step: int) -> str:
    """`stage 1 of 3, to step 500: trains 204,607,488 of 6,885,486,592 parameters (2.97%)`."""
    stage = config.stage(step)
    number, count = config.stages.index(stage) + 1, trained(config.model, stage)
    total, last = config.model.num_params(), stage.until_step if number < len(config.stages) else config.train.steps
    return (
        f"stage {number} of {len(config.stages)}, to step {min(last, config.train.steps)}: "
        f"trains {count:,} of {total:,} parameters ({count / total:.2%})"
    )


def enter(stage: Stage, models: Iterable[Mapping[str, nn.Module]], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Stage transition: freeze what the stage does not train, and discard its optimizer state."""
    for model in models:
        for name, parameter in named_parameters(model):
            parameter.requires_grad_(stage.trains(name))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    optimizer.state.pop(parameter, None)
