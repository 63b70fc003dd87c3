"""Damaged files of every format: each ends in what it should be or in an error of the project.

Children with an address-space limit read them, so that a crash, a hang or a library that aborts is seen as such.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux")


def start(seed: int, count: int, place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), str(seed), str(count)]
    root = str(Path(__file__).parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "CASE": str(place / f"case-{seed}"), "PYTHONPATH": root}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check(child: subprocess.Popen[str], seed: int, count: int, place: Path) -> None:
    said, error = child.communicate(timeout=900)
    case = (place / f"case-{seed}").read_text().strip()
    assert child.returncode == 0, f"status {child.returncode} at {case}\n{said}{error}"
    outcomes = json.loads(said.splitlines()[-1])
    assert outcomes["refused"] + outcomes["accepted"] >= count
    assert min(outcomes["refused"], outcomes["accepted"]) > count // 20  # neither too much damage nor too little


def test_hundreds_of_damaged_files(tmp_path: Path) -> None:
    check(start(1, 540, tmp_path), 1, 540, tmp_path)


@pytest.mark.slow
def test_twenty_thousand_damaged_files(tmp_path: Path) -> None:
    children = {seed: start(seed, 10_000, tmp_path) for seed in (2, 3)}
    for seed, child in children.items():
        check(child, seed, 10_000, tmp_path)
