"""Rotary position embedding in the half-split layout, with RoPE scaling for longer contexts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillama.config import ModelConfig, RopeScaling


def inverse_frequencies(head_dim: int, theta: float = 10000.0, scaling: RopeScaling | None = None) -> Tensor:
    """Inverse frequencies w_i = theta^(-2i/E), i in 0..E/2-1, in radians per position, with RoPE scaling.

    - `linear`: w / factor, the same as positions / factor (Chen et al. 2023, arXiv 2306.15595).
    - `ntk`: theta * factor^(E/(E-2)), so that the lowest frequency is divided by `factor` and the
      highest is unchanged.
    - `llama3`: pairs whose wavelength 2 pi / w is over original / low are divided by factor, those under
      original / high are kept, and between them s = (original / wavelength - low) / (high - low) blends
      the two (meta-llama/llama-models, models/llama3/model.py).
    - `longrope`: unchanged here, see `layers/long_rope.py`.

    Args:
        head_dim: E, even.
        theta: the base.
        scaling: RoPE scaling, or None.

    Returns:
        (E/2,) float32 on the CPU or on the device of the surrounding `torch.device` context.
    """
    if scaling is not None and scaling.kind == "ntk":
        theta = theta * scaling.factor ** (head_dim / (head_dim - 2))
    w = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None or scaling.kind in ("ntk", "longrope"):
        return w
    if scaling.kind == "linear":
        return w / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rotations = scaling.original_max_seq_len * w / (2 * math.pi)  # within the original context
    blend = ((rotations - low) / (high - low)).clamp(0, 1)
    return w * (blend + (1 - blend) / scaling.factor)


class Rope(nn.Module):
    """Rotary position embedding: cosines and sines of position ids. Su et al. 2021, arXiv 2104.09864, §3.4.

    No parameters: the frequencies follow from the configuration and are not saved.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        w = inverse_frequencies(config.rotary_width, config.rope_theta, config.rope_scaling)
        self.register_buffer("frequencies", w, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        """Move to another device, but keep the dtype: bfloat16 frequencies would be wrong."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != exact.dtype:
            self.frequencies = exact.to(self.frequencies.device)
        return self

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32, length: int = 0) -> tuple[Tensor, Tensor]:
        """Position ids (T,) or (B, T) -> cosines and sines, (T, E) or (B, 1, T, E).

        Angles are computed in float32: in bfloat16 positions beyond 256 would coincide.

        Args:
            positions: position ids.
            dtype: of the result.
            length: tokens that a sequence may get, for frequencies that depend on it.
        """
        return tables(positions[..., None].float() * self.frequencies, dtype)


class Rope2D(Rope):
    """2D rotary position embedding: half of the pairs for the position in the text, half for that in the masked span.

    ChatGLM-6B. Its heads hold the two halves side by side, each with its own pairs; `formats` permutes them
    to the pairs of `rotate`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.frequencies = inverse_frequencies(config.rotary_width // 2, config.rope_theta, config.rope_scaling)

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32, length: int = 0) -> tuple[Tensor, Tensor]:
        """Position ids (2, T) or (B, 2, T) -> cosines and sines, (T, E) or (B, 1, T, E)."""
        angles = positions[..., None].float() * self.frequencies  # (..., 2, T, E/4)
        return tables(torch.cat(angles.unbind(-3), dim=-1), dtype)


def tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angles, (T, E/2) or (B, T, E/2) -> (T, E) or (B, 1, T, E)."""
    angles = torch.cat((angles, angles), dim=-1)
    if angles.dim() == 3:
        angles = angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+R/2}) by its angle: x * cos + (-x2, x1) * sin.

    Args:
        x: queries or keys, (B, H, T, E).
        cos: (T, R) or (B, 1, T, R), from `Rope`; where R < E the last dimensions are not rotated.
        sin: the same shape.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-x2, x1), dim=-1) * sin
