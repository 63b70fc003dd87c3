"""What `minillama doctor` says."""

from __future__ import annotations

import json

import pytest
import torch

from minillama.commands.cli import main


def test_it_says_what_is_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["extras"]["gguf"] == "complete"
    assert found["waiting"]["policy"] == "OMP_WAIT_POLICY=PASSIVE, from the environment"
    assert found["folders"]["cache"].startswith(str(cache))
    (cache / "minillama").mkdir()
    (cache / "minillama" / "x").write_bytes(b"\0" * 2_000_000)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"{cache / 'minillama'}, 1 files, 2 MB" in said


def test_it_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.commands.doctor._version", lambda name: None if name == "gguf" else "99")
    monkeypatch.setattr("minillama.native.build.can_build", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extras"]["gguf"] == "optional, not installed: gguf; pip install 'minillama[gguf]'"
    assert found["extras"]["plot"] == "complete"
    assert found["kernels"]["attention"] == "torch (it takes g++ or clang++ on Linux)"
    assert found["processor"]["units"] == "none beyond the base"
