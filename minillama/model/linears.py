"""Linear layers of a model's blocks by name: the sites of fusing, quantization, calibration and adapters.

A name is that of the weight without `.weight`, `model.layers.0.self_attn.q_proj`. Linear layers of one input may be
fused in memory (`fuse`), their rows concatenated; the fused one keeps the names of its parts (`parts`). A layer is
replaced by name with `model.set_submodule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from minillama.config.parameters import FUSED
from minillama.errors import InputError
from minillama.layers.fused_linear import fused_linear
from minillama.layers.lora import LoRALayer
from minillama.layers.quantized_linear import Int4Linear, Int8Linear

BLOCKS = "model.layers."


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, float or quantized, of the blocks in order."""
    kinds = (nn.Linear, Int8Linear, Int4Linear)
    return {name: part for name, part in model.named_modules() if name.startswith(BLOCKS) and isinstance(part, kinds)}


def parts(name: str) -> tuple[str, ...]:
    """Names of the parts of a fused linear layer; of another its own."""
    path, _, last = name.rpartition(".")
    return tuple(f"{path}.{part}".removeprefix(".") for part in FUSED.get(last, (last,)))


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` has been called."""
    return any(len(parts(name)) > 1 for name in linears(model))


def fuse(model: nn.Module) -> None:
    """Fuse the linear layers of one input, for decoding; irreversible."""
    for name in list(linears(model)):  # names alone, so that the parts are freed one by one
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        for fused, members in FUSED.items():
            if last == members[0] and all(hasattr(parent, member) for member in members):
                parent.add_module(fused, fused_linear(*(cast(nn.Linear, getattr(parent, part)) for part in members)))
                for member in members:
                    delattr(parent, member)


@torch.no_grad()
def refill(fused: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a fused model other weights, in place.

    Args:
        fused: of float linear layers.
        weights: of the same model, not fused, by name.
    """
    for name, parameter in fused.named_parameters():
        layer, _, kind = name.rpartition(".")
        values = [weights[f"{part}.{kind}"] for part in parts(layer)]
        for target, value in zip(parameter.split(list(map(len, values))), values, strict=True):
            target.copy_(value)


def refuse_others(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    verb: str,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
) -> None:
    """Refuse adapters, linear layers that are more than weight and bias, and those within them.

    Args:
        model: whose blocks are looked through.
        shapes: of its parameters, by name.
        verb: what cannot be done to it, for the message.
        kinds: exact types that are accepted.

    Raises:
        InputError: an adapter anywhere; a layer of another type, or one without a name in `shapes`.
    """
    fix, modules = "merge adapters into their layers first", dict(model.named_modules())
    for name, layer in modules.items():
        if isinstance(layer, LoRALayer):
            raise InputError(f"this layer cannot be {verb}", where=name, found=", ".join(layer.adapters), fix=fix)
    found = {part: (name, layer) for name, layer in linears(model).items() for part in parts(name)}
    wanted = {name.removesuffix(".weight") for name, shape in shapes.items() if _is_linear(name, shape)}
    for part in [*found, *sorted(wanted - set(found))]:
        name, linear = found[part] if part in found else (part, modules.get(part))
        if part not in wanted or type(linear) not in kinds:
            kind = type(linear).__name__ if part in wanted else "a layer within a layer"
            raise InputError(f"this layer cannot be {verb}", where=name, found=kind, expected="nn.Linear", fix=fix)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith(BLOCKS) and name.endswith(".weight") and len(shape) == 2
