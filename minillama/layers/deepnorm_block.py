"""DeepNorm-style block (ChatGLM-6B): the residual branch is the norm's output, scaled up, not its input."""

from __future__ import annotations

import math

from torch import Tensor, nn

from minillama.layers.attention import AttentionInputs
from minillama.layers.cache import LayerState
from minillama.layers.dropout import dropout


class ScaledBlock(nn.Module):
    """Scaled residual block: n = norm(x); h = a n + attention(n); m = norm(h); y = a m + mlp(m), with a = sqrt(2 L).

    THUDM/ChatGLM-6B, modeling_chatglm.py.
    """

    def __init__(
        self,
        norms: tuple[nn.Module, nn.Module],
        attention: nn.Module,
        mlp: nn.Module,
        n_layers: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout, self.scale = dropout, math.sqrt(2 * n_layers)
        self.input_layernorm, self.post_attention_layernorm = norms
        self.self_attn, self.mlp = attention, mlp

    def forward(self, x: Tensor, inputs: AttentionInputs, state: LayerState | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D); see `Attention.forward` for the rest."""
        x = self.input_layernorm(x)
        x = x * self.scale + dropout(self.self_attn(x, inputs, state), self.dropout, self.training)
        x = self.post_attention_layernorm(x)
        return x * self.scale + dropout(self.mlp(x), self.dropout, self.training)
