"""Provenance of a run: versions, machine, command line, git state, data. One JSON line per start."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from os.path import expanduser
from pathlib import Path
from typing import Any

import torch

import minillama
from minillama.data.sources import cleaning_of
from minillama.evaluate.decontaminate import record_of
from minillama.runs.config import RunConfig

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece")


def provenance(config: RunConfig, step: int, fingerprints: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """Provenance record of a start at `step`: all that it depends on beside config.toml."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "seed": config.seed,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "folder": os.getcwd(),
        "versions": {"minillama": minillama.__version__, "python": platform.python_version()} | _versions(),
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
        },
        "git": _git(Path(minillama.__file__).parent),
        "sources": [source.label for source in config.data.sources],
        "cleaned": {source.label: made for source in config.data.sources if (made := cleaning_of(source))},
        "decontaminated": {
            s.label: made for s in config.data.sources if (made := record_of(Path(expanduser(s.label))))
        },
        **fingerprints,
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the package's git checkout and its changed files; None where it is not a checkout."""

    def ask(*words: str) -> str:
        # without optional locks: status would write the index of a checkout that is not the run's
        command = ["git", "--no-optional-locks", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if ask("ls-files", "--error-unmatch", "__init__.py") != "__init__.py":
            return None
        return {"commit": ask("rev-parse", "HEAD"), "changed": ask("status", "--porcelain", "-uno").splitlines()}
    except (OSError, subprocess.SubprocessError):
        return None
