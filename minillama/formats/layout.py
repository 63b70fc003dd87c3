"""Tensor layout of a format: names, shapes and row orders of its tensors, from the parameter table.

RoPE rotates pairs of rows of every query and key head: Hugging Face pairs row i with row i + E/2 (half-split); Meta,
llama2.c and GGUF pair row 2i with row 2i + 1 (interleaved).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.formats.model_file import LazyTensors
from minillama.formats.stored import Stored

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Tensor of a file.

    Attributes:
        name: in the file.
        shape: in the file.
        axes: names of its axes.
        ours: its parameters with their shapes: one, or several whose rows are concatenated, those of every head in
            turn with `heads`, (H, 3, E, ...).
        heads: number of heads that are fused, or whose rows are interleaved; 0: neither.
    """

    name: str
    shape: Shape
    axes: tuple[str, ...]
    ours: Mapping[str, Shape]
    heads: int = 0

    def half_split(self, rows: Tensor) -> Tensor:
        """Rows (heads * E, ...) of the file in Hugging Face's order: 0, 2, 4, ..., 1, 3, 5, ... of every head."""
        return rearrange(rows, "(h pair two) d -> (h two pair) d", h=self.heads, two=2) if self.heads else rows

    def interleaved(self, rows: Tensor) -> Tensor:
        """Rows in the order of the file, the inverse of `half_split`."""
        return rearrange(rows, "(h two pair) d -> (h pair two) d", h=self.heads, two=2) if self.heads else rows

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensor of the file from the parameters."""
        parts = [tensors[name] for name in self.ours]
        if len(parts) > 1 and not self.heads:
            return torch.cat(parts)
        if len(parts) > 1:
            return torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).reshape(self.shape)
        return self.interleaved(parts[0]).reshape(self.shape)

    def unpack(self, tensor: Tensor, name: str) -> Tensor:
        """Parameter of that name from the file's tensor, or of several that are concatenated from its own rows."""
        if len(self.ours) > 1 and not self.heads:
            return tensor
        if len(self.ours) > 1:
            tensor = tensor.unflatten(0, (self.heads, len(self.ours), -1))[:, list(self.ours).index(name)]
            return tensor.reshape(self.ours[name])
        return self.half_split(tensor.reshape(self.ours[name]))

    def span(self, name: str) -> tuple[int, int]:
        """Rows of a parameter, the first and the one behind the last; of one of several, in a concatenation."""
        before = list(self.ours)[: list(self.ours).index(name)]
        start = sum(self.ours[other][0] for other in before)
        return start, start + self.ours[name][0]


def rename(name: str, names: Mapping[str, str]) -> str:
    """Name in a file: each part of a Hugging Face name that `names` has is replaced, in their order."""
    for part, theirs in names.items():
        name = re.sub(rf"(?<!\w){re.escape(part)}(?!\w)", theirs, name)
    return name


def layout(config: ModelConfig, names: Mapping[str, str], interleaved: bool = False) -> dict[str, Entry]:
    """Tensors of a file by their names there.

    Args:
        config: the shape.
        names: as `rename` takes them; parameters that get the same name are fused.
        interleaved: RoPE pairs of queries and keys; half-split unless set.
    """
    rows, table = config.parameters(), dict[str, Entry]()
    for name, row in rows.items():
        theirs, shape, axes = rename(name, names), row.shape(config), row.axes
        heads = {"query": config.n_heads, "key": config.n_kv_heads}.get(row.role, 0) if interleaved else 0
        if row.role == "token shift" and theirs.startswith("rwkv."):  # transformers has them as (1, 1, D)
            table[theirs] = Entry(theirs, (1, 1, *shape), ("1", "1", *axes), {name: shape})
        elif theirs in table:
            first, by_head = table[theirs], "query_key_value" in theirs  # BLOOM's
            fused = (first.shape[0] + shape[0], *shape[1:]), (f"{first.axes[0]} + {axes[0]}", *axes[1:])
            table[theirs] = Entry(theirs, *fused, {**first.ours, name: shape}, config.n_heads if by_head else 0)
        else:
            table[theirs] = Entry(theirs, shape, axes, {name: shape}, heads)
    return table


def check_tensors(
    table: Mapping[str, Entry], found: Mapping[str, Shape], where: object, ignored: Iterable[str] = ()
) -> None:
    """Check of a file's tensors against the configuration, before any is read.

    Raises:
        InputError: missing or unknown names, all listed; or another shape, with the field it contradicts.
    """
    missing = [name for name in table if name not in found]
    unknown = [name for name in found if name not in table and name not in set(ignored)]
    if missing or unknown:
        parts = [("missing", missing), ("unknown", unknown)]
        what, expected = "the tensors are not those of the configuration", f"{len(table)} tensors"
        listed = "; ".join(f"{len(names)} {word}: {_listed(names, 12)}" for word, names in parts if names)
        raise InputError(what, where=where, found=listed, expected=expected)
    for name, entry in table.items():
        if found[name] != entry.shape:
            what, axes = "a tensor has another shape than in the configuration", ", ".join(entry.axes)
            expected = f"{entry.shape}, which is {axes}"
            raise InputError(what, where=f"{where}, {name}", found=found[name], expected=expected)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two matrices are equal; their first rows are compared first."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a[0], b[0]) and torch.equal(a, b)


def lazy_tensors(
    config: ModelConfig, table: Mapping[str, Entry], stored: Mapping[str, Stored], read: Callable[[str, Stored], Tensor]
) -> LazyTensors[Tensor]:
    """Parameters by Hugging Face name, in the order of the model; `read` gives what is stored of a file's tensor."""
    entries = {ours: entry for entry in table.values() for ours in entry.ours}

    def tensor(ours: str) -> Tensor:
        entry = entries[ours]
        part = stored[entry.name]
        if len(entry.ours) > 1 and not entry.heads:
            part = part.rows(*entry.span(ours))
        return entry.unpack(read(entry.name, part), ours)

    return LazyTensors(config.tensors(), tensor)


def check_writable(tensors: Iterable[str], config: ModelConfig, llama_only: str = "") -> None:
    """Check of a model before it is written: nothing is lost silently. `llama_only` is a format with LLaMA's switches.

    Raises:
        InputError: a switch that the format lacks, or tensors that a model of this shape does not have.
    """
    if llama_only:
        for switch, found in config.switches().items():
            what, expected = f"{llama_only} has no such model", "LLaMA's switches"
            raise InputError(what, where=switch, found=found, expected=expected, fix="write it as hf")
    names = config.tensors()
    given = set(tensors)  # `in` would read the tensor of a lazy mapping
    unknown, missing = sorted(given - set(names)), [name for name in names if name not in given]
    if unknown or missing:
        fix = "merge adapters and take off heads before saving the model; a changed layer is saved with torch.save"
        what = "tensors that would not be written" if unknown else "tensors that the model lacks"
        expected = "the parameters of the configuration"
        raise InputError(what, found=_listed(unknown or missing, 5), expected=expected, fix=fix)


def _listed(names: list[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
