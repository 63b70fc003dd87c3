"""Disks that fill up, and files that others may read."""

from __future__ import annotations

import resource
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from minillama import Decoder, InputError, ModelConfig
from minillama.commands.cli import main
from minillama.convert import convert
from minillama.tokenizer import byte_tokenizer

CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=2, hidden_dim=96, vocab_size=257, max_seq_len=32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    Decoder(CONFIG).save_pretrained(tmp_path / "model")
    byte_tokenizer().save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file grows beyond 100 kB, as on a disk that is full there."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf"])
def test_fault_49_a_disk_that_fills_up_while_converting(
    kind: str, model: Path, tmp_path: Path, small_files: None
) -> None:
    before = sorted(tmp_path.iterdir())
    if kind == "meta":
        (model / "tokenizer.json").unlink()  # which Meta's layout does not have
    with pytest.raises(InputError, match="cannot write") as error:
        convert(model, tmp_path / "out", kind)
    assert str(error.value.found) in ("File too large", "4096 requested and 2960 written")  # the system, numpy
    assert sorted(tmp_path.iterdir()) == before


def test_fault_49_files_have_the_rights_of_the_umask(model: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in model.iterdir()}
    assert len(modes) == 1 and modes == {stat.S_IMODE((model / "config.json").stat().st_mode)}


def test_an_error_of_the_system_is_no_internal_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "x" * 5000]) == 1
    said = capsys.readouterr().err
    assert "File name too long" in said and "internal" not in said


def test_an_internal_error_is_one_line_without_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise RuntimeError("\x1b[2J\n" * 5000)

    monkeypatch.setattr("minillama.commands.inspect.run", fail)
    assert main(["inspect", "x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("internal error: RuntimeError: ") and len(said) < 1200 and said.strip().isprintable()
