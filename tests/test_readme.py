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
        command = line.replace("--train.steps 370", "--train.steps 5")
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | cache, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        assert result.stdout.strip()
    result = subprocess.run(
        [sys.executable, "-c", python[1]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.startswith("68976648192"), result.stderr


@pytest.mark.slow
def test_every_command_of_the_formats_page_works(tmp_path: Path) -> None:
    from minillama import Decoder, ModelConfig
    from minillama.tokenizer import byte_tokenizer

    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=257, max_seq_len=256)
    Decoder(config).save_pretrained(tmp_path / "runs/tiny/model")
    byte_tokenizer().save(tmp_path / "runs/tiny/model")
    text = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    block = re.search(r"## Convert and inspect\n\n```sh\n(.*?)```", text, re.S)
    assert block
    (tmp_path / "generate.py").write_text((ROOT / "generate.py").read_text(encoding="utf-8"), encoding="utf-8")
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in block[1].splitlines():
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert (tmp_path / "tiny.gguf").is_file() and (tmp_path / "tiny-hf/model.safetensors").is_file()
