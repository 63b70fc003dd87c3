"""The sdist and the wheel that users install, and the rules that the test suite itself runs under."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import minillama

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )
    return result


def test_a_wheel_from_the_sdist_works_elsewhere(tmp_path: Path) -> None:
    tree, dist, site = tmp_path / "tree", tmp_path / "dist", tmp_path / "site"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "build", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    built = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, tree, cwd=tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")

    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.toml")}
    assert configs
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"minillama/{name}" for name in configs} <= names
    assert "minillama/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"minillama", f"minillama-{minillama.__version__}.dist-info"}
    with tarfile.open(sdist) as archive:
        members = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert configs | {"LICENSE", "README.md", "pyproject.toml", "tests/test_packaging.py"} <= members

    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    installed = run(*pip, cwd=tmp_path)
    assert installed.returncode == 0, installed.stderr
    code = "import minillama; print(minillama.__file__);print(minillama.ModelConfig.load('llama-2-70b').num_params())"
    result = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert result.stdout.split() == [str(site / "minillama" / "__init__.py"), "68976648192"], result.stderr


def test_constraints_pin_everything_that_ci_installs_by_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    named = {line.split(">=")[0] for line in project["dependencies"] + project["optional-dependencies"]["dev"]}
    assert named <= set(pins)
    assert pins["torch"] == "2.13.0"


@pytest.mark.parametrize(("ci", "status"), [("true", 1), ("", 0)])
def test_a_skip_fails_the_run_in_ci_only(tmp_path: Path, ci: str, status: int) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    code = "import pytest\ndef test_a(): pass\n@pytest.mark.skip(reason='no oracle')\ndef test_b(): pass\n"
    (tmp_path / "test_x.py").write_text(code, encoding="utf-8")
    result = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, cwd=tmp_path, CI=ci)
    assert result.returncode == status, result.stdout
    assert ("test_x.py::test_b: Skipped: no oracle" in result.stdout) == bool(ci)
    assert "1 passed, 1 skipped" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_is_left_out_is_said_and_unknown_markers_are_refused(tmp_path: Path, workers: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    code = (
        "import os, pytest\ndef test_a():\n    count = int(os.environ.get('PYTEST_XDIST_WORKER_COUNT', 0))\n"
        "    assert count < 2 or os.environ['OMP_NUM_THREADS'] == '1'\n"
        "@pytest.mark.hardware('no_such_unit')\ndef test_b(): assert 0\n"
        "@pytest.mark.slow\ndef test_c(): assert 0\n"
    )
    (tmp_path / "test_x.py").write_text(code, encoding="utf-8")
    pytest_here = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-c",
        ROOT / "pyproject.toml",
        "-n",
        workers,
    ]
    result = run(*pytest_here, "--rootdir", tmp_path, tmp_path, cwd=tmp_path, CI="true")
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout
    assert "tests of hardware that is not here were deselected: 1 without no_such_unit" in result.stdout
    assert "1 slow tests were deselected: pytest -m slow runs them" in result.stdout
    (tmp_path / "test_x.py").write_text(code.replace("mark.slow", "mark.gpu"), encoding="utf-8")
    assert "'gpu' not found in `markers`" in run(*pytest_here, tmp_path, cwd=tmp_path).stdout
