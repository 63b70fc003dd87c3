"""Parameter groups of AdamW, Muon or Adafactor, and optimizer state by parameter name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minillama.config.mup import Mup
from minillama.device import choose_dtype
from minillama.runs.parts import Stored
from minillama.runs.sections import OptimConfig
from minillama.training.optim.adafactor import Adafactor
from minillama.training.optim.muon import Muon
from minillama.training.sharded import fill, is_sharded


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
        return parameter.dim() >= 2 and (config.decay_embeddings or "embed_tokens." not in name)

    named = named_parameters(model)
    decayed, kept = [pair for pair in named if decays(*pair)], [pair for pair in named if not decays(*pair)]
    return [
        {"params": decayed, "weight_decay": config.weight_decay, "name": "decay"},
        {"params": kept, "weight_decay": 0.0, "name": "no_decay"},
    ]


def make_optimizers(
    model: nn.Module | Mapping[str, nn.Module],
    config: OptimConfig,
    mup: Mup | None = None,
    rates: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) with the fused kernel, alone or beside Muon; or Adafactor.

    With `muon_lr` the blocks' matrices are updated by Muon: momentum, orthogonalized by five
    Newton-Schulz iterations (`muon.py`), in bfloat16 where that is fast. Each group has `lr_scale`, its peak rate
    relative to `lr`, so that one schedule serves all. Under muP (`config/mup.py`) matrices are grouped by their factor
    of the learning rate; Muon's orthogonal updates need none but the queries'.

    Args:
        model: or several by name.
        config: rates and decay.
        mup: factors of the learning rate by width.
        rates: further factors, by the name of the model; as under muP, weight decay per step stays what it is.
    """
    mup = mup or Mup()

    def model_factor(name: str) -> float:
        return (rates or {}).get(name.partition("/")[0] if "/" in name else "model", 1.0)

    decayed, kept = parameter_groups(model, config)
    if config.optimizer == "adafactor":
        named = _grouped([*decayed["params"], *kept["params"]], model_factor)
        return [Adafactor([{"params": params, "lr_scale": f} for f, params in named], config.lr, config.beta1)]
    blocks = [(name, p) for name, p in decayed["params"] if config.muon_lr and ".layers." in name]
    if blocks:
        decayed["params"] = [(name, p) for name, p in decayed["params"] if ".layers." not in name]
    groups = _by_factor(decayed, lambda name: mup.learning_rate(name) * model_factor(name)) + _by_factor(
        kept, model_factor
    )
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    if not blocks:
        return [adamw]
    muon = {"params": blocks, "weight_decay": config.weight_decay, "name": "muon"}
    dtype = choose_dtype("auto", blocks[0][1].device)
    rate = config.muon_lr / config.lr
    muon_groups = _by_factor(muon, lambda name: mup.queries(name) * model_factor(name), rate)
    return [adamw, Muon(muon_groups, lr=config.muon_lr, dtype=dtype)]


def _by_factor(group: Mapping[str, Any], factor: Callable[[str], float], rate: float = 1.0) -> list[dict[str, Any]]:
    """Groups of equal factor of the learning rate; weight decay times learning rate is the same in all."""
    return [
        {**group, "params": params, "rate_factor": f, "lr_scale": rate * f, "weight_decay": group["weight_decay"] / f}
        for f, params in _grouped(group["params"], factor)
    ]


def _grouped(
    named: Iterable[tuple[str, nn.Parameter]], factor: Callable[[str], float]
) -> Iterable[tuple[float, list[tuple[str, nn.Parameter]]]]:
    """Named parameters by their factor of the learning rate."""
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named:
        groups.setdefault(factor(name), []).append((name, parameter))
    return groups.items()


def change_settings(optimizers: Iterable[torch.optim.Optimizer], config: OptimConfig) -> None:
    """Group settings of another stage; learning rates follow with every step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(optimizer, Muon):
                group["lr_scale"] = config.muon_lr / config.lr * group["rate_factor"]
            elif isinstance(optimizer, Adafactor):
                group["beta1"] = config.beta1
                continue
            else:
                group |= {"betas": (config.beta1, config.beta2), "eps": config.eps}
            if group.get("name") != "no_decay":
                group["weight_decay"] = config.weight_decay / group["rate_factor"]


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


def load_optimizer_state(
    optimizers: Iterable[torch.optim.Optimizer], tensors: Mapping[str, Tensor] | Mapping[str, Stored]
) -> None:
    """Restore what `optimizer_state` gave. Parameters that had no state yet start without."""
    for optimizer, name, parameter in _named(optimizers):
        is_fused = optimizer.defaults.get("fused")
        own = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.rpartition("/")[0] == name}
        for part, stored in own.items():
            if len(stored.shape) and is_sharded(parameter):
                optimizer.state[parameter][part] = torch.empty_like(parameter)
                fill(optimizer.state[parameter][part], stored)
                continue
            value = stored if isinstance(stored, Tensor) else stored.whole()
            # a step count stays on the CPU unless the fused kernel reads it
            optimizer.state[parameter][part] = value.to(parameter.device) if value.dim() or is_fused else value
