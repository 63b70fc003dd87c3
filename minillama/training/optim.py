"""AdamW over named parameter groups, with its state kept by parameter name."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from minillama.training.config import OptimConfig

__all__ = ["load_optimizer_state", "make_optimizer", "optimizer_state", "parameter_groups"]


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """Split parameters by weight decay: matrices decay; norms, biases and (unless asked) embeddings do not.

    Returns:
        Groups with `params` as (name, Parameter) pairs and `weight_decay`. Every parameter is in exactly
        one of them, which is asserted.
    """
    named = list(model.named_parameters())
    tables = {name for name, p in named if p.dim() >= 2 and name.endswith("embed_tokens.weight")}
    decayed = [(n, p) for n, p in named if p.dim() >= 2 and (config.decay_embeddings or n not in tables)]
    kept_names = {name for name, _ in decayed}
    kept = [(n, p) for n, p in named if n not in kept_names]
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": config.weight_decay, "name": "decay"},
        {"params": kept, "weight_decay": 0.0, "name": "no_decay"},
    ]
    covered = [id(p) for _, p in decayed + kept]
    assert len(covered) == len(set(covered)), "a parameter is in two groups"
    assert sum(p.numel() for _, p in decayed + kept) == sum(p.numel() for p in model.parameters())
    return groups


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with the fused kernel."""
    return torch.optim.AdamW(
        parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def _named(optimizer: torch.optim.Optimizer) -> Iterable[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `PARAMETER/NAME`, for instance `model.norm.weight/exp_avg`."""
    return {
        f"{name}/{key}": value
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take back what `optimizer_state` gave. Parameters that had no state yet start without."""
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        state.setdefault(name, {})[part] = value
    for name, parameter in _named(optimizer):
        if name in state:
            optimizer.state[parameter] = {
                part: value.to(parameter.device) if value.dim() else value for part, value in state[name].items()
            }
