"""Causal FlashAttention on the CPU, a custom operator for autograd and torch.compile.

In bfloat16 `attention.cpp`, in float32 `attention_float.cpp`.
"""

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

UNITS = {torch.bfloat16: 16, torch.float32: 8}  # divisors of the head width
WIDEST = 256  # its maximum


class _Tensor(ctypes.Structure):
    _fields_: ClassVar = [("first", c_void_p), *((name, c_int64) for name in ("batch", "head", "token"))]


def native_attend(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    """Attention by `causal_attention` if supported (bfloat16, CPU, causal, as many keys as queries), else `attend`."""
    return _attend(torch.bfloat16, q, k, v, mask)


def native_attend_float(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    """The same in float32, where no thread is idle for want of key/value heads that torch would use."""
    heads = len(q) * k.shape[1]
    if heads < min(_threads(), len(q) * q.shape[1]):
        return attend(q, k, v, mask)
    return _attend(torch.float32, q, k, v, mask)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    return torch.get_num_threads()


def _attend(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
    if not mask.is_causal or q.dtype != dtype or not _supported(q, k, v):
        return attend(q, k, v, mask)
    out: Tensor = causal_attention(q, k, v)[0]
    return out


def _supported(q: Tensor, k: Tensor, v: Tensor) -> bool:
    width = q.shape[-1]
    shapes = q.ndim == 4 and k.shape == v.shape == (len(q), k.shape[1], *q.shape[2:]) and q.shape[1] % k.shape[1] == 0
    kinds = q.dtype in UNITS and all(x.dtype == q.dtype and x.device.type == "cpu" for x in (q, k, v))
    return shapes and kinds and width % UNITS[q.dtype] == 0 and width <= WIDEST


@torch.library.custom_op("minillama::causal_attention", mutates_args=(), device_types="cpu")
def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention softmax(q k^T / sqrt(E)) v, with the softmax normalizers for its gradient.

    Key/value heads are distributed over threads: fewer of them per batch than threads leave some idle. Sums and the
    softmax are in float32; attention weights are rounded to the type of v before they multiply it. Memory is linear
    in T (FlashAttention, Dao et al. 2022, arXiv 2205.14135).

    Args:
        q: (B, H, T, E) bfloat16 or float32, E a multiple of 16 or 8, at most 256.
        k: (B, K, T, E) of the same type, H a multiple of K; H/K consecutive heads of q per head.
        v: (B, K, T, E) of the same type.

    Returns:
        (B, H, T, E) of the same type, and log2 of the softmax normalizers (B, H, T) float32.

    Raises:
        ValueError: other dtypes or shapes.
        MemoryError: no memory for the threads' workspace.
    """
    if not _supported(q, k, v):
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"causal attention in C++ does not support q, k, v = {shapes}")
    q, k, v = map(_contiguous_rows, (q, k, v))
    out, log_sums = _heads_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    descriptors = map(_descriptor, (q, k, v, out))
    if not _library(q).minillama_attention(*_sizes(q, k), *descriptors, c_void_p(log_sums.data_ptr())):
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
    done = _library(q).minillama_attention_backward(
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
FLOAT = Kernel("attention_float.cpp", "avx2", Attention, "kernel", native_attend_float)


def _library(x: Tensor) -> ctypes.CDLL:
    return (KERNEL if x.dtype == torch.bfloat16 else FLOAT).library()


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
