"""RWKV-4 block: time mixing, a recurrence in place of attention, and channel mixing, a token-shifted MLP.

Peng et al. 2023, arXiv 2305.13048, §3; BlinkDL/RWKV-LM, RWKV-v4neo/src/model.py. Shapes: B batch, T time, D width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.layers.attention import AttentionInputs
from minillama.layers.cache import LayerState, WKVState
from minillama.layers.dropout import dropout
from minillama.layers.norm import make_norm
from minillama.layers.wkv import Sums, wkv_scan, wkv_step


class TimeMix(nn.Module):
    """Time mixing o_proj(sigmoid(r) * wkv(k, v)); k, v and r are linear layers of token-shifted x."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d = config.dim
        self.time_decay, self.time_first = nn.Parameter(torch.zeros(d)), nn.Parameter(torch.zeros(d))
        mix = (nn.Parameter(torch.full((d,), 0.5)) for _ in range(3))
        self.time_mix_key, self.time_mix_value, self.time_mix_receptance = mix
        self.k_proj, self.v_proj, self.r_proj, self.o_proj = (nn.Linear(d, d, bias=False) for _ in range(4))

    def forward(self, x: Tensor, before: Tensor, past: Sums, real: Tensor | None) -> tuple[Tensor, Sums]:
        """(B, T, D) -> (B, T, D), and the state after the last non-padding token.

        Args:
            x: normalized residual stream.
            before: the same, one token earlier.
            past: WKV state so far, (B, D).
            real: (B, 1) index of each row's last non-padding token; None for the last of all.
        """
        k = self.k_proj(torch.lerp(before, x, self.time_mix_key)).float()
        v = self.v_proj(torch.lerp(before, x, self.time_mix_value)).float()
        r = self.r_proj(torch.lerp(before, x, self.time_mix_receptance))
        w, u = self.time_decay.float().exp(), self.time_first.float()
        if x.shape[1] == 1:
            y, sums = wkv_step(k[:, 0], v[:, 0], w, u, past)
            y = y[:, None]
        else:
            y, every = wkv_scan(k, v, w, u, past)
            sums = Sums(*(_last(part, real) for part in every))
        return self.o_proj(torch.sigmoid(r) * y.to(x.dtype)), sums


class ChannelMix(nn.Module):
    """Channel mixing sigmoid(r_proj(mixed)) * down_proj(relu(up_proj(mixed))^2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f = config.dim, config.hidden_dim
        self.time_mix_key, self.time_mix_receptance = (nn.Parameter(torch.full((d,), 0.5)) for _ in range(2))
        self.up_proj, self.down_proj = nn.Linear(d, f, bias=False), nn.Linear(f, d, bias=False)
        self.r_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D); `before` is x one token earlier."""
        k = torch.square(torch.relu(self.up_proj(torch.lerp(before, x, self.time_mix_key))))
        r = self.r_proj(torch.lerp(before, x, self.time_mix_receptance))
        return torch.sigmoid(r) * self.down_proj(k)


class RecurrentBlock(nn.Module):
    """RWKV block y = x + time_mix(norm(x)); out = y + channel_mix(norm(y)). Its state is five vectors."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm, self.post_attention_layernorm = make_norm(config), make_norm(config)
        self.self_attn, self.mlp = TimeMix(config), ChannelMix(config)

    def forward(self, x: Tensor, inputs: AttentionInputs, state: LayerState | None = None) -> Tensor:
        """(B, T, D) -> (B, T, D).

        Args:
            x: residual stream.
            inputs: the mask's lengths, tokens per row without padding; it must be purely causal.
            state: recurrent state, updated.

        Raises:
            ValueError: a mask that is not purely causal; a recurrence depends on all of the past.
        """
        mask = inputs.mask
        if not mask.is_plain:
            raise ValueError("a recurrent layer depends on all of the past: only a purely causal mask is supported")
        past = cast(WKVState, state) if state is not None else WKVState(x.shape[0], x.shape[2], x.dtype, x.device)
        real = None
        if mask.lengths is not None and x.shape[1] > 1:
            real = (mask.lengths.to(x.device)[:, None] - 1).clamp(min=0)
        before = past.tensors
        mixed, channel, *sums = before
        normal = self.input_layernorm(x)
        change, sums = self.self_attn(normal, _token_shift(normal, mixed), Sums(*sums), real)
        mixed = _last(normal, real)
        x = x + dropout(change, self.dropout, self.training)
        normal = self.post_attention_layernorm(x)
        change = self.mlp(normal, _token_shift(normal, channel))
        past.tensors = [mixed, _last(normal, real), *sums]
        if mask.lengths is not None and not mask.lengths.all():  # rows of padding alone have read nothing
            past.keep(mask.lengths.to(x.device) == 0, before)
        return x + dropout(change, self.dropout, self.training)


def _token_shift(x: Tensor, last: Tensor) -> Tensor:
    """Token shift: x (B, T, D) delayed by one token, after `last` (B, D)."""
    return torch.cat((last[:, None].to(x.dtype), x[:, :-1]), dim=1)


def _last(x: Tensor, index: Tensor | None) -> Tensor:
    """Last token per row, (B, T, D) -> (B, D), or that at `index` (B, 1)."""
    if index is None:
        return x[:, -1]
    return x[torch.arange(len(x), device=x.device), index[:, 0]]
