"""Calibration of int4 quantization on a text, and its cost on a held-out part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minillama.data.sources import Source, documents
from minillama.errors import InputError
from minillama.files import refuse_url
from minillama.formats.model_file import ModelFile
from minillama.inference.engine import evaluating
from minillama.inference.quantize import int4_numbers, quantize
from minillama.layers.int4 import Int4
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer

WINDOW = 512  # tokens per window
MOST = 64  # calibration windows
HELD_OUT = 8  # windows, or a fifth of a short text's


def calibrated(opened: ModelFile, tokenizer: Tokenizer, source: str, say: Callable[[str], None]) -> Decoder:
    """Calibrated int4 model: quantized by the beginning of a text, see `importance_matrix`.

    The last windows of the text are held out; the loss on them before and after is reported.

    Args:
        opened: the model, which is read in float32.
        tokenizer: its own.
        source: the text, as the name of a `Source`.
        say: takes a line to show.

    Raises:
        InputError: the text cannot be read, or is shorter than two windows.
    """
    rows = windows(source, tokenizer, min(WINDOW, opened.config.max_seq_len), MOST + HELD_OUT)
    kept = min(HELD_OUT, -(-len(rows) // 5))
    used, held_out = rows[:-kept][:MOST], rows[-kept:]
    model = Decoder.from_pretrained(opened, torch.float32).fuse()
    before = _nats(model, held_out)
    say(f"calibrating by {used.numel()} tokens of {source}")
    after = _nats(quantize(model, "int4", calibration=used[:, :-1]), held_out)
    say(
        f"{held_out[:, 1:].numel()} held-out tokens: {before:.4f} nats per token before, {after:.4f} after; "
        f"perplexity {math.exp(before):.3f} and {math.exp(after):.3f}, {math.exp(after - before) - 1:+.2%}"
    )
    return model


def by_text(source: str, say: Callable[[str], None]) -> Callable[[ModelFile, Tokenizer], Mapping[str, Int4]]:
    """Calibration by this text (`calibrated`) for `convert`: int4 weights by tensor."""
    refuse_url(source)
    return lambda opened, tokenizer: int4_numbers(calibrated(opened, tokenizer, source, say))


def _nats(model: Decoder, rows: Tensor) -> float:
    """Nats per token of rows (N, T + 1)."""
    with evaluating(model):
        losses = [model.loss(model.hidden(part[:, :-1]), part[:, 1:]).item() for part in rows.split(16)]
    return sum(losses) / rows[:, 1:].numel()


def windows(source: str, tokenizer: Tokenizer, length: int, most: int) -> Tensor:
    """Windows of the beginning of a text: at most so many rows of `length` + 1 ids, the last of each the next's first.

    Raises:
        InputError: the text cannot be read, or does not fill two rows.
    """
    ids: list[int] = []
    for document in documents(Source(source)):
        ids += tokenizer.encode(document.text, bos=tokenizer.add_bos)
        if tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
        if len(ids) > most * length:
            break
    count = min((len(ids) - 1) // length, most)
    if count < 2:
        found, expected = f"{len(ids)} tokens", f"{2 * length + 1} or more: two windows, one of them held out"
        raise InputError("the text is too short to calibrate by", where=source, found=found, expected=expected)
    return torch.tensor(ids[: count * length + 1]).unfold(0, length + 1, length)
