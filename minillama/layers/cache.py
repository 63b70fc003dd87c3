"""What a layer remembers between forward passes while decoding.

A `State` belongs to one batch of sequences. It has one object per layer (here keys and values) and counts,
once for all layers, how many slots each row has in use. Rows are left-aligned: row b's tokens lie in slots
0..lengths[b]-1, whatever the lengths of its neighbors, so that prompts of unequal length share a batch
without padding in front. Where tokens see a window alone, the oldest ones can be dropped to make room: a row's
later tokens move up, and `dropped[b]` is what a slot lacks to a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.layers.quantized_linear import int8_rows
from minillama.layers.wkv import Sums

__all__ = ["CacheRange", "KVCache", "LayerState", "State", "StateSnapshot", "WKVState"]


@dataclass(frozen=True)
class CacheRange:
    """The slots that the tokens of one forward pass take.

    Args:
        start: the first slot, when it is the same in every row; else None.
        count: T, the number of tokens per row.
        end: the number of slots in use after this pass, over all rows.
        starts: the first slot of each row, when they differ.
        dropped: how many tokens of each row were dropped before; empty where none was.
    """

    start: int | None
    count: int
    end: int
    starts: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    def slots(self, device: torch.device) -> Tensor:
        """Slot of each token, (T,), or (B, T) where rows differ."""
        steps = torch.arange(self.count, device=device)
        if self.start is not None:
            return steps + self.start
        return torch.tensor(self.starts, device=device)[:, None] + steps

    def positions(self, device: torch.device) -> Tensor:
        """Place of each token in its text, (T,), or (B, T) where tokens were dropped or rows differ."""
        slots = self.slots(device)
        return slots + torch.tensor(self.dropped, device=device)[:, None] if self.dropped else slots


class LayerState(Protocol):
    """One layer's memory: keys and values, or what a recurrence remembers."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may be named twice."""

    def replace(self, rows: Tensor, other: Any, length: int) -> None:
        """Put all rows of `other`, a memory of the same kind of which `length` slots are in use, in place of these."""

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """Forget a row's slots `start` to `end`; those up to `used` move into their place."""

    def snapshot(self) -> object:
        """What `restore` needs to come back to this point."""

    def restore(self, snapshot: object) -> None:
        """Come back to the point of the snapshot."""


class Slots:
    """One tensor (B, K, S, E) of fixed size, written in place."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.stored = torch.zeros(tuple(shape), dtype=dtype, device=device)

    def write(self, x: Tensor, span: CacheRange) -> None:
        """Put (B, K, T, E) at the span's slots."""
        if span.start is not None:
            self.stored[:, :, span.start : span.end] = x
        else:
            slots = span.slots(x.device)
            rows = torch.arange(len(slots), device=x.device)[:, None]
            self.stored[rows, :, slots] = x.transpose(1, 2).to(self.stored.dtype)

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        """The slots up to `end`: a view where they lie in that type."""
        return self.stored[:, :, :end].to(dtype)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.stored = self.stored[rows]

    def replace(self, rows: Tensor, other: Slots, length: int) -> None:
        """Overwrite these rows with those of another."""
        self.stored[rows, :, :length] = other.stored[:, :, :length]

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """See `LayerState.drop`."""
        self.stored[row, :, start : start + used - end] = self.stored[row, :, end:used].clone()

    def tensors(self) -> list[Tensor]:
        """What is kept."""
        return [self.stored]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return sum(tensor.nbytes for tensor in self.tensors())


class Int8Slots(Slots):
    """Whole numbers of one byte with a scale for each head of each token, s = max |x| / 127."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        super().__init__(shape, torch.int8, device)
        self.scale = Slots((*shape[:-1], 1), torch.float32, device)

    def write(self, x: Tensor, span: CacheRange) -> None:
        """See `Slots.write`."""
        q, scale = int8_rows(x)
        super().write(q, span)
        self.scale.write(scale, span)

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        """The slots up to `end`, multiplied out."""
        return (super().read(end, torch.float32) * self.scale.read(end, torch.float32)).to(dtype)

    def select(self, rows: Tensor) -> None:
        """See `Slots.select`."""
        super().select(rows)
        self.scale.select(rows)

    def replace(self, rows: Tensor, other: Slots, length: int) -> None:
        """See `Slots.replace`."""
        super().replace(rows, other, length)
        self.scale.replace(rows, cast(Int8Slots, other).scale, length)

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """See `Slots.drop`."""
        super().drop(row, start, end, used)
        self.scale.drop(row, start, end, used)

    def tensors(self) -> list[Tensor]:
        """See `Slots.tensors`."""
        return [self.stored, *self.scale.tensors()]


class KVCache:
    """Keys and values of one layer.

    Args:
        shape: (B, K, S, E).
        dtype: of the memory; int8 is `Int8Slots`.
        device: where it lies.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        def slots() -> Slots:
            return Int8Slots(shape, device) if dtype == torch.int8 else Slots(shape, dtype, device)

        self.keys, self.values = slots(), slots()

    def tensors(self) -> list[Tensor]:
        """What is kept, keys before values."""
        return [tensor for part in (self.keys, self.values) for tensor in part.tensors()]

    def append(self, keys: Tensor, values: Tensor, span: CacheRange) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, E) keys and values at the span's slots; return all slots in use, in their type."""
        self.keys.write(keys, span)
        self.values.write(values, span)
        return self.keys.read(span.end, keys.dtype), self.values.read(span.end, values.dtype)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.keys.select(rows)
        self.values.select(rows)

    def replace(self, rows: Tensor, other: KVCache, length: int) -> None:
        """Overwrite these rows with those of another cache."""
        self.keys.replace(rows, other.keys, length)
        self.values.replace(rows, other.values, length)

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """See `LayerState.drop`."""
        self.keys.drop(row, start, end, used)
        self.values.drop(row, start, end, used)

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

    def replace(self, rows: Tensor, other: WKVState, length: int) -> None:
        """Take these rows from another memory."""
        self.mixed = self.mixed.index_copy(0, rows, other.mixed)
        self.channel = self.channel.index_copy(0, rows, other.channel)
        self.sums = Sums(*(a.index_copy(0, rows, b) for a, b in zip(self.sums, other.sums, strict=True)))

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """Nothing: there are no slots."""

    def snapshot(self) -> object:
        """The vectors, which are replaced and never written to."""
        return self.mixed, self.channel, self.sums

    def restore(self, snapshot: object) -> None:
        """Take them back."""
        self.mixed, self.channel, self.sums = cast(tuple[Tensor, Tensor, Sums], snapshot)


@dataclass(frozen=True)
class StateSnapshot:
    """A point that a State can return to."""

    lengths: tuple[int, ...]
    dropped: tuple[int, ...]
    layers: tuple[object, ...]


class State:
    """The decode state of a model for a batch of sequences.

    Args:
        config: the model's shape.
        batch_size: B.
        max_len: slots a row; the model's context unless given.
        dtype: that the model computes in.
        device: where the memory lies.
        cache_dtype: that keys and values are kept in: `dtype` unless given, a shorter float, or int8.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.max_len = max_len or config.max_seq_len
        shape = (batch_size, config.n_kv_heads, self.max_len, config.head_dim)
        self.device = torch.device(device)

        def memory() -> LayerState:
            if config.mixer == "wkv":
                return WKVState(batch_size, config.dim, dtype, self.device)
            return KVCache(shape, cache_dtype or dtype, self.device)

        self.layers: list[LayerState] = [memory() for _ in range(config.n_layers)]
        self.lengths: list[int] = [0] * batch_size  # slots in use
        self.dropped: list[int] = [0] * batch_size

    def span(self, count: int) -> CacheRange:
        """The slots that `count` more tokens per row would take.

        Raises:
            ValueError: when they do not fit.
        """
        end = max(self.lengths) + count
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit a decode state of {self.max_len} slots")
        dropped = tuple(self.dropped) if any(self.dropped) else ()
        if min(self.lengths) == max(self.lengths):
            return CacheRange(self.lengths[0], count, end, dropped=dropped)
        return CacheRange(None, count, end, tuple(self.lengths), dropped)

    def make_room(self, count: int, window: int, sinks: int) -> None:
        """Drop, of rows that have no room for `count` more tokens, what these do not see.

        The first `sinks` tokens stay, and the last `window` - 1. Keys stay turned to the positions that they had.
        """
        for row, used in enumerate(self.lengths):
            gone = used - sinks - window + 1
            if used + count <= self.max_len or gone <= 0:
                continue
            for layer in self.layers:
                layer.drop(row, sinks, sinks + gone, used)
            self.lengths[row] -= gone
            self.dropped[row] += gone

    def advance(self, counts: Sequence[int]) -> None:
        """Count `counts[b]` more tokens of row b as read."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row named twice is copied."""
        self.lengths = [self.lengths[row] for row in rows]
        self.dropped = [self.dropped[row] for row in rows]
        for layer in self.layers:
            layer.select(torch.tensor(rows))

    def replace(self, rows: Sequence[int], other: State) -> None:
        """Put the rows of another state in place of these, which have ended."""
        for row, length, dropped in zip(rows, other.lengths, other.dropped, strict=True):
            self.lengths[row], self.dropped[row] = length, dropped
        places = torch.tensor(rows, device=self.device)
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.replace(places, new, max(other.lengths))

    def snapshot(self) -> StateSnapshot:
        """A point to come back to, after a draft that was rejected or to continue one prompt twice."""
        kept = tuple(layer.snapshot() for layer in self.layers)
        return StateSnapshot(tuple(self.lengths), tuple(self.dropped), kept)

    def restore(self, snapshot: StateSnapshot) -> None:
        """Forget what was read after the snapshot.

        Raises:
            ValueError: `make_room` has dropped tokens meanwhile, which moved the others.
        """
        if tuple(self.dropped) != snapshot.dropped:
            raise ValueError("tokens that the snapshot had were dropped: there is no way back to it")
        self.lengths = list(snapshot.lengths)
        for layer, saved in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(saved)

    def truncate(self, length: int) -> None:
        """Forget what each row read after its first `length` tokens; of keys and values only the count goes back.

        Raises:
            InputError: a recurrent layer, whose past tokens cannot be taken apart.
            ValueError: `make_room` has dropped tokens.
        """
        if any(isinstance(layer, WKVState) for layer in self.layers):
            raise InputError(
                "a recurrent state cannot forget its last tokens; speculation needs a model with keys and values",
                fix="decode this model without speculation",
            )
        if any(self.dropped):
            raise ValueError("tokens were dropped: slots are no longer places in the text")
        self.lengths = [min(read, length) for read in self.lengths]
