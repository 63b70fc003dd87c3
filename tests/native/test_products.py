"""Matrix products of every format and instruction set beside sums in double precision."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from minillama.native import build
from minillama.native.decode import REORDERED

HERE = Path(__file__).parent
ARM = "aarch64-linux-gnu-g++"
EMULATED = [f"-I{HERE / 'emulated'}", *(f"-D__AVX512{unit}__" for unit in ("F", "BF16", "VNNI")), "-U__AMX_BF16__"]
BUILDS = {
    "haswell": pytest.param("g++", ["-march=haswell"], [], marks=pytest.mark.hardware("avx2")),
    "four floats": pytest.param("g++", [], [], marks=pytest.mark.slow),
    "emulated": pytest.param("g++", ["-O1", *EMULATED], [], marks=pytest.mark.slow),
}
if shutil.which(ARM) and shutil.which("qemu-aarch64"):  # Debian's g++-aarch64-linux-gnu and qemu-user
    BUILDS["arm"] = pytest.param(ARM, ["-static"], ["qemu-aarch64"], marks=pytest.mark.slow)


@pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux")
@pytest.mark.parametrize(("compiler", "flags", "runner"), BUILDS.values(), ids=[*BUILDS])
def test_products_are_those_of_double_precision(
    compiler: str, flags: list[str], runner: list[str], tmp_path: Path
) -> None:
    program = tmp_path / "products"
    plain = [flag for flag in build.FLAGS if flag not in ("-shared", "-O3")]
    command = [compiler, *plain, "-O2", *REORDERED, "-Wno-psabi", f"-I{build.FOLDER}", *flags]
    subprocess.run([*command, str(HERE / "products.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([*runner, str(program)], check=True, capture_output=True, text=True)
    errors = [float(line) for line in done.stdout.split()]
    bounds = [2e-6, 2e-6, 1e-3, 4e-3]  # float32, bfloat16, int8 and int4: the largest of 60,000 sums, of heavy tails
    assert all(0 < error < bound for error, bound in zip(errors, bounds, strict=True)), errors
