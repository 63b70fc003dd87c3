"""The README's commands, in its order, as a new user types them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_command_of_the_readme_works(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- commands -->\n```sh\n(.*?)```", text, re.S)
    python = re.search(r"```python\n(.*?)```", text, re.S)
    assert block and python
    for name in ("train.py", "generate.py", "README.md"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    first = "python train.py --train.steps 3 --train.compile false"
    for line in [first, *block[1].splitlines()]:
        # the run that the README goes on from is the default one, here cut to a few steps
        command = line.replace("--train.steps 220", "--train.steps 5")
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | cache, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip()
    result = subprocess.run(
        [sys.executable, "-c", python[1]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.startswith("68976648192"), result.stderr
