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
from minillama.config.parameters import Parameter


@torch.no_grad()
def initialize(
    config: ModelConfig, parameters: Mapping[str, Tensor], generator: torch.Generator | None, mup: Mup | None = None
) -> None:
    """Initialize every parameter in place, by its role and the configuration's `init`, the normal one also by muP."""
    mup = mup or Mup()
    for name, row in config.parameters().items():
        tensor = parameters[name]
        if tensor.dim() == 1:
            tensor.fill_(0.0 if row.role == "bias" else 1.0)
        elif config.init == "rwkv":
            _rwkv_matrix(row, tensor, generator)
        elif config.init == "normal":
            scale = math.sqrt(2 * config.n_layers) if row.parallel == "row" else 1.0
            tensor.normal_(0.0, 0.02 / scale * mup.std(name), generator=generator)
        else:
            std = 1.0 if row.role in ("embedding", "position") else tensor.shape[1] ** -0.5
            tensor.normal_(0.0, std, generator=generator)
    if config.init == "rwkv":
        for layer in range(config.n_layers):
            _rwkv_vectors(config, parameters, layer)


def _rwkv_vectors(config: ModelConfig, parameters: Mapping[str, Tensor], layer: int) -> None:
    d, prefix = config.dim, f"model.layers.{layer}."
    fall, rise = 1 - layer / config.n_layers, layer / max(1, config.n_layers - 1)
    channel = torch.arange(d) / d
    values = {
        "self_attn.time_decay": -5 + 8 * (torch.arange(d) / max(1, d - 1)) ** (0.7 + 1.3 * rise),
        "self_attn.time_first": math.log(0.3) + 0.5 * ((torch.arange(d) + 1) % 3 - 1),
        "self_attn.time_mix_key": channel**fall,
        "self_attn.time_mix_value": channel**fall + 0.3 * rise,
        "self_attn.time_mix_receptance": channel ** (0.5 * fall),
        "mlp.time_mix_key": channel**fall,
        "mlp.time_mix_receptance": channel**fall,
    }
    for name, value in values.items():
        parameters[prefix + name].copy_(value)


def _rwkv_matrix(row: Parameter, matrix: Tensor, generator: torch.Generator | None) -> None:
    rows, columns = matrix.shape
    if row.role == "embedding":
        matrix.uniform_(-1e-4, 1e-4, generator=generator)
    elif row.role in ("value", "up", "head"):
        gain = math.sqrt(rows / columns) if rows > columns else 1.0
        nn.init.orthogonal_(matrix, 0.5 * gain if row.role == "head" else gain, generator=generator)
    else:
        matrix.zero_()
