"""SwiGLU in bfloat16 on the CPU (`swiglu.cpp`), a custom operator for autograd and torch.compile."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from typing import Any, cast

import torch
from torch import Tensor, nn

from minillama.layers.hooks import has_hooks
from minillama.layers.mlp import SwiGLU, swiglu
from minillama.native.build import Kernel

DEPTH = 32  # divisor of both widths
FEWEST = 64  # tokens: for fewer, packing weights into tiles takes longer than multiplying them


def native_swiglu(x: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """SwiGLU by `mlp` if supported (bfloat16, CPU, no biases, 64 tokens or more), else `swiglu`."""
    parts = [part for part in (gate, up, down) if not has_hooks(part)]
    weights = [cast(Tensor, part.weight) for part in parts if type(part) is nn.Linear and part.bias is None]
    if len(weights) < 3 or not _supported(x, *weights) or x.numel() < FEWEST * x.shape[-1]:
        return swiglu(x, gate, up, down)
    y: Tensor = mlp(x, *weights)
    return y


def _supported(*tensors: Tensor) -> bool:
    _, gate, up, down = tensors
    kinds = all(t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
    return kinds and gate.shape == up.shape == down.shape[::-1] and not any(n % DEPTH for n in gate.shape)


@torch.library.custom_op("minillama::mlp", mutates_args=(), device_types="cpu")
def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU (silu(x gate^T) * (x up^T)) down^T. x is the only activation saved for the backward pass.

    Sums and the input of silu are in float32; the product with the up projection is rounded to bfloat16. The backward
    pass has a workspace of some 22 D H bytes, and 4 D + 6 H for each of 512 tokens per thread.

    Args:
        x: (..., D) bfloat16, D a multiple of 32.
        gate: (H, D) bfloat16, H a multiple of 32.
        up: (H, D) bfloat16.
        down: (D, H) bfloat16.

    Returns:
        (..., D) bfloat16.

    Raises:
        ValueError: other dtypes or shapes.
    """
    if not _supported(x, gate, up, down) or x.shape[-1] != gate.shape[1]:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (x, gate, up, down))
        raise ValueError(f"SwiGLU in bfloat16 on a CPU does not support x, gate, up, down = {shapes}")
    inputs = [t.contiguous() for t in (x, gate, up, down)]
    y = torch.empty_like(inputs[0])
    sizes, work = _sizes(x, gate, backward=False)
    KERNEL.library().minillama_mlp(*sizes, *map(_pointer, (work, *inputs, y)))
    return y


@torch.library.custom_op("minillama::mlp_backward", mutates_args=(), device_types="cpu")
def mlp_backward(
    grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mlp` with respect to x and, if `weights`, the three weights."""
    inputs = [t.contiguous() for t in (x, gate, up, down, grad)]
    grads = [torch.empty_like(t) if x.numel() else torch.zeros_like(t) for t in inputs[:4]]
    sizes, work = _sizes(x, gate, backward=True)
    wanted = [_pointer(t) if weights else c_void_p(None) for t in grads[1:]]
    KERNEL.library().minillama_mlp_backward(*sizes, *map(_pointer, (work, *inputs, grads[0])), *wanted)
    return grads[0], grads[1], grads[2], grads[3]


@mlp.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@mlp_backward.register_fake
def _(grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: bool) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, gate, up, down))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights = any(ctx.needs_input_grad[1:])
    of_x, *of_weights = mlp_backward(grad, *ctx.saved_tensors, weights)
    return (of_x, *of_weights) if weights else (of_x, None, None, None)


mlp.register_autograd(_backward, setup_context=_setup_context)


KERNEL = Kernel("swiglu.cpp", "amx_bf16", SwiGLU, "kernel", native_swiglu)


def _sizes(x: Tensor, gate: Tensor, backward: bool) -> tuple[list[c_int32], Tensor]:
    """Tokens, widths and threads, and the workspace."""
    sizes = [c_int32(n) for n in (x.numel() // x.shape[-1], gate.shape[1], len(gate), torch.get_num_threads())]
    work = KERNEL.library().minillama_mlp_work
    work.restype = c_int64
    return sizes, torch.empty(work(*sizes, c_int32(backward)), dtype=torch.uint8, device="cpu")


def _pointer(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())
