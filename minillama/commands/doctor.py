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

    missing = compiler_missing(torch.device("cpu"))
    table = {
        "versions": _versions(),
        "processor": _processor(),
        "kernels": _kernels(),
        "compiler": {"c++": " ".join(compilers()) or "none", "torch.compile": missing or "available"},
        "waiting": {"policy": policy()} | {name: os.environ.get(name, "not set") for name in VARIABLES},
        "extras": _extras(),
        "folders": _folders(),
    }
    if args.json:
        print(json.dumps(table))
        return 0
    width = max(len(name) for part in table.values() for name in part)
    for title, part in table.items():
        print_pairs(title, part, width)
    return 0


def _versions() -> dict[str, str]:
    import minillama

    found = {"minillama": minillama.__version__, "python": platform.python_version(), "system": platform.platform()}
    return found | {name: _version(name) or "missing" for name in PACKAGES}


def _processor() -> dict[str, str]:
    import torch

    from minillama.device import choose_device, choose_dtype, peak_flops

    there = torch.cpu.get_capabilities()
    device = choose_device()
    dtype = choose_dtype("auto", device)
    name = str(dtype).removeprefix("torch.")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "units": " ".join(unit for unit in UNITS if there.get(unit)) or "none beyond the base",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "products while training": f"{name}, {peak_flops(device, dtype) / 1e9:.0f} GFLOP/s measured now",
    }


def _kernels() -> dict[str, str]:
    from minillama.files import cache_folder
    from minillama.native import attention, build, softmax, swiglu

    named = {"attention": attention, "softmax of the loss": softmax, "SwiGLU": swiglu}
    sources: dict[str, tuple[str, str | None]] = {"decode step": ("decode.cpp", None)}
    sources |= {name: (part.KERNEL.source, part.KERNEL.unsupported()) for name, part in named.items()}
    table = {}
    for name, (source, unsupported) in sources.items():
        missing = unsupported if build.can_build() else build.NO_COMPILER
        is_compiled = any((cache_folder() / "native").glob(f"{Path(source).stem}-*.so"))
        table[name] = f"torch ({missing})" if missing else "C++" if is_compiled else "C++, compiled at the first use"
    return table


def _extras() -> dict[str, str]:
    from packaging.requirements import Requirement

    try:
        declared = metadata("minillama")
    except PackageNotFoundError:
        return {"none known": "the package is not installed"}
    needs = [Requirement(line) for line in declared.get_all("Requires-Dist") or ()]
    wanted = [need for need in needs if need.marker and not need.marker.evaluate({"extra": ""})]
    found = {}
    for extra in declared.get_all("Provides-Extra") or ():
        asked = [need for need in wanted if need.marker and need.marker.evaluate({"extra": extra})]
        missing = [need.name for need in asked if (_version(need.name) or "") not in need.specifier]
        install = f"optional, not installed: {' '.join(missing)}; pip install 'minillama[{extra}]'"
        found[extra] = install if missing else "complete"
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folders() -> dict[str, Any]:
    from minillama.files import cache_folder

    cache = cache_folder()
    failed = [path.name for path in (cache / "native").glob("*.failed")]
    return {
        "cache": f"{cache}, {_size(cache)}",
        "compiled C++": f"{cache / 'native'}, {_size(cache / 'native')}",
        "failed to compile": " ".join(failed) or "none",
        "free where runs are written": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB in {Path.cwd()}",
        "temporary": tempfile.gettempdir(),
    }


def _size(folder: Path) -> str:
    if not folder.is_dir():
        return "not made yet"
    files = [path for path in folder.rglob("*") if path.is_file()]
    return f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e6:.0f} MB"
