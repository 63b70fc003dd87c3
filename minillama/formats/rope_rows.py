"""RoPE row permutation between formats: half-split and interleaved pairs.

Hugging Face pairs row i of a head with row i + E/2 (half-split); Meta, llama2.c and GGUF pair rows 2i and
2i + 1 (interleaved). Only the query and key projections are affected.
"""

from __future__ import annotations

from einops import rearrange
from torch import Tensor

from minillama.config import ModelConfig


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Interleaved to half-split, Meta's order to Hugging Face's: rows 0, 2, 4, ..., 1, 3, 5, ... of every head.

    Args:
        weight: (heads * E, D).
        heads: H for queries, K for keys.
    """
    return rearrange(weight, "(h pair two) d -> (h two pair) d", h=heads, two=2)


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """Half-split to interleaved, the inverse of `to_half_split`."""
    return rearrange(weight, "(h two pair) d -> (h pair two) d", h=heads, two=2)


def rotary_heads(config: ModelConfig, name: str) -> int | None:
    """Number of heads by which the rows of a parameter are permuted; None for all but queries and keys."""
    return {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name.split(".")[-2])
