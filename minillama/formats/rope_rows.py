"""The one permutation between formats: the order of the rows that rotary positions pair up.

Hugging Face pairs row i of a head with row i + E/2 (half-split); Meta, llama2.c and GGUF pair rows 2i and
2i + 1 (interleaved). Only the query and key projections are affected.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from minillama.config import ModelConfig

__all__ = ["rotary_heads", "to_half_split", "to_interleaved"]


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of every head from 0, 1, 2, ... to 0, 2, 4, ..., 1, 3, 5, ...: Meta's order to Hugging Face's.

    Args:
        weight: (heads * E, D).
        heads: H for queries, K for keys.
    """
    return rearrange(weight, "(h pair two) d -> (h two pair) d", h=heads, two=2)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_half_split`."""
    return rearrange(weight, "(h two pair) d -> (h pair two) d", h=heads, two=2)


def rotary_heads(config: ModelConfig, name: str) -> int | None:
    """Heads by which the rows of a parameter are permuted; None for all but queries and keys."""
    return {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
