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
    assert found["extras"]["gguf"] == []
    assert found["waiting"]["policy"] == "OMP_WAIT_POLICY=PASSIVE"
    assert found["folders"]["cache"] == {"path": str(cache / "minillama"), "files": 0, "bytes": 0}
    (cache / "minillama").mkdir()
    (cache / "minillama" / "x").write_bytes(b"\0" * 2_000_000)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"path {cache / 'minillama'}, files 1, bytes 2,000,000" in said


def test_it_says_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.errors.version", lambda name: "0.1" if name == "gguf" else "99999")
    monkeypatch.setattr("minillama.native.build.can_build", lambda: False)
    monkeypatch.setattr("torch.cpu.get_capabilities", dict)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["extras"]["gguf"] == ["gguf>=0.17"] and found["extras"]["plot"] == []
    reason = "it takes g++ or clang++ on Linux"
    assert found["kernels"]["attention"] == {"C++": False, "compiled": None, "reason": reason}
    assert found["processor"]["instructions"] == []
    assert main(["doctor"]) == 0
    assert "for gguf: pip install 'gguf>=0.17'\n" in capsys.readouterr().out
