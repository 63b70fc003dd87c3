"""Rollouts: several answers to each of many prompts, sampled together from weights that change in between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from minillama.inference.engine import Engine
from minillama.inference.load import attach_fast_step
from minillama.inference.request import Request
from minillama.inference.sampling import Sampling
from minillama.layers.lora import effective_weight
from minillama.model import Decoder
from minillama.model.linears import linears, refill
from minillama.model.lora import is_adapter, lora_layers

ROWS = 64  # answers that are decoded at once


class DecodingCopy:
    """Fused copy of a model that is trained, which decodes faster; adapters are merged in it.

    A model with quantized layers decodes itself.

    Args:
        source: the model; on its device.
        weights: of the model as it is, whole, by name.
        dtype: of the copy; the model's unless given.
    """

    def __init__(
        self,
        source: Decoder,
        weights: Callable[[Decoder], Mapping[str, Tensor]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source = self.model = source
        self.weights = weights or plain_weights
        if all(isinstance(layer, nn.Linear) for layer in linears(source).values()):
            dtype = dtype or source.dtype
            self.model = Decoder(source.config).to(source.device, dtype).requires_grad_(False)
            refill(self.model, self.weights(source))
            self.model.fuse().eval()
            attach_fast_step(self.model)

    def refresh(self) -> Decoder:
        """The model, with the weights that its source has now."""
        if self.model is not self.source:
            refill(self.model, self.weights(self.source))
            if hasattr(self.model.step, "refresh"):
                self.model.step.refresh()  # type: ignore[union-attr]
        return self.model


def plain_weights(model: Decoder) -> Mapping[str, Tensor]:
    """Weights by Hugging Face name, of float layers with the active adapter in them."""
    weights = {name: weight for name, weight in model.state_dict().items() if not is_adapter(name)}
    return weights | {f"{name}.weight": effective_weight(layer).detach() for name, layer in lora_layers(model).items()}


def answers(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    samples: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    seeds: Sequence[int],
    max_rows: int = ROWS,
) -> list[Request]:
    """Answers to prompts, `samples` to each, which read it once: those of a prompt stand together.

    Args:
        prompts: token ids.
        samples: answers per prompt.
        max_new_tokens: tokens per answer at most.
        stop_ids: tokens that end an answer, and are the last of it.
        seeds: of the prompts; sample i of one has its seed + i, so that no answer depends on the others.
        max_rows: answers that are decoded at once.
    """
    engine, found = Engine(model, max_rows, chunk=None), list[Request]()
    for prompt, seed in zip(prompts, seeds, strict=True):
        request = Request(prompt, max_new_tokens, sampling, seed, frozenset(stop_ids))
        found += engine.submit(request, samples)
    while engine.is_busy:
        engine.step()
    return found
