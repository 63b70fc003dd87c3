"""Environment report: versions, processor, kernels, compiler, thread wait policy, extras, folders."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Any

import tyro

from minillama.commands.tables import print_pairs
from minillama.errors import missing

UNITS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16")  # they decide dtypes and kernels
PACKAGES = ("torch", "numpy", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Print the report."""
    import torch

    from minillama.device import compiler_missing
    from minillama.native.build import compilers
    from minillama.threads import VARIABLES, policy

    table = {
        "versions": _versions(),
        "processor": _processor(),
        "kernels": _kernels(),
        "compiler": {"c++": compilers(), "torch.compile": compiler_missing(torch.device("cpu")) or True},
        "waiting": {"policy": policy().partition(",")[0]} | {name: os.environ.get(name) for name in VARIABLES},
        "extras": _extras(),
        "folders": _folders(),
    }
    if args.json:
        print(json.dumps(table))
        return 0
    width = max(len(name) for part in table.values() for name in part)
    for title, part in table.items():
        title = "missing packages of the extras" if title == "extras" else title
        print_pairs(title, {name: _words(value) for name, value in part.items()}, width)
    for extra, absent in table["extras"].items():
        if absent:
            print(f"for {extra}: pip install {' '.join(map(repr, absent))}")
    return 0


def _words(value: object) -> str:
    """A value as the report prints it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool | None):
        return {True: "yes", False: "no", None: "not set"}[value]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _versions() -> dict[str, str | None]:
    import minillama

    found = {"minillama": minillama.__version__, "python": platform.python_version(), "system": platform.platform()}
    return found | {name: _version(name) for name in PACKAGES}


def _processor() -> dict[str, Any]:
    import torch

    from minillama.device import choose_device, choose_dtype, cpu_features, peak_flops

    there = cpu_features()
    device = choose_device()
    dtype = choose_dtype("auto", device)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "instructions": [unit for unit in UNITS if there.get(unit)],
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "training dtype": str(dtype).removeprefix("torch."),
        "GFLOP/s measured now": round(peak_flops(device, dtype) / 1e9),
    }


def _kernels() -> dict[str, dict[str, Any]]:
    from minillama.files import cache_folder
    from minillama.native import attention, build, softmax, swiglu

    named = {
        "attention": attention.KERNEL,
        "attention, float32": attention.FLOAT,
        "softmax of the loss": softmax.KERNEL,
        "SwiGLU": swiglu.KERNEL,
    }
    sources: dict[str, tuple[str, str | None]] = {"decode step": ("decode.cpp", None)}
    sources |= {name: (kernel.source, kernel.unsupported()) for name, kernel in named.items()}
    table = {}
    for name, (source, unsupported) in sources.items():
        absent = unsupported if build.can_build() else build.NO_COMPILER
        compiled = any((cache_folder() / "native").glob(f"{Path(source).stem}-*.so"))
        table[name] = {"C++": absent is None, "compiled": compiled if absent is None else None, "reason": absent}
    return table


def _extras() -> dict[str, list[str]]:
    """Missing requirements of each extra."""
    try:
        return {extra: missing(extra) for extra in metadata("minillama").get_all("Provides-Extra") or ()}
    except PackageNotFoundError:
        return {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folders() -> dict[str, Any]:
    from minillama.files import cache_folder

    cache = cache_folder()
    return {
        "cache": _size(cache),
        "compiled C++": _size(cache / "native"),
        "failed to compile": [path.name for path in (cache / "native").glob("*.failed")],
        "runs": {"path": str(Path.cwd()), "free bytes": shutil.disk_usage(Path.cwd()).free},
        "temporary": tempfile.gettempdir(),
    }


def _size(folder: Path) -> dict[str, Any]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {"path": str(folder), "files": len(files), "bytes": sum(path.stat().st_size for path in files)}
