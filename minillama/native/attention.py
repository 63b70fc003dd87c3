"""Causal FlashAttention in bfloat16 on the CPU (`attention.cpp`), a custom operator for autograd and torch.compile."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from minillama.layers.attend import attend
from minillama.layers.attention import Attention
from minillama.layers.mask import KernelMask
from minillama.native.build import Kernel

SIDE, WIDEST = 16, 256  # divisor and maximum of the head width


class _Tensor(ctypes.Structure):
    _fields_: ClassVar = [("first", c_void_p), *((name, c_int64) for name in ("batch", "head", "token"))]


def native_attend(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    """Attention by `causal_attention` if supported (bfloat16, CPU, causal, as many keys as queries), else `attend`."""
    if not mask.is_causal or not _supported(q, k, v):
        return attend(q, k, v, mask)
    out: Tensor = causal_attention(q, k, v)[0]
    return out


def _supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    width = q.shape[-1]
    shapes = q.ndim == 4 and k.shape == v.shape == (len(q), k.shape[1], *q.shape[2:]) and q.shape[1] % k.shape[1] == 0
    kinds = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in (q, k, v))
    return shapes and kinds and width % SIDE == 0 and width <= WIDEST


@torch.library.custom_op("minillama::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention softmax(q k^T / sqrt(E)) v, with the softmax normalizers for its gradient.

    Key/value heads are distributed over threads: fewer of them per batch than threads leave some idle. Sums and the
    softmax are in float32; attention weights are rounded to bfloat16 before they multiply v. Memory is linear
    in T (FlashAttention, Dao et al. 2022, arXiv 2205.14135).

    Args:
        q: (B, H, T, E) bfloat16, E a multiple of 16, at most 256.
        k: (B, K, T, E) bfloat16, H a multiple of K; H/K consecutive heads of q per head.
        v: (B, K, T, E) bfloat16.

    Returns:
        (B, H, T, E) bfloat16, and log2 of the softmax normalizers (B, H, T) float32.

    Raises:
        ValueError: other dtypes or shapes.
        MemoryError: no memory for the threads' workspace.
    """
    if not _supported(q, k, v):
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"causal attention in bfloat16 on a CPU does not support q, k, v = {shapes}")
    q, k, v = map(_contiguous_rows, (q, k, v))
    out, log_sums = _heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    descriptors = map(_descriptor, (q, k, v, out))
    if not KERNEL.library().minillama_attention(*_sizes(q, k), *descriptors, c_void_p(log_sums.data_ptr())):
        raise MemoryError("no memory for the attention workspace")
    return out, log_sums


@torch.library.custom_op("minillama::causal_attention_backward", mutates_args=(), device_types="cpu")
def causal_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_attention` with respect to q, k and v (FlashAttention-2, arXiv 2307.08691, §3.1)."""
    q, k, v, out, grad = map(_contiguous_rows, (q, k, v, out, grad))
    grads = tuple(_heads_like(x) for x in (q, k, v))
    log_sums = log_sums.contiguous()
    done = KERNEL.library().minillama_attention_backward(
        *_sizes(q, k),
        *map(_descriptor, (q, k, v, out)),
        c_void_p(log_sums.data_ptr()),
        *map(_descriptor, (grad, *grads)),
    )
    if not done:
        raise MemoryError("no memory for the attention workspace")
    return cast(tuple[Tensor, Tensor, Tensor], grads)


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@causal_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return tuple(_heads_like(x) for x in (q, k, v))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return causal_attention_backward(*ctx.saved_tensors, grad)


causal_attention.register_autograd(_backward, setup_context=_setup_context)


KERNEL = Kernel("attention.cpp", "avx512_bf16", Attention, "kernel", native_attend)


def _heads_like(x: Tensor) -> Tensor:
    """Uninitialized (B, H, T, E), stored as (B, T, H, E), the layout of the linear layers around attention."""
    rows, heads, tokens, width = x.shape
    return x.new_empty(rows, tokens, heads, width).transpose(1, 2)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor) -> list[c_int32]:
    rows, heads, tokens, width = q.shape
    return [c_int32(n) for n in (rows, heads, k.shape[1], tokens, width, torch.get_num_threads())]


def _descriptor(x: Tensor) -> Any:
    return ctypes.byref(_Tensor(x.data_ptr(), *x.stride()[:3]))
