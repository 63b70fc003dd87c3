"""Weight initialization.

`normal`, the default of LLaMA and similar models:

| parameter                        | distribution                          |
|----------------------------------|---------------------------------------|
| embeddings, lm_head              | normal, 0.02                          |
| q, k, v, gate, up                | normal, 0.02                          |
| o_proj, down_proj                | normal, 0.02 / sqrt(2 n_layers)       |
| every norm 1, every bias 0       |                                       |

The two scaled matrices write to the residual stream, 2 n_layers times in all, so that its variance does not grow
with depth (GPT-2, §2.3). Initial logits are small and the loss starts near ln V. Under muP each deviation is
multiplied by its factor (`config/mup.py`).

`fan-in` is PaLM's (arXiv 2204.02311, §5): linear layers normal, 1 / sqrt(fan in); the embedding normal, 1, so that
the tied output layer's logits have to be scaled by 1 / sqrt(D).

`rwkv` is RWKV-4's (RWKV-v4neo/src/model.py): decays and token shifts by channel and depth, matrices orthogonal or zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.config.mup import Mup

Parameters = Mapping[str, Tensor]
RESIDUAL = ("o_proj.weight", "down_proj.weight")
ZERO = ("self_attn.k_proj", "self_attn.r_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.r_proj")  # RWKV's


@torch.no_grad()
def initialize(
    config: ModelConfig, parameters: Parameters, generator: torch.Generator | None, mup: Mup | None = None
) -> None:
    """Initialize every parameter in place, by its name and the configuration's `init`, the normal one also by muP."""
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    if config.init == "normal":
        _normal(config, parameters, generator, mup or Mup())
    else:
        {"fan-in": _fan_in, "rwkv": _rwkv}[config.init](config, parameters, generator)


def _normal(config: ModelConfig, parameters: Parameters, generator: torch.Generator | None, mup: Mup) -> None:
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * config.n_layers) if name.endswith(RESIDUAL) else 0.02
            parameter.normal_(0.0, std * mup.std(name), generator=generator)


def _fan_in(config: ModelConfig, parameters: Parameters, generator: torch.Generator | None) -> None:
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            std = 1.0 if name.startswith("model.embed") else parameter.shape[1] ** -0.5
            parameter.normal_(0.0, std, generator=generator)


def _rwkv(config: ModelConfig, parameters: Parameters, generator: torch.Generator | None) -> None:
    d, n = config.dim, config.n_layers
    channel = torch.arange(d) / d
    for name, parameter in parameters.items():
        part = name.rpartition("layers.")[2]
        layer = int(part.split(".")[0]) if part != name else 0
        if parameter.dim() == 2:
            _rwkv_matrix(config, name, parameter, generator)
        elif name.endswith("time_decay"):
            rise = layer / max(1, n - 1)
            parameter.copy_(-5 + 8 * (torch.arange(d) / max(1, d - 1)) ** (0.7 + 1.3 * rise))
        elif name.endswith("time_first"):
            parameter.copy_(math.log(0.3) + 0.5 * ((torch.arange(d) + 1) % 3 - 1))
        elif "time_mix" in name:
            fall, rise = 1 - layer / n, layer / max(1, n - 1)
            mixes = {"self_attn.time_mix_value": channel**fall + 0.3 * rise}
            mixes["self_attn.time_mix_receptance"] = channel ** (0.5 * fall)
            own = next((mix for key, mix in mixes.items() if name.endswith(key)), channel**fall)
            parameter.copy_(own)


def _rwkv_matrix(config: ModelConfig, name: str, matrix: Tensor, generator: torch.Generator | None) -> None:
    rows, columns = matrix.shape
    if name.startswith("model.embed_tokens"):
        matrix.uniform_(-1e-4, 1e-4, generator=generator)
    elif any(zero in name for zero in ZERO):
        matrix.zero_()
    else:
        gain = math.sqrt(rows / columns) if rows > columns else 1.0
        nn.init.orthogonal_(matrix, 0.5 * gain if name.startswith("lm_head") else gain, generator=generator)
