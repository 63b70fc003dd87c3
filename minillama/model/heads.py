"""Scalar head `score.weight` (1, D) on the last hidden states: reward models and value models.

Stored as transformers' sequence classification with one label, or beside an adapter as PEFT has it. Shapes: B batch,
T time, D width.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.errors import InputError
from minillama.formats import peft
from minillama.formats.open import open_model
from minillama.formats.peft_config import CONFIG, read_config
from minillama.layers.lora import effective_weight
from minillama.layers.mask import Mask
from minillama.model.decoder import Decoder


def with_score(model: Decoder, generator: torch.Generator | None = None, pad_id: int = 0) -> Decoder:
    """Scalar model on the backbone of a language model, whose head it does not have; score normal, 0.02.

    Args:
        model: whose backbone is taken over, not copied.
        generator: source of the random numbers; torch's global one unless given.
        pad_id: of the padding, for transformers; no text ends with it.
    """
    with torch.device("meta"):
        made = Decoder(replace(model.config, head="score", pad_id=pad_id), model.dropout)
    weight = torch.empty(1, model.config.dim).normal_(0, 0.02, generator=generator)
    assert made.score is not None
    made.model, made.score.weight = model.model, nn.Parameter(weight.to(model.device, model.dtype))
    made.stop_ids, made.sampling = model.stop_ids, model.sampling
    return made.train(model.training)


def scores(model: Decoder, tokens: Tensor, positions: Tensor | None = None, mask: Mask | None = None) -> Tensor:
    """Scalar w . h_t of every token, (B, T) in float32: a value per state, or a reward where the text ends.

    Args:
        model: with a scalar head.
        tokens: (B, T) ids, padded on the right.
        positions: as `Decoder.hidden` takes them.
        mask: attention mask; causal unless given.

    Raises:
        InputError: a model without a scalar head.
    """
    if model.score is None:
        raise InputError("this model has no scalar head", expected="a reward or value model, with score.weight")
    hidden = model.hidden(tokens, positions=positions, mask=mask)
    return F.linear(hidden.float(), effective_weight(model.score).float())[..., 0]


def last(values: Tensor, lengths: Tensor) -> Tensor:
    """Value at the last real token of each text: (..., T) and numbers of tokens (...) -> (...)."""
    return values.gather(-1, lengths[..., None] - 1)[..., 0]


def open_scores(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Decoder:
    """Read a reward or value model, in evaluation mode: a folder with all weights, or an adapter, which is merged.

    Args:
        path: the folder. An adapter's names its base model.
        dtype: convert the weights; as they are stored unless given.
        device: where to put them.

    Raises:
        InputError: a model without a scalar head, and as `Decoder.from_pretrained` and `load_adapter`.
    """
    settings = Path(path) / CONFIG
    if not settings.exists():
        model = Decoder.from_pretrained(path, dtype, device)
    else:
        base = open_model(read_config(settings).base_model_name_or_path)
        model = Decoder.from_pretrained(peft.merged(base, peft.read(path, base.config)), dtype, device)
    if model.score is None:
        raise InputError("a language model is no reward model", where=path, expected="a folder with score.weight")
    return model.requires_grad_(False)
