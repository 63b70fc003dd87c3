"""What a layer remembers between forward passes while decoding.

A `State` belongs to one batch of sequences. It has one object a layer (here keys and values) and counts,
once for all layers, how many tokens each row has read. Rows are left-aligned: row b's tokens lie in slots
0..lengths[b]-1, whatever the lengths of its neighbours, so that prompts of unequal length share a batch
without padding in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.layers.wkv import Sums

__all__ = ["KVCache", "LayerState", "Snapshot", "Span", "State", "WKVState"]


@dataclass(frozen=True)
class Span:
    """The slots that the tokens of one forward pass take.

    Args:
        start: the first slot, when it is the same in every row; else None.
        count: T, the number of tokens a row.
        end: the number of slots in use after this pass, over all rows.
        starts: the first slot of each row, when they differ.
    """

    start: int | None
    count: int
    end: int
    starts: tuple[int, ...] = ()

    def slots(self, device: torch.device) -> Tensor:
        """Slot of each token, (T,), or (B, T) where rows differ. It is also its position."""
        steps = torch.arange(self.count, device=device)
        if self.start is not None:
            return steps + self.start
        return torch.tensor(self.starts, device=device)[:, None] + steps


class LayerState(Protocol):
    """One layer's memory: keys and values, or what a recurrence remembers."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named twice."""

    def snapshot(self) -> object:
        """What `restore` needs to come back to this point."""

    def restore(self, snapshot: object) -> None:
        """Come back to the point of the snapshot."""


class KVCache:
    """Keys and values of one layer in buffers of fixed size, written in place."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (B, K, S, E)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, keys: Tensor, values: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, E) keys and values at the span's slots; return views of all slots in use."""
        if span.start is not None:
            self.keys[:, :, span.start : span.end] = keys
            self.values[:, :, span.start : span.end] = values
        else:
            slots = span.slots(keys.device)
            rows = torch.arange(len(slots), device=keys.device)[:, None]
            self.keys[rows, :, slots] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[rows, :, slots] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[:, :, : span.end], self.values[:, :, : span.end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.keys, self.values = self.keys[rows], self.values[rows]

    def snapshot(self) -> None:
        """Nothing: slots past the restored length are written again before they are seen."""

    def restore(self, snapshot: object) -> None:
        """Nothing, for the same reason."""


class WKVState:
    """What RWKV's layer remembers: two vectors of the last token and three of all before, (B, D) each.

    Attributes:
        mixed: the last token's input of the time mix.
        channel: the last token's input of the channel mix.
        sums: the past of `layers/wkv.py`, (a, b, p), float32.
    """

    def __init__(self, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.mixed = torch.zeros(batch, width, dtype=dtype, device=device)
        self.channel = torch.zeros(batch, width, dtype=dtype, device=device)
        self.sums = Sums.empty(batch, width, device)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.mixed, self.channel = self.mixed[rows], self.channel[rows]
        self.sums = Sums(*(part[rows] for part in self.sums))

    def snapshot(self) -> object:
        """The vectors, which are replaced and never written to."""
        return self.mixed, self.channel, self.sums

    def restore(self, snapshot: object) -> None:
        """Take them back."""
        self.mixed, self.channel, self.sums = cast(tuple[Tensor, Tensor, Sums], snapshot)


@dataclass(frozen=True)
class Snapshot:
    """A point that a State can return to."""

    lengths: tuple[int, ...]
    layers: tuple[object, ...]


class State:
    """The decode state of a model for a batch of sequences.

    Args:
        config: the model's shape.
        batch_size: B.
        max_len: slots a row; the model's context unless given.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_len = max_len or config.max_seq_len
        shape = (batch_size, config.n_kv_heads, self.max_len, config.head_dim)
        device = torch.device(device)

        def memory() -> LayerState:
            if config.mixer == "wkv":
                return WKVState(batch_size, config.dim, dtype, device)
            return KVCache(shape, dtype, device)

        self.layers: list[LayerState] = [memory() for _ in range(config.n_layers)]
        self.lengths: list[int] = [0] * batch_size

    def span(self, count: int) -> Span:
        """The slots that `count` more tokens a row would take.

        Raises:
            ValueError: when they do not fit.
        """
        end = max(self.lengths) + count
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit a decode state of {self.max_len} slots")
        if min(self.lengths) == max(self.lengths):
            return Span(self.lengths[0], count, end)
        return Span(None, count, end, tuple(self.lengths))

    def advance(self, counts: Sequence[int]) -> None:
        """Count `counts[b]` more tokens of row b as read."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row named twice is copied."""
        self.lengths = [self.lengths[row] for row in rows]
        for layer in self.layers:
            layer.select(torch.tensor(rows))

    def snapshot(self) -> Snapshot:
        """A point to come back to, after a draft that was rejected or to continue one prompt twice."""
        return Snapshot(tuple(self.lengths), tuple(layer.snapshot() for layer in self.layers))

    def restore(self, snapshot: Snapshot) -> None:
        """Forget what was read after the snapshot."""
        self.lengths = list(snapshot.lengths)
        for layer, saved in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(saved)
