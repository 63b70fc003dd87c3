"""Linear layers of a model's blocks, by module and by Hugging Face name.

A file names every linear layer; in memory those of one input may be fused (`fuse`), their rows concatenated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from minillama.config.parameters import FUSED
from minillama.layers.int4 import Int4
from minillama.layers.quantized_linear import Int4Linear, Int8Linear
from minillama.model import Decoder


class Product(NamedTuple):
    """Linear layer of a block.

    Attributes:
        parent: parent module.
        name: its name there.
        names: Hugging Face names of its parts, without `.weight`; one unless fused.
    """

    parent: nn.Module
    name: str
    names: tuple[str, ...]

    @property
    def module(self) -> nn.Module:
        """The linear layer."""
        return cast(nn.Module, getattr(self.parent, self.name))

    def replace(self, module: nn.Module) -> None:
        """Replace the linear layer."""
        setattr(self.parent, self.name, module)


def products(model: Decoder) -> Iterator[Product]:
    """Linear layers of the blocks, in order."""
    for path, parent in list(model.named_modules()):
        if path.startswith("model.layers."):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear | Int4Linear | Int8Linear):
                    yield Product(parent, name, tuple(f"{path}.{part}" for part in FUSED.get(name, (name,))))


def int4_numbers(model: Decoder) -> dict[str, Int4]:
    """Int4 weights by Hugging Face name, those of fused layers split."""
    shapes = model.config.tensors()
    found: dict[str, Int4] = {}
    for product in products(model):
        if isinstance(product.module, Int4Linear):
            found |= {name: product.module.numbers.rows(*span) for name, span in _spans(product, shapes)}
    return found


def plain_tensors(model: Decoder) -> dict[str, Tensor]:
    """Parameters outside `int4_numbers` by Hugging Face name, int8 weights dequantized."""
    shapes = model.config.tensors()
    found = {name: tensor for name, tensor in model.state_dict().items() if name in shapes}
    for product in products(model):
        module = cast(Any, product.module)
        if not isinstance(module, Int4Linear):
            found |= {name: module.weight[start:end] for name, (start, end) in _spans(product, shapes)}
    return found if model.config.tie_embeddings else found | {"lm_head.weight": model.output_weight}


def _spans(product: Product, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and row range of each matrix of a linear layer."""
    end = 0
    for name in product.names:
        start, end = end, end + shapes[f"{name}.weight"][0]
        yield f"{name}.weight", (start, end)
