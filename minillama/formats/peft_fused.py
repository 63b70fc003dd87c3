"""Adapters of layers that transformers fuses by concatenated rows (Phi-3's qkv_proj and gate_up_proj).

The update of a fused layer whose parts have adapters of their own is block-diagonal: A has the rows of all, B the rows
of each part in that part's columns alone. An adapter that another program trained on the fused layer shares A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.formats import hf
from minillama.formats.layout import Entry, layout
from minillama.layers.lora import Adapter

Columns = Mapping[str, tuple[int, int]]


def fused_layers(config: ModelConfig) -> dict[str, Entry]:
    """Name of a fused layer in transformers -> its tensor, of which our layers are the parts."""
    table = layout(config, hf.NAMES.get(config.to_hf()["model_type"], {}))
    return {name.removesuffix(".weight"): e for name, e in table.items() if len(e.ours) > 1 and not e.heads}


def parts_of(entry: Entry) -> list[str]:
    """Our layers in a fused one."""
    return [name.removesuffix(".weight") for name in entry.ours]


def join(name: str, entry: Entry, adapters: Mapping[str, Adapter]) -> tuple[Adapter, Columns]:
    """Adapter of a fused layer from those of its parts, and the columns of B that belong to each.

    Raises:
        InputError: DoRA of some of the parts: the magnitudes of the others are not known.
    """
    found = {part: adapters[part] for part in parts_of(entry) if part in adapters}
    first = next(iter(found.values()))
    if first.magnitude is not None and len(found) < len(entry.ours):
        what, expected = "DoRA of a part of a layer that is fused in transformers", ", ".join(parts_of(entry))
        raise InputError(what, where=name, found=", ".join(found), expected=expected, fix="take all parts as targets")
    rank = sum(part.rank for part in found.values())
    b, columns, end = torch.zeros(entry.shape[0], rank), dict[str, tuple[int, int]](), 0
    for key, part in found.items():
        start, end = end, end + part.rank
        columns[key] = start, end
        b[slice(*entry.span(f"{key}.weight")), start:end] = part.lora_B.detach().cpu() * (part.scale / first.scale)
    a = torch.cat([part.lora_A.detach().cpu() for part in found.values()])
    magnitude = torch.cat([m.cpu() for part in found.values() if (m := part.magnitude) is not None] or [torch.empty(0)])
    alpha = first.scale * (math.sqrt(rank) if first.use_rslora else rank)
    joined = magnitude if len(magnitude) else None
    return Adapter(a, b, alpha, joined, first.use_rslora, first.dropout), columns


def split(entry: Entry, adapter: Adapter, columns: Columns) -> dict[str, Adapter]:
    """Adapters of the parts, each with its columns of B as `join` gave them, or with all that another program wrote."""
    found: dict[str, Adapter] = {}
    for name in parts_of(entry):
        if columns and name not in columns:
            continue
        own, rows = slice(*columns.get(name, (0, adapter.rank))), slice(*entry.span(f"{name}.weight"))
        a, b = adapter.lora_A[own], adapter.lora_B[rows, own]
        alpha = adapter.scale * (math.sqrt(len(a)) if adapter.use_rslora else len(a))
        magnitude = None if adapter.magnitude is None else adapter.magnitude[rows]
        found[name] = Adapter(a, b, alpha, magnitude, adapter.use_rslora, adapter.dropout)
    return found
