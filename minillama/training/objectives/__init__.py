"""Training objectives, one file each, and the one place where a name becomes one."""

from __future__ import annotations

from minillama.errors import InputError
from minillama.training.config import RunConfig
from minillama.training.objectives.base import Batch, Objective
from minillama.training.objectives.lm import LanguageModel

__all__ = ["Batch", "LanguageModel", "Objective", "make"]


def make(config: RunConfig, separator: int | None) -> Objective:
    """The objective that the configuration asks for; `auto` is what the model was made for, here `lm`."""
    if config.model.objective != "lm":
        raise InputError(
            "this model is made for an objective that is not there yet",
            where="model.objective",
            found=config.model.objective,
            expected="lm; GLM's blank infilling is being built",
            fix="take the shape of another member of the family",
        )
    return LanguageModel(
        config.train.batch_size,
        config.context,
        separator if config.data.mask_documents else None,
        config.train.z_loss,
    )
