"""KV cache with per-row lengths, and recurrent state, for incremental decoding.

A `State` belongs to one batch of sequences. It has one object per layer (here keys and values) and counts,
once for all layers, the slots in use per row. Rows are left-aligned: row b's tokens lie in slots
0..lengths[b]-1, whatever the lengths of its neighbors, so that prompts of unequal length share a batch
without left padding. With sliding-window attention the oldest tokens can be evicted: a row's later tokens
move up, and `dropped[b]` is the difference between position and slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.config import ModelConfig
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
        length: tokens that a row may get.
    """

    start: int | None
    count: int
    end: int
    starts: tuple[int, ...] = ()
    dropped: tuple[int, ...] = ()
    length: int = 0

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


class LayerState:
    """Decode state of one layer.

    Attributes:
        tensors: all of it, the batch along the first axis.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may occur twice."""
        self.tensors = [tensor[rows] for tensor in self.tensors]

    def fork(self, rows: Tensor, length: int, slots: int) -> LayerState:
        """Another state with copies of these rows; of the first `length` slots, where there are any, among `slots`."""
        other = copy(self)
        other.tensors = [tensor[rows] for tensor in self.tensors]
        return other

    def replace(self, rows: Tensor, other: LayerState, length: int) -> None:
        """Overwrite these rows with all rows of `other`, a state of the same kind with `length` slots in use."""
        raise NotImplementedError

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """Evict a row's slots `start` to `end`; those up to `used` move up."""


class KVCache(LayerState):
    """KV cache of one layer: preallocated keys and values (B, K, S, E), written in place.

    In int8 they have one scale per token and head, s = max |x| / 127; `tensors` are keys, values and the scales of
    both, (B, K, S, 1) float32. A snapshot shares them: slots past the restored length are overwritten before they are
    attended to.

    Args:
        shape: (B, K, S, E).
        dtype: of the buffers.
        device: of the buffers.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__([torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)])
        if dtype == torch.int8:
            self.tensors += [torch.zeros(*shape[:-1], 1, device=device) for _ in range(2)]

    def append(self, keys: Tensor, values: Tensor, span: CacheRange) -> tuple[Tensor, Tensor]:
        """Write (B, K, T, E) keys and values at the span's slots; return all slots in use, in their dtype."""
        if len(self.tensors) == 2:
            k, v = self._write([keys, values], span)
            return k.to(keys.dtype), v.to(values.dtype)
        (k, k_scale), (v, v_scale) = int8_rows(keys), int8_rows(values)
        k, v, k_scale, v_scale = self._write([k, v, k_scale, v_scale], span)
        return (k.float() * k_scale).to(keys.dtype), (v.float() * v_scale).to(values.dtype)

    def _write(self, parts: Sequence[Tensor], span: CacheRange) -> list[Tensor]:
        """Write a part (B, K, T, ...) into each tensor; views of the slots in use."""
        for tensor, part in zip(self.tensors, parts, strict=True):
            if span.start is not None:
                tensor[:, :, span.start : span.end] = part
            else:
                slots = span.slots(part.device)
                rows = torch.arange(len(slots), device=part.device)[:, None]
                tensor[rows, :, slots] = part.transpose(1, 2).to(tensor.dtype)
        return [tensor[:, :, : span.end] for tensor in self.tensors]

    def fork(self, rows: Tensor, length: int, slots: int) -> LayerState:
        """See `LayerState.fork`."""
        other = copy(self)
        other.tensors = [
            tensor.new_empty(len(rows), tensor.shape[1], slots, tensor.shape[3]) for tensor in self.tensors
        ]
        for new, tensor in zip(other.tensors, self.tensors, strict=True):
            new[:, :, :length] = tensor[rows, :, :length]
            new[:, :, length:] = 0
        return other

    def replace(self, rows: Tensor, other: LayerState, length: int) -> None:
        """See `LayerState.replace`."""
        for tensor, new in zip(self.tensors, other.tensors, strict=True):
            tensor[rows, :, :length] = new[:, :, :length]

    def drop(self, row: int, start: int, end: int, used: int) -> None:
        """See `LayerState.drop`."""
        for tensor in self.tensors:
            tensor[row, :, start : start + used - end] = tensor[row, :, end:used].clone()


class WKVState(LayerState):
    """Recurrent state of an RWKV layer, five vectors (B, D); they are never written in place, and there are no slots.

    `tensors` are the last token's inputs of time mixing and of channel mixing, and the WKV state (a, b, p) of
    `layers/wkv.py`, float32.
    """

    def __init__(self, batch: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        mixed, channel = (torch.zeros(batch, width, dtype=dtype, device=device) for _ in range(2))
        super().__init__([mixed, channel, *Sums.empty(batch, width, device)])

    def replace(self, rows: Tensor, other: LayerState, length: int) -> None:
        """See `LayerState.replace`."""
        self.tensors = [old.index_copy(0, rows, new) for old, new in zip(self.tensors, other.tensors, strict=True)]

    def keep(self, rows: Tensor, snapshot: Sequence[Tensor]) -> None:
        """Return these rows, (B,) booleans, to earlier tensors."""
        pairs = zip(snapshot, self.tensors, strict=True)
        self.tensors = [torch.where(rows[:, None], old, new) for old, new in pairs]


class StateSnapshot(NamedTuple):
    """Snapshot of a `State`: its lengths, evicted tokens, and each layer's tensors."""

    lengths: list[int]
    dropped: list[int]
    layers: list[list[Tensor]]


class State:
    """Decode state of a batch of sequences: lengths and per-layer caches.

    Args:
        config: model configuration.
        batch_size: B.
        max_len: slots per row; default: the model's context length, with longrope the original one.
        dtype: compute dtype.
        device: of the buffers.
        cache_dtype: of stored keys and values: default `dtype`, a lower-precision float, or int8.

    Attributes:
        length: tokens that a row may get: the slots, unless it is set.
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
        self.length = self.max_len = max_len or config.short_context
        shape = (batch_size, config.n_kv_heads, self.max_len, config.head_dim)
        self.device = torch.device(device)
        self.layers: list[LayerState] = [
            WKVState(batch_size, config.dim, dtype, self.device)
            if config.mixer == "wkv"
            else KVCache(shape, cache_dtype or dtype, self.device)
            for _ in range(config.n_layers)
        ]
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
            return CacheRange(self.lengths[0], count, end, (), dropped, self.length)
        return CacheRange(None, count, end, tuple(self.lengths), dropped, self.length)

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

    def fork(self, rows: Sequence[int], more: int) -> State:
        """Another state with copies of these rows, in this order, and room for `more` tokens each."""
        other, length = copy(self), max(self.lengths[row] for row in rows)
        other.lengths, other.dropped = ([values[row] for row in rows] for values in (self.lengths, self.dropped))
        other.max_len, indices = length + more, torch.tensor(rows, device=self.device)
        other.layers = [layer.fork(indices, length, other.max_len) for layer in self.layers]
        return other

    def snapshot(self) -> StateSnapshot:
        """Snapshot for rollback, as for several continuations of one prompt."""
        return StateSnapshot([*self.lengths], [*self.dropped], [layer.tensors for layer in self.layers])

    def restore(self, snapshot: StateSnapshot) -> None:
        """Roll back to the snapshot.

        Raises:
            ValueError: `make_room` has evicted tokens since, which moved the others.
        """
        if self.dropped != snapshot.dropped:
            raise ValueError("tokens of the snapshot were evicted: it cannot be restored")
        self.lengths = [*snapshot.lengths]
        for layer, tensors in zip(self.layers, snapshot.layers, strict=True):
            layer.tensors = tensors

    def truncate(self, lengths: Sequence[int]) -> None:
        """Truncate row b to its first `lengths[b]` tokens; in a KV cache only the lengths change.

        Raises:
            ValueError: a recurrent state, which cannot be truncated, or `make_room` has evicted tokens.
        """
        if not all(isinstance(layer, KVCache) for layer in self.layers):
            raise ValueError("a recurrent state cannot be truncated")
        if any(self.dropped):
            raise ValueError("tokens were evicted: slots are no longer position ids")
        self.lengths = [min(used, length) for used, length in zip(self.lengths, lengths, strict=True)]
