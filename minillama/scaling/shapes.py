"""Shapes that can be built for a parameter count, and their learning rate and batch size. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from minillama.config import ModelConfig

WIDEST = 2**16


def depth(dim: int) -> int:
    """Number of layers of a width: sqrt(D) / 2, from D = 4096 on D / 128.

    4 at 64, 8 at 256, 16 at 1024, 28 at 3072 (Llama 3.2 3B), 32 at 4096 (LLaMA 7B), 40 at 5120 (13B), 128 at 16384
    (Llama 3.1 405B has 126). The loss depends little on it: Kaplan et al. 2020 (arXiv 2001.08361, Fig. 5).
    """
    return max(2, round(math.sqrt(dim) / 2), round(dim / 128))


def head_width(dim: int) -> int:
    """Width of a head: 128 above D = 2048, 64 from 512, below 32, and 16 below 256."""
    return 128 if dim > 2048 else 64 if dim >= 512 else 32 if dim >= 256 else 16


def shape(dim: int, base: ModelConfig, head_dim: int = 0) -> ModelConfig:
    """Shape of a width by one rule: its depth, heads, and a feed-forward width of 8/3 D.

    Args:
        dim: D, a multiple of the head width.
        base: vocabulary, context and everything else.
        head_dim: E; by `head_width` unless given.
    """
    head, multiple = head_dim or head_width(dim), 256 if dim >= 1024 else 32
    hidden = multiple * math.ceil(8 * dim / 3 / multiple)
    heads = dim // head
    return replace(
        base, dim=dim, n_layers=depth(dim), n_heads=heads, n_kv_heads=heads, head_dim=head, hidden_dim=hidden, preset=""
    )


def shapes(base: ModelConfig, head_dim: int = 0) -> Iterator[ModelConfig]:
    """Every shape of the rule, by rising width, in steps of a head or a sixteenth of the power of two below."""
    dim = 0
    while dim < WIDEST:
        head = head_dim or head_width(dim + 1)
        dim += head * max(1, 2 ** max(0, dim.bit_length() - 5) // head)
        yield shape(dim, base, head_dim)


def size(config: ModelConfig) -> int:
    """N of the scaling laws: parameters with the head, without the embedding."""
    return config.num_params(embedding=False)


def nearest(params: float, base: ModelConfig, head_dim: int = 0) -> ModelConfig:
    """Shape of the rule whose `size` is nearest to N, in the logarithm."""
    return min(shapes(base, head_dim), key=lambda config: abs(math.log(size(config) / params)))


def learning_rate(flops: float) -> float:
    """Peak learning rate 0.3118 C^-0.1250 (DeepSeek LLM, arXiv 2401.02954, eq. 1; fitted for C of 1e17 to 2e19)."""
    return float(0.3118 * flops**-0.1250)


def batch_tokens(flops: float) -> float:
    """Tokens per step 0.2920 C^0.3271 (DeepSeek LLM, arXiv 2401.02954, eq. 1; fitted for C of 1e17 to 2e19)."""
    return float(0.2920 * flops**0.3271)
