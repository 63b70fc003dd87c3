"""Attention mask: described once, converted to the form of the attention kernel in one place."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from minillama.layers.cache import CacheRange


class KernelMask(NamedTuple):
    """Attention mask of `scaled_dot_product_attention`: a flag where that suffices, else a boolean tensor."""

    allowed: Tensor | None
    is_causal: bool
    lengths: Tensor | None = None
    """(B,) tokens per row without padding, for recurrent layers."""
    is_plain: bool = True
    """Whether the mask is purely causal."""
    segments: tuple[int, ...] | None = None
    """Lengths of sequences one after the other, each of them causal; `in_segments` calls the kernel for each."""


@dataclass(frozen=True)
class Mask:
    """Attention mask of one forward pass; causal by default.

    A query at slot i attends to a key at slot j where every given condition holds.

    Args:
        causal: j <= i.
        prefix: (B,) prefix LM: every query attends to the first `prefix[b]` slots, to later ones causally.
        documents: (B, T) document ids of packed sequences; keys of another document are masked.
        segments: lengths of the sequences that one row (B = 1) holds one after the other, causal attention within each:
            what `documents` says, without a (T, T) mask and its masked products.
        lengths: (B,) tokens per row without right padding. A causal query never attends to padding, so the
            fused causal kernel stays in use; a decode state's lengths grow by it.
        window: sliding window of the last `window` slots, the query's own included.
        sinks: attention sinks: the first `sinks` slots stay visible in any window (Xiao et al. 2023, arXiv 2309.17453).
    """

    causal: bool = True
    prefix: Tensor | None = None
    documents: Tensor | None = None
    segments: tuple[int, ...] | None = None
    lengths: Tensor | None = None
    window: int | None = None
    sinks: int = 0

    def for_kernel(self, span: CacheRange, device: torch.device) -> KernelMask:
        """Attention mask for queries at `span`, as a flag or as (1 or B, 1, T, S) booleans.

        Raises:
            ValueError: document ids with a decode state, whose earlier ids are unknown; segments with another
                condition, or of another sum than the tokens.
        """
        if self.segments is not None:
            others = any(x is not None for x in (self.prefix, self.documents, self.lengths, self.window))
            if not self.causal or others or not sum(self.segments) == span.end == span.count:
                raise ValueError(
                    "segments are causal and hold all tokens of one row; no other condition goes with them"
                )
            return KernelMask(None, False, None, False, self.segments)
        if self.documents is not None and span.end != span.count:
            raise ValueError("document ids describe a whole forward pass; a decode state holds one document per row")
        bounded = self.window is not None and self.window < span.end
        plain = self.prefix is None and self.documents is None and not bounded
        is_causal = plain and self.causal and span.start == 0
        last = self.causal and span.start is not None and span.count == 1  # one query after all keys
        if is_causal or (plain and (last or (not self.causal and self.lengths is None))):
            return KernelMask(None, is_causal, self.lengths, self.is_plain)
        return KernelMask(self._allowed(span, device), False, self.lengths, self.is_plain)

    def within(self, window: int) -> Mask:
        """This mask within a model's sliding window; 0: it has none. The narrower window counts, with its sinks."""
        return self if not window or (self.window or window) < window else replace(self, window=window, sinks=0)

    @property
    def is_plain(self) -> bool:
        """Whether the mask is purely causal."""
        return self.causal and all(x is None for x in (self.prefix, self.documents, self.segments, self.window))

    def _allowed(self, span: CacheRange, device: torch.device) -> Tensor:
        queries = span.slots(device)[..., :, None]  # (T, 1) or (B, T, 1)
        keys = torch.arange(span.end, device=device)
        allowed = keys <= queries if self.causal else torch.ones_like(keys <= queries)
        if self.window is not None:
            allowed = allowed & ((keys > queries - self.window) | (keys < self.sinks))
        if self.prefix is not None:
            allowed = allowed | (keys < self.prefix.to(device)[:, None, None])
        if self.lengths is not None and (not self.causal or self.prefix is not None):
            first = queries[..., :1, :]  # the slot of each row's first token in this pass
            allowed = allowed & (keys < first + self.lengths.to(device)[:, None, None])
        if self.documents is not None:
            ids = self.documents.to(device)
            allowed = allowed & (ids[:, :, None] == ids[:, None, :])
        return allowed[None, None] if allowed.dim() == 2 else allowed[:, None]
