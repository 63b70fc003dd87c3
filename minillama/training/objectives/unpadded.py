"""Padding-free batch: the sequences of all rows one after the other in one row."""

from __future__ import annotations

import torch

from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.training.objectives.base import Batch


def is_eager(model: Decoder) -> bool:
    """Whether a model runs on a CPU by code that is not compiled, which takes any number of shapes."""
    return model.device.type == "cpu" and model.blocks[0]._compiled_call_impl is None


def unpadded(batch: Batch, model: Decoder) -> Batch:
    """Batch of the same loss and gradients in fewer tokens, where this is faster: for eager code on a CPU.

    Each sequence, a row or one of its documents, ends at its last trained token. Attention is a call per sequence; all
    else runs over the N tokens that are left, (1, N). Elsewhere the batch stays as it is: compiled code and GPUs want
    few shapes and few calls.

    Args:
        batch: causal rows (B, T), perhaps of several documents.
    """
    kept, config = batch.kept, model.config
    if (
        not is_eager(model)
        or config.position != "rope"
        or config.sliding_window
        or config.is_longrope
        or not kept.any()
    ):
        return batch
    shape = batch.tokens.shape
    positions = torch.arange(shape[1]) if batch.positions is None else batch.positions
    parts = (batch.tokens, batch.targets, batch.weights, positions.expand(shape))
    tokens, targets, weights, positions = (part[kept][None] for part in parts)
    lengths = batch.sequences[kept].unique_consecutive(return_counts=True)[1]
    return Batch(tokens, targets, weights, Mask(segments=tuple(lengths.tolist())), positions, totals=batch.totals)
