"""Maximal update parametrization (muP): one learning rate for every width. No torch.

Yang et al. 2022, arXiv 2203.03466, Table 3, for Adam. With width multiplier m = D / base D and head multiplier
h = E / base E, factors of the standard initialization and of the learning rate:

| parameter                    | standard deviation | learning rate |
|------------------------------|--------------------|---------------|
| embeddings, norms, biases    | 1                  | 1             |
| matrices of the blocks       | m^-1/2             | m^-1          |
| lm_head                      | m^-1               | m^-1          |
| q_proj, both factors times   | h^-1/2             | h^-1/2        |

The last line is attention with scores divided by E where the standard has sqrt(E): queries smaller by sqrt(h), which
Adam keeps smaller with a rate smaller by as much. So the forward pass is the standard one, and the model is exported
as any other. Decoupled weight decay is multiplied by m, so that its product with the learning rate is the same for
every width. Depth, batch and duration are not covered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minillama.config.model import ModelConfig
from minillama.errors import InputError


@dataclass(frozen=True)
class Mup:
    """Factors by parameter name; all 1 in the standard parametrization.

    Args:
        width: m, the model's width over the base model's.
        head: h, the width of its heads over that of the base model's.
    """

    width: float = 1.0
    head: float = 1.0

    def std(self, name: str) -> float:
        """Factor of the initial standard deviation."""
        if ".layers." in name:
            return self.width**-0.5 * self.queries(name)
        return 1 / self.width if name.endswith("lm_head.weight") else 1.0

    def learning_rate(self, name: str) -> float:
        """Factor of Adam's learning rate of a matrix."""
        is_input = name.rpartition("/")[2].startswith("model.embed")
        return 1.0 if is_input else self.queries(name) / self.width

    def queries(self, name: str) -> float:
        """Factor of the query projection alone, and of its learning rate under Muon."""
        return self.head**-0.5 if name.endswith("q_proj.weight") else 1.0


def check_mup(base: int, optimizer: str, model: ModelConfig) -> None:
    """Check that there is a rule for all parts of a model.

    Args:
        base: width of the base model; 0 in the standard parametrization, which has rules for everything.
        optimizer: its name; Adafactor's updates are relative to the parameter.
        model: the shape.

    Raises:
        InputError: another optimizer, initialization or mixer, or a tied head whose scale does not make up for it.
    """
    if not base:
        return
    excluded = {
        "optim.optimizer": (optimizer, "adamw"),
        "model.init": (model.init, "normal"),
        "model.mixer": (model.mixer, "attention"),
    }
    for where, (found, expected) in excluded.items():
        if found != expected:
            raise InputError("muP has no rule for this", where=where, found=found, expected=expected)
    if model.tie_embeddings and not math.isclose(model.logit_scale, base / model.dim):
        raise InputError(
            "muP trains embedding and head by different rules",
            where="model.tie_embeddings",
            found=f"true, with logit_scale = {model.logit_scale}",
            expected=f"false, or logit_scale = mup_base_dim / dim = {base / model.dim}",
        )
