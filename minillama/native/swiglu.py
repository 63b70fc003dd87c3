"""SwiGLU in bfloat16 by `swiglu.cpp`, as an operator that autograd and torch.compile know."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from minillama.layers.mlp import SwiGLU, swiglu
from minillama.model import Decoder
from minillama.native.build import CannotBuild, load_library, prepare

__all__ = ["mlp", "native_swiglu", "unsupported", "use"]

SOURCE = "swiglu.cpp"
DEPTH = 32  # what both widths are multiples of
FEWEST = 64  # tokens: for fewer it takes longer to turn weights into tiles than to multiply them


def unsupported() -> str | None:
    """Why this processor does not run the kernel, or None: it takes one that multiplies tiles of bfloat16."""
    return None if torch.cpu.get_capabilities().get("amx_bf16") else "the processor has no AMX for bfloat16"


def use(model: Decoder, say: Callable[[str], None] = lambda text: None) -> None:
    """Have a model's SwiGLU run on `native_swiglu` from now on.

    Args:
        model: it is changed; what the kernel does not take goes to torch's operations as before.
        say: told before anything is compiled, which happens once for a machine.

    Raises:
        CannotBuild: no compiler, or it failed; another processor.
    """
    parts = [part for part in model.modules() if isinstance(part, SwiGLU)]
    if not parts:
        return
    prepare(SOURCE, unsupported(), _library, say)
    for part in parts:
        part.kernel = native_swiglu


def native_swiglu(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """`swiglu`, by `mlp` where that takes it: bfloat16 on the CPU, no biases, 64 tokens or more."""
    parts = (gate, up, down)
    weights = [cast(Tensor, part.weight) for part in parts if type(part) is nn.Linear and part.bias is None]
    if len(weights) < 3 or not _takes(x, *weights) or x.numel() < FEWEST * x.shape[-1]:
        return swiglu(x, gate, up, down)
    y: Tensor = mlp(x, *weights)
    return y


def _takes(*tensors: Tensor) -> bool:
    _, gate, up, down = tensors
    kinds = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
    return kinds and gate.shape == up.shape == down.shape[::-1] and not any(n % DEPTH for n in gate.shape)


@torch.library.custom_op("minillama::mlp", mutates_args=(), device_types="cpu")
def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T. Nothing but x is kept for the gradients.

    Sums are in float32, and so is what goes into silu; its product with the other half is rounded to bfloat16. The
    backward pass works in some 22 D H bytes, and 4 D + 6 H for each of 512 tokens per thread.

    Args:
        x: (..., D) bfloat16, D a multiple of 32.
        gate: (H, D) bfloat16, H a multiple of 32.
        up: (H, D) bfloat16.
        down: (D, H) bfloat16.

    Returns:
        (..., D) bfloat16.

    Raises:
        ValueError: other types or shapes.
    """
    if not _takes(x, gate, up, down) or x.shape[-1] != gate.shape[1]:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (x, gate, up, down))
        raise ValueError(f"not the input and the weights of a SwiGLU in bfloat16 on a CPU: {shapes}")
    inputs = [t.contiguous() for t in (x, gate, up, down)]
    y = torch.empty_like(inputs[0])
    sizes, work = _sizes(x, gate, backward=False)
    _library().minillama_mlp(*sizes, *map(_first, (work, *inputs, y)))
    return y


@torch.library.custom_op("minillama::mlp_backward", mutates_args=(), device_types="cpu")
def mlp_backward(
    grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and, where they are wanted, of the three weights from that of `mlp`'s result."""
    inputs = [t.contiguous() for t in (x, gate, up, down, grad)]
    grads = [torch.empty_like(t) if x.numel() else torch.zeros_like(t) for t in inputs[:4]]
    sizes, work = _sizes(x, gate, backward=True)
    wanted = [_first(t) if weights else c_void_p(None) for t in grads[1:]]
    _library().minillama_mlp_backward(*sizes, *map(_first, (work, *inputs, grads[0])), *wanted)
    return grads[0], grads[1], grads[2], grads[3]


@mlp.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: bool) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, gate, up, down))


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights = any(ctx.needs_input_grad[1:])
    of_x, *of_weights = mlp_backward(grad, *ctx.saved_tensors, weights)
    return (of_x, *of_weights) if weights else (of_x, None, None, None)


mlp.register_autograd(_gradients, setup_context=_keep)


@cache
def _library() -> ctypes.CDLL:
    library = load_library(SOURCE)
    if not library.minillama_mlp_ready():
        raise CannotBuild("Linux does not grant the processor's tile registers")
    library.minillama_mlp_work.restype = c_int64
    return library


def _sizes(x: Tensor, gate: Tensor, backward: bool) -> tuple[list[c_int32], Tensor]:
    """Tokens, widths and threads, and the memory to work in."""
    sizes = [c_int32(n) for n in (x.numel() // x.shape[-1], gate.shape[1], len(gate), torch.get_num_threads())]
    return sizes, torch.empty(_library().minillama_mlp_work(*sizes, c_int32(backward)), dtype=torch.uint8, device="cpu")


def _first(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())
