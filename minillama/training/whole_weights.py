"""Whole plain weights of a decoder that processes have divided, gathered one at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from minillama.formats.model_file import LazyTensors
from minillama.inference.rollout import plain_weights
from minillama.layers.lora import Adapter
from minillama.model import Decoder
from minillama.model.lora import is_adapter, lora_layers
from minillama.training.sharded import is_sharded, whole


def whole_weights(model: Decoder) -> Mapping[str, Tensor]:
    """Weights by Hugging Face name, with the active adapter in them; of a divided model each is gathered as it is read.

    All processes that have parts must read the same weights in the same order.
    """
    tensors = model.state_dict()  # as they are at rest
    if not any(map(is_sharded, tensors.values())):
        return plain_weights(model)
    layers = {f"{name}.weight": name for name, layer in lora_layers(model).items() if layer.adapter is not None}

    def read(name: str) -> Tensor:
        weight = whole(tensors[name])
        return _merged(model, layers[name], weight, tensors) if name in layers else weight

    return LazyTensors([name for name in tensors if not is_adapter(name)], read)


def _merged(model: Decoder, site: str, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Whole weight of a layer with its active adapter, of which `tensors` has the parts."""
    layer = lora_layers(model)[site]
    prefix = f"{site}.adapters.{layer.active}."
    parts = {name.removeprefix(prefix): whole(part) for name, part in tensors.items() if name.startswith(prefix)}
    adapter = layer.adapter
    if not isinstance(adapter, Adapter):
        return parts["weight"].to(weight.dtype)
    made = Adapter(parts["lora_A"], parts["lora_B"], adapter.alpha, parts.get("magnitude"), adapter.use_rslora)
    is_embedding = isinstance(layer, nn.Embedding)
    merged = made.merged(weight.T if is_embedding else weight).detach().to(weight.dtype)
    return merged.T if is_embedding else merged
