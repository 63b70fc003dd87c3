"""Adapters of a model: added, made active, trained, merged. The base's weights are never written to."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from minillama.config.loader import check
from minillama.config.lora import EMBEDDING, LoRAConfig
from minillama.errors import InputError
from minillama.formats import peft
from minillama.formats.model_file import ModelFile
from minillama.layers.lora import KINDS, Adapter, FullWeight, LoRALayer
from minillama.model.decoder import Decoder
from minillama.model.linears import is_fused

DEFAULT = "default"


def add_lora(
    model: Decoder, config: LoRAConfig, name: str = DEFAULT, generator: torch.Generator | None = None
) -> Decoder:
    """Add a fresh adapter, which changes nothing yet, and make it active; all but adapters is frozen.

    Args:
        model: modified in place; its linear layers may be int8 or int4.
        config: rank, targets and the rest.
        name: of the adapter, beside others that the model has.
        generator: source of the random numbers; torch's global one unless given.

    Raises:
        InputError: a target that the model lacks or ties, a fused model, a name that is taken.
    """
    check(config, prefix="lora")
    made: dict[str, Adapter | FullWeight] = {}
    for site in config.sites(model.config):
        made[site] = Adapter.fresh(_site(model, site).matrix(), config, site == EMBEDDING, generator)
    for site in config.whole(model.config):
        made[site] = FullWeight(cast(Any, _site(model, site)).weight)
    return attach(model, made, name)


def attach(model: Decoder, adapters: Mapping[str, Adapter | FullWeight], name: str, trains: bool = True) -> Decoder:
    """Attach an adapter that exists and make it active; all but adapters is frozen.

    Args:
        model: modified in place.
        adapters: by the names of the layers.
        name: of the adapter.
        trains: whether its parameters require gradients.

    Raises:
        InputError: a fused model, a name that is taken or is none.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise InputError("not a name of an adapter", where="adapter", found=name, expected="letters, digits, - and _")
    if name in adapter_names(model):
        raise InputError("the model has an adapter of this name", where="adapter", found=name, fix="give another name")
    for parameter_name, parameter in model.named_parameters():
        if not is_adapter(parameter_name):
            parameter.requires_grad_(False)
    for site, adapter in adapters.items():
        layer = _site(model, site)
        model.set_submodule(site, layer)
        layer.adapters[name] = adapter.to(layer.matrix().device).requires_grad_(trains).train(layer.training)
    activate(model, name)
    return model


def _site(model: Decoder, name: str) -> LoRALayer:
    """Adapted layer of a name, or a new one on the tensors of the layer there."""
    if is_fused(model):
        raise InputError("a fused model takes no adapters", where=name, fix="add them before fuse()")
    layer = model.get_submodule(name)
    if isinstance(layer, LoRALayer):
        return layer
    if type(layer) not in KINDS:
        raise InputError("this layer takes no adapters", where=name, found=type(layer).__name__, expected="nn.Linear")
    return KINDS[type(layer)].from_base(layer)


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Name -> layer with adapters."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in lora_layers(model).values() for name in layer.adapters))


def adapters(model: nn.Module, name: str = DEFAULT) -> dict[str, Adapter | FullWeight]:
    """Layer name -> its part of an adapter.

    Raises:
        InputError: no adapter of this name.
    """
    _known(model, name)
    return {site: layer.part(name) for site, layer in lora_layers(model).items() if name in layer.adapters}


def lora_parameters(model: nn.Module, name: str = DEFAULT) -> dict[str, nn.Parameter]:
    """Parameters of an adapter, by their names in the model.

    Raises:
        InputError: no adapter of this name.
    """
    _known(model, name)
    return {key: value for key, value in model.named_parameters() if f".adapters.{name}." in key}


def is_adapter(parameter: str) -> bool:
    """Whether a parameter name is that of an adapter."""
    return ".adapters." in parameter


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """State dict without the adapters."""
    return {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}


def activate(model: Decoder, name: str | None) -> None:
    """Make one adapter the active one, or none: the model is its base then.

    Raises:
        InputError: no adapter of this name.
    """
    if name is not None:
        _known(model, name)
    model.step = None  # a snapshot of the model as it was
    for layer in lora_layers(model).values():
        layer.active = name


@contextmanager
def active(model: Decoder, name: str | None) -> Iterator[None]:
    """One adapter active in a block, or none, as for a reference model; what was active before is again after it.

    Raises:
        InputError: no adapter of this name.
    """
    before, step = {layer: layer.active for layer in lora_layers(model).values()}, model.step
    activate(model, name)
    try:
        yield
    finally:
        for layer, was in before.items():
            layer.active = was
        model.step = step


def _known(model: nn.Module, name: str) -> None:
    names = adapter_names(model)
    if name not in names:
        expected = ", ".join(names) or "a model with adapters"
        raise InputError("no adapter of this name", where="adapter", found=name, expected=expected)


@torch.no_grad()
def merge(model: Decoder) -> Decoder:
    """Merge the active adapter into new weights, computed in float32 and cast once, and drop all adapters.

    The tensors of the base stay as they are, for whoever shares them; quantized layers become float layers. There is no
    way back: keep a copy, or the adapter's file.
    """
    for name, layer in lora_layers(model).items():
        model.set_submodule(name, layer.merged().train(layer.training))
    model.step = None
    return model


def save_adapter(
    model: Decoder, folder: str | os.PathLike[str], name: str = DEFAULT, base: ModelFile | None = None
) -> None:
    """Write an adapter as PEFT's folder, with the fingerprint of its base.

    Args:
        model: the model with the adapter.
        folder: made if need be.
        name: of the adapter.
        base: the model that was opened, whose path is written; the model's own weights unless given.

    Raises:
        InputError: no adapter of this name, or one that PEFT cannot express; a quantized model without `base`.
    """
    parts, sha = adapters(model, name), peft.fingerprint(_base(model, base))
    peft.write(Path(folder), model.config, parts, "" if base is None else str(base.path), sha)


def load_adapter(
    model: Decoder,
    folder: str | os.PathLike[str],
    name: str = DEFAULT,
    base: ModelFile | None = None,
    trains: bool = False,
) -> Decoder:
    """Read an adapter from PEFT's folder, attach it and make it active.

    Args:
        model: modified in place, not fused.
        folder: of the adapter.
        name: that it gets in the model.
        base: the model that was opened, for the comparison with the adapter's; the model's own weights unless given.
        trains: whether its parameters require gradients.

    Raises:
        InputError: what `peft.read` and `attach` raise; an adapter of another base; a quantized model without `base`.
    """
    file = peft.read(Path(folder), model.config)
    if file.fingerprint is not None or file.copies:
        file.check_base(_base(model, base))
    if file.config.head != model.config.head:
        what, expected = (
            "the adapter is of a reward model, and this is none",
            "a model with scores (`heads.with_score`)",
        )
        raise InputError(what, where=folder, expected=expected)
    if file.config.vocab_size > model.config.vocab_size:
        model.resize_embeddings(file.config.vocab_size)  # the new rows are the adapter's
    return attach(model, file.adapters, name, trains)


def _base(model: Decoder, base: ModelFile | None) -> Mapping[str, Tensor]:
    """Parameters of the base by name."""
    if isinstance(base, str | os.PathLike):
        raise InputError("this is no model that was opened", where="base", found=base, fix="give base=open_model(path)")
    if base is not None:
        return base.tensors
    found = base_tensors(model)
    if set(found) != set(model.config.tensors()):
        what, fix = "the weights of a quantized model are not those of its base", "give base=open_model(path)"
        raise InputError(what, where="base", fix=fix)
    return found
