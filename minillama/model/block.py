"""Blocks: LLaMA's, and the choice of a block and its layers by the configuration."""

from __future__ import annotations

from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.layers.attention import Attention, AttentionInputs
from minillama.layers.cache import LayerState
from minillama.layers.deepnorm_block import ScaledBlock
from minillama.layers.dropout import dropout
from minillama.layers.mlp import Gelu, SwiGLU
from minillama.layers.nope import NopeAttention
from minillama.layers.norm import make_norm
from minillama.layers.parallel_block import ParallelBlock
from minillama.layers.qk_norm import QKNormAttention
from minillama.layers.rwkv import RecurrentBlock


class Block(nn.Module):
    """y = x + attention(norm(x)); out = y + mlp(norm(y)). LLaMA, arXiv 2302.13971, §2.2."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0, layer: int = 0) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = make_norm(config)
        self.self_attn = make_attention(config, layer)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = make_mlp(config)

    def forward(self, x: Tensor, inputs: AttentionInputs, state: LayerState | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); see `Attention.forward` for the rest."""
        x = x + self._drop(self.self_attn(self.input_layernorm(x), inputs, state))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)


def make_attention(config: ModelConfig, layer: int) -> Attention:
    """The attention layer that the configuration asks for."""
    if config.nope_interval and (layer + 1) % config.nope_interval == 0:
        return NopeAttention(config)
    return QKNormAttention(config) if config.qk_norm else Attention(config)


def make_mlp(config: ModelConfig) -> nn.Module:
    """The feed-forward layer that the configuration asks for."""
    return SwiGLU(config) if config.mlp == "swiglu" else Gelu(config)


def make_block(config: ModelConfig, dropout: float, layer: int) -> nn.Module:
    """The block that the configuration asks for: LLaMA's, or a relative's."""
    if config.mixer == "wkv":
        return RecurrentBlock(config, dropout)
    if config.parallel_block:
        return ParallelBlock(make_norm(config), make_attention(config, layer), make_mlp(config), dropout)
    if config.residual == "norm":
        norms = make_norm(config), make_norm(config)
        return ScaledBlock(norms, make_attention(config, layer), make_mlp(config), config.n_layers, dropout)
    return Block(config, dropout, layer)
