"""Hardware capabilities: device, dtype, peak FLOP/s, compiler."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import sys
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from minillama.errors import InputError

if TYPE_CHECKING:
    import torch


class GPU(NamedTuple):
    """Memory of a GPU in GB as sold, and its peak of dense bfloat16 matrix products with float32 sums, in FLOP/s."""

    memory: int
    flops: float


# from the vendors' data sheets; of two names in a device's the first counts
GPUS = {
    "B200": GPU(180, 2250e12),
    "H200": GPU(141, 989e12),
    "H100 PCIe": GPU(80, 756e12),
    "H100": GPU(80, 989e12),
    "A100 40GB": GPU(40, 312e12),
    "A100": GPU(80, 312e12),
    "L40S": GPU(48, 362e12),
    "RTX A6000": GPU(48, 155e12),
    "RTX 5090": GPU(32, 210e12),
    "A10": GPU(24, 125e12),
    "L4": GPU(24, 121e12),
    "RTX 4090": GPU(24, 165e12),
    "RTX 3090": GPU(24, 71e12),
    "RTX 4080": GPU(16, 97e12),
    "RTX 3070": GPU(8, 41e12),
}


def choose_device(name: str = "auto", where: str = "train.device") -> torch.device:
    """Device by name; `auto` is the first available of CUDA, MPS and CPU, and under torchrun each process has its GPU.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.
        where: the setting named in an error.

    Raises:
        InputError: a device that this machine or this torch lacks.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    count = torch.cuda.device_count() if name.startswith("cuda") else 1
    if name == "cuda" and available[name] and "LOCAL_RANK" in os.environ:
        _check_gpus(count, where)
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    kind, _, index = name.partition(":")
    if not available.get(kind, False) or (name != kind and not (index.isdecimal() and int(index) < count)):
        there = ", ".join(kind for kind, yes in available.items() if yes)
        expected = f"auto or one of {there}" + (f"; cuda:N below {count}" if available["cuda"] else "")
        lacks_cuda = "install a torch with CUDA and the GPU's driver, or leave it at auto"
        fix = lacks_cuda if kind == "cuda" and not available[kind] else f"{there.partition(',')[0]} is the fastest here"
        raise InputError("no such device", where=where, found=name, expected=expected, fix=fix)
    return torch.device(name)


def refuse_one_gpu(name: str, where: str = "train.device") -> None:
    """Refuse one GPU by its number for several processes of a machine, each of which needs its own.

    Args:
        name: as for `choose_device`.
        where: the setting named in an error.
    """
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        what, fix = "several processes cannot share one GPU", "leave out its number; CUDA_VISIBLE_DEVICES chooses GPUs"
        raise InputError(what, where=where, found=name, expected="auto or cuda: a GPU per process", fix=fix)


def _check_gpus(count: int, where: str) -> None:
    """Refuse, in all processes of a machine, that there are more of them than GPUs."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes > count:
        what, fix = "there are more processes than GPUs", f"start torchrun with --nproc-per-node {count}"
        raise InputError(what, where=where, found=processes, expected=f"at most {count}", fix=f"{fix}, or on the CPU")


def choose_dtype(name: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Compute dtype of training (mixed precision); weights and accumulation stay float32.

    `auto` takes bfloat16 where the processor multiplies it faster than float32: AMX, AMD's AVX-512 BF16, Ampere and
    later. Intel's AVX-512 BF16 products without AMX run at half the speed of float32. float16 is never chosen.
    """
    import torch

    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        features = cpu_features()
        if features.get("amx_bf16") or (features.get("avx512_bf16") and "AMD" in str(features.get("cpu_name"))):
            return torch.bfloat16
    return torch.float32


def cpu_features() -> dict[str, object]:
    """Instruction sets of the processor by torch's names, without those that ATEN_CPU_CAPABILITY keeps torch from."""
    import torch

    found: dict[str, object] = dict(torch.cpu.get_capabilities())
    if os.environ.get("ATEN_CPU_CAPABILITY") in ("avx2", "default"):
        found = {name: value for name, value in found.items() if not name.startswith(("avx512", "amx"))}
    return found


def decoding_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Compute dtype of decoding: the stored one, but float32 for bfloat16 on a processor that emulates it.

    There a bfloat16 matrix product takes up to two hundred times as long as a float32 one. Where it is only slower, the
    weights' smaller size counts for more: a token reads all of them.
    """
    import torch

    if stored != torch.bfloat16 or (device.type == "cpu" and cpu_features().get("avx512_bf16")):
        return stored
    return choose_dtype("auto", device)


def compiler_missing(device: torch.device) -> str | None:
    """Reason why torch.compile cannot work here, or None."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++", "cl")):
        return "no C++ compiler (g++ or clang++) was found"
    return None


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s of the device's matrix products: from the data sheet, or the best of several measurements."""
    import torch

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((gpu.flops for key, gpu in GPUS.items() if key in name), None)
        if known is not None and dtype == torch.bfloat16:
            return known
    best = math.inf
    for size in (256, 1024) if device.type == "cpu" else (4096,):
        best = _product_seconds(size, device, dtype)
        if best > 0.005 and size == 256:  # of an emulated type a large one takes seconds
            break
    return 2 * size**3 / best


def _product_seconds(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a product of square matrices, the least of several."""
    import torch

    a, b = torch.ones(2, size, size, device=device).to(dtype)  # no random numbers: a run's generator state is unchanged
    (a @ b)[0, 0].item()  # warm-up: the first one creates the kernel
    best, count, began = math.inf, 0, time.perf_counter()
    while (since := time.perf_counter() - began) < min(0.1, size / 1e4) or (count < 5 and since < 1):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # reading a value waits for an asynchronous device
        best, count = min(best, time.perf_counter() - start), count + 1
    return best


def keep_freed_pages() -> bool:
    """Make glibc's malloc keep freed memory for reuse, process-wide; returns whether it does.

    By default it returns every block over 32 MiB to the system, and the next step page-faults it in again: an
    eighth of a step where activations are that large (benchmarks/README.md). For commands, which own their
    process; a no-op except on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def bound_kernel_caches() -> None:
    """Have oneDNN keep the kernels of the last 64 shapes instead of 1,024; what the environment says already stays.

    Where each step has another number of tokens, as with conversations, kernels of earlier steps are of no use again,
    and take 0.6 MB each for a layer of 576 x 768 in float32. Read at the first product: call it before.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # the second of torch's layer on oneDNN
        os.environ.setdefault(name, "64")
