"""Compilation of blocks by torch's Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor


def compile_frugally(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Inductor, with what costs next to nothing computed again in the backward pass instead of kept.

    That is the norms' output, and SwiGLU's product where it is torch's: a tenth less memory at the 42M shape in the
    same time; with 0.6 or less attention would be computed twice (benchmarks/README.md).
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(activation_memory_budget=0.9):
        return cast(Callable[..., Any], compile_fx(graph, inputs))
