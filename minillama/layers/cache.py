"""KV cache with per-row lengths, and recurrent state, for incremental decoding.

A `State` belongs to one batch of sequences. It has one object per layer (here keys and values) and counts,
once for all layers, the slots in use per row. Rows are left-aligned: row b's tokens lie in slots
0..lengths[b]-1, whatever the lengths of its neighbors, so that prompts of unequal length share a batch
without left padding. With sliding-window attention the oldest tokens can be evicted: a row's later tokens
move up, and `dropped[b]` is the difference between position and slot.
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


@dataclass(frozen=True)
class CacheRange:
    """Slot range of the tokens of one forward pass.

    Args:
        start: first slot, if it is the same in every row; else None.
        count: T, the number of tokens per row.
        end: slots in use after this pass, the maximum over rows.
        starts: first slot per row, if they differ.
        dropped: tokens evicted before, per row; empty if none.
    """

    start: int | None
    count: int
    end: int
    starts: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()

    def slots(self, device: torch.device) -> Tensor:
        """Slot per token, (T,), or (B, T) where rows differ."""
        steps = torch.arange(self.count, device=device)
        if self.start is not None:
            return steps + self.start
        return torch.tensor(self.starts, device=device)[:, None] + steps

    def positions(self, device: torch.device) -> Tensor:
        """Position ids (T,), or (B, T) where tokens were evicted or rows differ."""
        slots = self.slots(device)
        return slots + torch.tensor(self.dropped, device=device)[:, None] if self.dropped else slots


class LayerState(Protocol):
    """Decode state of one layer: KV cache or recurrent state."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may occur twice."""

    def replace(self, rows: Tensor, other: Any, length: int) -> None:
        """Overwrite these rows with all rows of `other`, a state of the same kind with `length` slots in use."""

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """Evict a row's slots `start` to `end`; those up to `used` move up."""

    def snapshot(self) -> object:
        """Snapshot for `restore`."""

    def restore(self, snapshot: object) -> None:
        """Return to the snapshot."""


class Slots:
    """Preallocated buffer (B, K, S, E), written in place."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.stored = torch.zeros(tuple(shape), dtype=dtype, device=device)

    def write(self, x: Tensor, span: CacheRange) -> None:
        """Write (B, K, T, E) at the span's slots."""
        if span.start is not None:
            self.stored[:, :, span.start : span.end] = x
        else:
            slots = span.slots(x.device)
            rows = torch.arange(len(slots), device=x.device)[:, None]
            self.stored[rows, :, slots] = x.transpose(1, 2).to(self.stored.dtype)

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        """The slots up to `end`: a view if stored in that dtype."""
        return self.stored[:, :, :end].to(dtype)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order."""
        self.stored = self.stored[rows]

    def replace(self, rows: Tensor, other: Slots, length: int) -> None:
        """Overwrite these rows with those of another buffer."""
        self.stored[rows, :, :length] = other.stored[:, :, :length]

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """See `LayerState.drop`."""
        self.stored[row, :, start : start + used - end] = self.stored[row, :, end:used].clone()

    def tensors(self) -> list[Tensor]:
        """Stored tensors."""
        return [self.stored]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors())


class Int8Slots(Slots):
    """Int8 buffer with one scale per token and head, s = max |x| / 127."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        super().__init__(shape, torch.int8, device)
        self.scale = Slots((*shape[:-1], 1), torch.float32, device)

    def write(self, x: Tensor, span: CacheRange) -> None:
        """See `Slots.write`."""
        q, scale = int8_rows(x)
        super().write(q, span)
        self.scale.write(scale, span)

    def read(self, end: int, dtype: torch.dtype) -> Tensor:
        """The slots up to `end`, dequantized."""
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
    """KV cache of one layer.

    Args:
        shape: (B, K, S, E).
        dtype: of the buffers; int8 is `Int8Slots`.
        device: of the buffers.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        def slots() -> Slots:
            return Int8Slots(shape, device) if dtype == torch.int8 else Slots(shape, dtype, device)

        self.keys, self.values = slots(), slots()

    def tensors(self) -> list[Tensor]:
        """Stored tensors, keys before values."""
        return [tensor for part in (self.keys, self.values) for tensor in part.tensors()]

    def append(self, keys: Tensor, values: Tensor, span: CacheRange) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, E) keys and values at the span's slots; return all slots in use, in their dtype."""
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
        """None: slots past the restored length are overwritten before they are attended to."""

    def restore(self, snapshot: object) -> None:
        """No-op, for the same reason."""


class WKVState:
    """Recurrent state of an RWKV layer: two vectors of the last token and three of all before, (B, D) each.

    Attributes:
        mixed: the last token's input of time mixing.
        channel: the last token's input of channel mixing.
        sums: WKV state (a, b, p) of `layers/wkv.py`, float32.
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
        """Overwrite these rows with those of another state."""
        self.mixed = self.mixed.index_copy(0, rows, other.mixed)
        self.channel = self.channel.index_copy(0, rows, other.channel)
        self.sums = Sums(*(a.index_copy(0, rows, b) for a, b in zip(self.sums, other.sums, strict=True)))

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """No-op: there are no slots."""

    def keep(self, rows: Tensor, snapshot: object) -> None:
        """Return these rows, (B,) booleans, to the snapshot."""
        mixed, channel, sums = cast(tuple[Tensor, Tensor, Sums], snapshot)
        chosen = rows[:, None]
        self.mixed, self.channel = torch.where(chosen, mixed, self.mixed), torch.where(chosen, channel, self.channel)
        self.sums = Sums(*(torch.where(chosen, old, new) for old, new in zip(sums, self.sums, strict=True)))

    def snapshot(self) -> object:
        """The vectors, which are never written in place."""
        return self.mixed, self.channel, self.sums

    def restore(self, snapshot: object) -> None:
        """Return to the snapshot."""
        self.mixed, self.channel, self.sums = cast(tuple[Tensor, Tensor, Sums], snapshot)


@dataclass(frozen=True)
class StateSnapshot:
    """Snapshot of a `State`."""

    lengths: tuple[int, ...]
    dropped: tuple[int, ...]
    layers: tuple[object, ...]


class State:
    """Decode state of a batch of sequences: lengths and per-layer caches.

    Args:
        config: model configuration.
        batch_size: B.
        max_len: slots per row; default: the model's context length.
        dtype: compute dtype.
        device: of the buffers.
        cache_dtype: of stored keys and values: default `dtype`, a lower-precision float, or int8.
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

        def layer_state() -> LayerState:
            if config.mixer == "wkv":
                return WKVState(batch_size, config.dim, dtype, self.device)
            return KVCache(shape, cache_dtype or dtype, self.device)

        self.layers: list[LayerState] = [layer_state() for _ in range(config.n_layers)]
        self.lengths: list[int] = [0] * batch_size  # slots in use
        self.dropped: list[int] = [0] * batch_size

    def span(self, count: int) -> CacheRange:
        """Slot range of `count` more tokens per row.

        Raises:
            ValueError: they do not fit.
        """
        end = max(self.lengths) + count
        if end > self.max_len:
            raise ValueError(f"{end} tokens do not fit a decode state of {self.max_len} slots")
        dropped = tuple(self.dropped) if any(self.dropped) else ()
        if min(self.lengths) == max(self.lengths):
            return CacheRange(self.lengths[0], count, end, dropped=dropped)
        return CacheRange(None, count, end, tuple(self.lengths), dropped)

    def make_room(self, count: int, window: int, sinks: int) -> None:
        """Evict tokens outside the attention window from rows without room for `count` more tokens.

        The first `sinks` tokens (attention sinks) and the last `window` - 1 stay. Keys keep their rotation.
        """
        for row, used in enumerate(self.lengths):
            evicted = used - sinks - window + 1
            if used + count <= self.max_len or evicted <= 0:
                continue
            for layer in self.layers:
                layer.drop(row, sinks, sinks + evicted, used)
            self.lengths[row] -= evicted
            self.dropped[row] += evicted

    def advance(self, counts: Sequence[int]) -> None:
        """Increase the length of row b by `counts[b]` tokens."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a repeated row is copied."""
        self.lengths = [self.lengths[row] for row in rows]
        self.dropped = [self.dropped[row] for row in rows]
        for layer in self.layers:
            layer.select(torch.tensor(rows))

    def replace(self, rows: Sequence[int], other: State) -> None:
        """Overwrite these rows, of finished sequences, with those of another state."""
        for row, length, dropped in zip(rows, other.lengths, other.dropped, strict=True):
            self.lengths[row], self.dropped[row] = length, dropped
        indices = torch.tensor(rows, device=self.device)
        for layer, new in zip(self.layers, other.layers, strict=True):
            layer.replace(indices, new, max(other.lengths))

    def snapshot(self) -> StateSnapshot:
        """Snapshot for rollback after a rejected draft, or for several continuations of one prompt."""
        kept = tuple(layer.snapshot() for layer in self.layers)
        return StateSnapshot(tuple(self.lengths), tuple(self.dropped), kept)

    def restore(self, snapshot: StateSnapshot) -> None:
        """Roll back to the snapshot.

        Raises:
            ValueError: `make_room` has evicted tokens since, which moved the others.
        """
        if tuple(self.dropped) != snapshot.dropped:
            raise ValueError("tokens of the snapshot were evicted: it cannot be restored")
        self.lengths = list(snapshot.lengths)
        for layer, saved in zip(self.layers, snapshot.layers, strict=True):
            layer.restore(saved)

    def truncate(self, length: int) -> None:
        """Truncate each row to its first `length` tokens; in a KV cache only the lengths change.

        Raises:
            InputError: a recurrent state, which cannot be truncated.
            ValueError: `make_room` has evicted tokens.
        """
        if any(isinstance(layer, WKVState) for layer in self.layers):
            raise InputError(
                "a recurrent state cannot be truncated; speculative decoding needs a model with a KV cache",
                fix="decode this model without speculation",
            )
        if any(self.dropped):
            raise ValueError("tokens were evicted: slots are no longer position ids")
        self.lengths = [min(used, length) for used in self.lengths]
