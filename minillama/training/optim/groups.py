"""Parameter groups of AdamW, Muon or Adafactor, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillama.device import choose_dtype
from minillama.runs.config import OptimConfig
from minillama.training.optim.adafactor import Adafactor
from minillama.training.optim.muon import Muon


def named_parameters(models: nn.Module | Mapping[str, nn.Module]) -> list[tuple[str, nn.Parameter]]:
    """Named parameters; those of models other than `model` as NAME/PARAMETER. Shared ones come once."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for key, model in models.items() if isinstance(models, Mapping) else [("model", models)]:
        for name, parameter in model.named_parameters():
            found.setdefault(id(parameter), (name if key == "model" else f"{key}/{name}", parameter))
    return list(found.values())


def parameter_groups(model: nn.Module | Mapping[str, nn.Module], config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups by weight decay: matrices decay; norms, biases and (unless asked) embeddings do not.

    Returns:
        Two groups with `params` as (name, Parameter) pairs and `weight_decay`.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.dim() >= 2 and (config.decay_embeddings or not name.endswith("embed_tokens.weight"))

    named = named_parameters(model)
    decayed, kept = [pair for pair in named if decays(*pair)], [pair for pair in named if not decays(*pair)]
    return [
        {"params": decayed, "weight_decay": config.weight_decay, "name": "decay"},
        {"params": kept, "weight_decay": 0.0, "name": "no_decay"},
    ]


def make_optimizers(model: nn.Module | Mapping[str, nn.Module], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with the fused kernel, alone or beside Muon; or Adafactor.

    With `muon_lr` the blocks' matrices are updated by Muon: momentum, orthogonalized by five
    Newton-Schulz iterations (`muon.py`), in bfloat16 where that is fast. Each group has `lr_scale`, its peak rate
    relative to `lr`, so that one schedule serves all.
    """
    decayed, kept = parameter_groups(model, config)
    if config.optimizer == "adafactor":
        named = [*decayed["params"], *kept["params"]]
        return [Adafactor([{"params": named, "lr_scale": 1.0}], config.lr, config.beta1)]
    blocks = [(name, p) for name, p in decayed["params"] if config.muon_lr and ".layers." in name]
    if blocks:
        decayed["params"] = [(name, p) for name, p in decayed["params"] if ".layers." not in name]
    groups = [group | {"lr_scale": 1.0} for group in (decayed, kept) if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    if not blocks:
        return [adamw]
    group = {"params": blocks, "lr_scale": config.muon_lr / config.lr}
    dtype = choose_dtype("auto", blocks[0][1].device)
    return [adamw, Muon([group], lr=config.muon_lr, weight_decay=config.weight_decay, dtype=dtype)]


def change_settings(optimizers: Iterable[torch.optim.Optimizer], config: OptimConfig) -> None:
    """Group settings of another stage; learning rates follow with every step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(optimizer, Muon):
                group["lr_scale"] = config.muon_lr / config.lr
            elif isinstance(optimizer, Adafactor):
                group["beta1"] = config.beta1
                continue
            else:
                group |= {"betas": (config.beta1, config.beta2), "eps": config.eps}
            if group.get("name") != "no_decay":
                group["weight_decay"] = config.weight_decay


def _named(optimizers: Iterable[torch.optim.Optimizer]) -> Iterable[tuple[torch.optim.Optimizer, str, Tensor]]:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield optimizer, name, parameter


def optimizer_state(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimizer state as `PARAMETER/NAME`, for instance `model.norm.weight/exp_avg`."""
    return {
        f"{name}/{key}": value
        for optimizer, name, parameter in _named(optimizers)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(optimizers: Iterable[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_state` gave. Parameters that had no state yet start without."""
    for optimizer, name, parameter in _named(optimizers):
        is_fused = optimizer.defaults.get("fused")
        own = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        for part, value in own.items():  # a step count stays on the CPU unless the fused kernel reads it
            optimizer.state[parameter][part] = value.to(parameter.device) if value.dim() or is_fused else value
