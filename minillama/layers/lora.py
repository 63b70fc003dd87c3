"""Low-rank adapters of linear layers and embeddings, over float, int8 or int4 weights that stay as they are.

An adapted layer is its base class with adapters beside the weight, whose parameters keep their names. Shapes: O
outputs, I inputs, r rank, V vocabulary, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.config.lora import LoRAConfig
from minillama.layers.dropout import dropout
from minillama.layers.quantized_linear import Int4Linear, Int8Linear


class Adapter(nn.Module):
    """Low-rank update W' = W + s B A of a weight W (O, I), with s = alpha / r or, rank-stabilized, alpha / sqrt(r).

    Hu et al. 2021, arXiv 2106.09685, §4.1; Kalajdzievski 2023, arXiv 2312.03732. With a magnitude m (DoRA; Liu et al.
    2024, arXiv 2402.09353, eq. 5) W' = m (W + s B A) / ||W + s B A||, norm and m per output, the norm without gradient
    (§4.3). The update is in float32 and is multiplied in the inputs' dtype.

    Args:
        lora_A: (r, I).
        lora_B: (O, r).
        alpha: see above.
        magnitude: m (O,); None without DoRA.
        use_rslora: rank-stabilized scale.
        dropout: probability for the inputs of A, while training.
    """

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        alpha: float,
        magnitude: Tensor | None = None,
        use_rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A.float()), nn.Parameter(lora_B.float())
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude.float())
        self.alpha, self.use_rslora, self.dropout = alpha, use_rslora, dropout
        self.fixed: Tensor | None
        self.register_buffer("fixed", None, persistent=False)

    @classmethod
    def fresh(
        cls, weight: Tensor, config: LoRAConfig, is_embedding: bool = False, generator: torch.Generator | None = None
    ) -> Self:
        """Adapter that changes nothing yet: A uniform within 1 / sqrt(I), B zero; of an embedding A zero, B normal.

        Args:
            weight: W (O, I); of an embedding its transpose (D, V).
            config: rank and the rest.
            is_embedding: see above.
            generator: source of the random numbers; torch's global one unless given.
        """
        outputs, inputs = weight.shape
        a, b = torch.zeros(config.rank, inputs), torch.zeros(outputs, config.rank)
        if is_embedding:
            b.normal_(generator=generator)
        else:
            a.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
        magnitude = weight.detach().float().norm(dim=1) if config.use_dora else None
        return cls(a, b, config.alpha, magnitude, config.use_rslora, config.dropout).to(weight.device)

    @property
    def rank(self) -> int:
        """Rank r."""
        return len(self.lora_A)

    @property
    def scale(self) -> float:
        """Scale s."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    def reduced(self, x: Tensor) -> Tensor:
        """Product s A x, (..., I) -> (..., r)."""
        return F.linear(dropout(x, self.dropout, self.training), self.lora_A.to(x.dtype)) * self.scale

    def rows(self, tokens: Tensor) -> Tensor:
        """Product s A onehot(token), (...) -> (..., r)."""
        return F.embedding(tokens, self.lora_A.T) * self.scale

    def added(self, y: Tensor, reduced: Tensor) -> Tensor:
        """Sum y + B reduced, (..., O), in one operation."""
        low = reduced.flatten(0, -2).to(y.dtype)
        return torch.addmm(y.flatten(0, -2), low, self.lora_B.T.to(y.dtype)).view_as(y)

    def gain(self, weight: Callable[[], Tensor]) -> Tensor:
        """DoRA's factor m / ||W + s B A||, (O,) float32; of a function that gives W."""
        if self.fixed is not None:
            return self.fixed
        with torch.no_grad():
            norm = (weight().float() + self.scale * (self.lora_B @ self.lora_A)).norm(dim=1)
        assert self.magnitude is not None
        return self.magnitude / norm.clamp_min(torch.finfo(torch.float32).tiny)

    def merged(self, weight: Tensor) -> Tensor:
        """W', float32."""
        changed = weight.float() + self.scale * (self.lora_B @ self.lora_A)
        return changed if self.magnitude is None else changed * self.gain(lambda: weight)[:, None]


class FullWeight(nn.Module):
    """Copy of a weight that is trained whole in the place of its base's, in float32.

    Args:
        weight: (V, D).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())


class LoRALayer(nn.Module):
    """Layer with adapters by name, one of them active or none.

    Attributes:
        adapters: by name; each an `Adapter` or a `FullWeight`.
        active: the name of the active one; one that the layer lacks, or None, leaves it as its base.
    """

    adapters: nn.ModuleDict
    active: str | None

    @classmethod
    def from_base(cls, base: nn.Module) -> Self:
        """Adapted layer on the tensors of a base layer, without adapters yet."""
        layer = cls.__new__(cls)
        containers = {key: copy.copy(value) for key, value in vars(base).items() if isinstance(value, dict | set)}
        vars(layer).update(vars(base) | containers)
        layer.adapters, layer.active = nn.ModuleDict(), None
        return layer

    @property
    def adapter(self) -> Adapter | FullWeight | None:
        """The active adapter."""
        return None if self.active is None or self.active not in self.adapters else self.part(self.active)

    def part(self, name: str) -> Adapter | FullWeight:
        """The adapter of a name."""
        return cast("Adapter | FullWeight", self.adapters[name])

    def matrix(self) -> Tensor:
        """W (O, I), dequantized; of an embedding its transpose (D, V)."""
        return cast(Any, self).weight

    def effective_weight(self) -> Tensor:
        """Weight with the active adapter, differentiable, in float32 where there is one."""
        adapter = self.adapter
        if isinstance(adapter, FullWeight):
            return adapter.weight
        return self.matrix() if adapter is None else adapter.merged(self.matrix())

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        adapter, bias = self.adapter, cast(Any, self).bias
        if isinstance(adapter, FullWeight):
            return F.linear(x, adapter.weight.to(x.dtype), bias)
        y: Tensor = super().forward(x)
        return y if adapter is None else self._adapted(adapter, y, adapter.reduced(x), bias)

    def _adapted(self, adapter: Adapter, y: Tensor, reduced: Tensor, bias: Tensor | None = None) -> Tensor:
        if adapter.magnitude is None:
            return adapter.added(y, reduced)
        gain = adapter.gain(self.matrix).to(y.dtype)
        if bias is None:
            return adapter.added(y, reduced) * gain
        return adapter.added(y - bias, reduced) * gain + bias

    @torch.no_grad()
    def fix_gains(self) -> None:
        """Compute DoRA's factors once and keep them, for decoding: later changes of the weights do not reach them."""
        for adapter in map(self.part, self.adapters):
            if isinstance(adapter, Adapter) and adapter.magnitude is not None:
                adapter.fixed = adapter.gain(self.matrix)

    def merged(self) -> nn.Module:
        """Plain float layer with the active adapter in its weight, computed in float32 and cast once."""
        base, weight = cast(Any, self), self.effective_weight().detach()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(self.matrix().dtype), requires_grad=False)
        linear.bias = base.bias
        return linear


class _LowRankProduct(torch.autograd.Function):
    """Product x (W + s B A)^T of a frozen W: one gradient of x, to which the update's is added in place.

    As separate products it takes a fifth more time than x W^T, like this a tenth.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        reduced = F.linear(x, a) * scale
        ctx.save_for_backward(x, weight, a, b, reduced)
        ctx.scale = scale
        return F.linear(x, weight).addmm_(reduced, b.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b, reduced = ctx.saved_tensors
        low = (grad @ b) * ctx.scale
        grad_x = (grad @ weight).addmm_(low, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, low.T @ x, grad.T @ reduced, None


class LoRALinear(LoRALayer, nn.Linear):
    """Linear layer with adapters."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        adapter = self.adapter
        if not isinstance(adapter, Adapter) or adapter.magnitude is not None or cast(Any, self).bias is not None:
            return super().forward(x)
        others = self.weight.requires_grad or (adapter.training and adapter.dropout > 0)
        if others or not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        factors = (factor.to(x.dtype) for factor in (adapter.lora_A, adapter.lora_B))
        y: Tensor = _LowRankProduct.apply(x.flatten(0, -2), self.weight, *factors, adapter.scale)
        return y.view(*x.shape[:-1], self.out_features)


class LoRAInt8Linear(LoRALayer, Int8Linear):
    """Int8 linear layer with adapters."""


class LoRAInt4Linear(LoRALayer, Int4Linear):
    """Int4 linear layer with adapters."""


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """Embedding with adapters."""

    def matrix(self) -> Tensor:
        """W^T (D, V)."""
        return self.weight.T

    def effective_weight(self) -> Tensor:
        """Weight (V, D) with the active adapter, differentiable, in float32 where there is one."""
        weight = super().effective_weight()
        return weight if isinstance(self.adapter, FullWeight) else weight.T

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (..., D)."""
        adapter = self.adapter
        if isinstance(adapter, FullWeight):
            return F.embedding(x, adapter.weight).to(self.weight.dtype)
        y = nn.Embedding.forward(self, x)
        return y if adapter is None else self._adapted(adapter, y, adapter.rows(x))

    def merged(self) -> nn.Module:
        """Plain embedding with the active adapter in its weight, computed in float32 and cast once."""
        weight = self.effective_weight().detach()
        return nn.Embedding.from_pretrained(weight.to(self.weight.dtype).contiguous())


KINDS: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    Int8Linear: LoRAInt8Linear,
    Int4Linear: LoRAInt4Linear,
    nn.Embedding: LoRAEmbedding,
}


def effective_weight(layer: nn.Module) -> Tensor:
    """Weight of a linear layer with its active adapter, if it has one."""
    weight: Tensor = cast(Any, layer).weight
    return layer.effective_weight().to(weight.dtype) if isinstance(layer, LoRALayer) else weight
