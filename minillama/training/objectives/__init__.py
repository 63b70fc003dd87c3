"""Training objectives, one file each, and the one place where a name becomes one."""

from __future__ import annotations

from minillama.evaluate.cloze import Cloze
from minillama.runs.config import RunConfig
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import Blanks
from minillama.training.objectives.base import Batch, Objective
from minillama.training.objectives.cloze import ClozeQuestions
from minillama.training.objectives.glm import BlankInfilling
from minillama.training.objectives.lm import LanguageModel
from minillama.training.spans import sentence_ends

__all__ = ["Batch", "BlankInfilling", "ClozeQuestions", "LanguageModel", "Objective", "make"]


def make(config: RunConfig, tokenizer: Tokenizer, separator: int | None) -> Objective:
    """The objective that the configuration asks for.

    Args:
        config: the run.
        tokenizer: the model's.
        separator: id of the token that opens a document, None where there is none.
    """
    rows, context, z_loss = config.train.batch_size, config.context, config.train.z_loss
    if config.objective == "glm":
        ends = sentence_ends(tokenizer, config.model.vocab_size)
        return BlankInfilling(rows, context, Blanks.of(tokenizer), ends, separator, config.blanks, z_loss)
    if config.objective == "cloze":
        return ClozeQuestions(rows, Cloze(config.cloze, tokenizer, context))
    return LanguageModel(rows, context, separator if config.data.mask_documents else None, z_loss)
