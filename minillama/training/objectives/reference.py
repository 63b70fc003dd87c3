"""Reference model: the start model, frozen. Of a model with an adapter, the same weights with the adapter as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import nn

from minillama.layers.lora import Adapter
from minillama.model import Decoder
from minillama.model.lora import DEFAULT, activate, active, adapter_names, adapters, attach

REFERENCE = "reference"  # companion, and name of the adapter


class Reference:
    """Reference model of a policy, made before the policy is trained.

    Without an adapter a copy of the policy; with a fresh one, the policy with its adapter switched off; with one that
    was trained before, the policy with a frozen copy of it.

    Args:
        policy: the start model; one with a trained adapter gets the copy beside it.

    Attributes:
        companions: for `Objective.companions`, by which a checkpoint knows another reference.
    """

    def __init__(self, policy: Decoder) -> None:
        self.companions: Mapping[str, nn.Module] = {}
        self.adapter: str | None = None
        if not adapter_names(policy):
            self.companions = {REFERENCE: copy.deepcopy(policy).eval().requires_grad_(False)}
            return
        parts = adapters(policy)
        if REFERENCE in adapter_names(policy):  # of an objective on other data
            self.adapter = REFERENCE
        elif any(
            isinstance(part, Adapter) and bool(part.lora_A.any() and part.lora_B.any()) for part in parts.values()
        ):
            attach(policy, copy.deepcopy(parts), REFERENCE, trains=False)
            activate(policy, DEFAULT)
            self.adapter = REFERENCE
            self.companions = {REFERENCE: nn.ModuleList(copy.deepcopy(part) for part in parts.values())}

    @contextmanager
    def of(self, policy: Decoder) -> Iterator[Decoder]:
        """The reference in a block, given the policy's working copy.

        Nothing in it has a gradient. The block does not say `no_grad`, for which some kernels of attention are others
        than in training: what a policy that is still the reference gives is then equal to the bit.
        """
        if not adapter_names(policy):
            yield cast(Decoder, self.companions[REFERENCE])
        else:
            with active(policy, self.adapter):
                yield policy
