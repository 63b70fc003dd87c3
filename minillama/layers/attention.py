"""Grouped-query attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from einops import rearrange
from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.layers.attend import attend, in_segments
from minillama.layers.cache import CacheRange, KVCache, LayerState
from minillama.layers.mask import KernelMask
from minillama.layers.rope import rotate


class AttentionInputs(NamedTuple):
    """Inputs that all layers of one forward pass share, beside the residual stream.

    Attributes:
        rope: cosines and sines of the tokens' positions; None for other position encodings.
        mask: attention mask.
        span: slots of the tokens in the decode state.
    """

    rope: tuple[Tensor, Tensor] | None
    mask: KernelMask
    span: CacheRange


class Attention(nn.Module):
    """Grouped-query attention o_proj(softmax(q k^T / sqrt(E) + mask) v), H/K consecutive query heads per K/V head.

    K = H is multi-head attention (Vaswani et al. 2017, arXiv 1706.03762, §3.2), K = 1 multi-query
    (Shazeer 2019, arXiv 1911.02150), between them grouped-query (Ainslie et al. 2023, arXiv 2305.13245).

    Attributes:
        kernel: function for softmax(q k^T / sqrt(E) + mask) v, with the signature of `attend`.
    """

    qkv_proj: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kernel: Callable[[Tensor, Tensor, Tensor, KernelMask], Tensor] = attend
        self.head_dim = config.head_dim
        width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.widths = (width, kv_width, kv_width)
        bias = config.bias != "none"
        self.q_proj = nn.Linear(config.dim, self.widths[0], bias=bias)
        self.k_proj = nn.Linear(config.dim, self.widths[1], bias=bias)
        self.v_proj = nn.Linear(config.dim, self.widths[2], bias=bias)
        self.o_proj = nn.Linear(self.widths[0], config.dim, bias=config.bias == "all")

    def forward(self, x: Tensor, inputs: AttentionInputs, state: LayerState | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); whatever replaces a block's `self_attn` is called so.

        Args:
            x: normalized residual stream.
            inputs: shared by all layers.
            state: this layer's KV cache, whose `append(k, v, inputs.span)` takes keys and values (B, K, T, E) of these
                tokens and returns those of all so far; None outside decoding.
        """
        q, k, v = self.heads(x, inputs.rope)
        if state is not None:
            k, v = cast(KVCache, state).append(k, v, inputs.span)
        return self.o_proj(in_segments(self.kernel, q, k, v, inputs.mask).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, E), keys and values (B, K, T, E) of (B, T, D), rotated by position."""
        if self.fused:
            return self._fused_heads(x, rope)
        parts = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (rearrange(part, "b t (h e) -> b h t e", e=self.head_dim) for part in parts)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        return q, k, v

    def _fused_heads(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """The same from one matrix product, queries and keys rotated together: fewer operations per decode step."""
        heads = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        count = [width // self.head_dim for width in self.widths]
        if rope is None:
            q, k, v = heads.split(count, dim=1)
            return q, k, v
        rotated, v = heads.split([count[0] + count[1], count[2]], dim=1)
        q, k = rotate(rotated, *rope).split(count[:2], dim=1)
        return q, k, v

    @property
    def fused(self) -> bool:
        """Whether the three input projections are one, see `model/linears.py`."""
        return hasattr(self, "qkv_proj")
