"""Disks that fill up, limits of files, what may not be read or written, a current folder that is gone."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minillama import Decoder, InputError, ModelConfig, Tokenizer
from minillama.commands.cli import main
from minillama.convert import convert
from minillama.data.sources import find_files
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


def test_fault_49_a_file_size_limit_while_training(
    words: list[str], tmp_path: Path, small_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main([*words, "--model.dim", "80", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "cannot write" in said and "File too large" in said and "internal error" not in said
    assert not (out / "model").exists() and not list(out.rglob("*.safetensors")) and not list(out.rglob(".*.tmp"))


@pytest.fixture
def permissions() -> Iterator[None]:
    """Permissions of files hold for root as well: without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH in this thread."""
    if os.geteuid():
        yield
        return
    library = ctypes.CDLL(None)
    version, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert library.capget(version, sets) == 0
    before = sets[0]
    sets[0] &= ~0b110
    assert library.capset(version, sets) == 0
    yield
    sets[0] = before
    library.capset(version, sets)


READERS = {
    "generate": ["generate", "--prompt", "x", "--model"],
    "inspect": ["inspect"],
    "plan": ["plan"],
    "show": ["show"],
    "tokenizer": ["tokenizer", "encode", "x", "--model"],
    "train": ["train", "--train.init_from"],
    "source": ["train", "--data.sources"],
}


@pytest.mark.parametrize("name", READERS)
def test_fault_54_a_folder_that_may_not_be_read(
    name: str, tmp_path: Path, permissions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "closed"
    place.mkdir(mode=0)
    try:
        status, said = main([*READERS[name], str(place)]), capsys.readouterr().err
    finally:
        place.chmod(0o755)
    assert status == 1 and "internal error" not in said
    assert "Permission denied" in said and str(place) in said


@pytest.mark.parametrize("name", ["hf", "gguf", "tokenizer", "run"])
def test_fault_54_a_folder_that_may_not_be_written(
    name: str, words: list[str], model: Path, tmp_path: Path, permissions: None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "closed"
    place.mkdir(mode=0o555)
    commands = {
        "hf": ["convert", str(model), str(place / "m"), "--to", "hf"],
        "gguf": ["convert", str(model), str(place / "m.gguf"), "--to", "gguf"],
        "tokenizer": ["tokenizer", "train", "--input", words[-3], "--kind", "char", "--output", str(place / "t")],
        "run": [*words, "--out", str(place / "run")],
    }
    assert main(commands[name]) == 1
    said = capsys.readouterr().err
    assert "Permission denied" in said and str(place) in said and "internal error" not in said
    assert not list(place.iterdir())


@pytest.mark.parametrize(("name", "what"), [("x" * 10_000, "File name too long"), ("~no-such-user/x", "no such file")])
def test_fault_54_a_source_that_no_file_can_be(name: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        find_files(name)


@pytest.mark.parametrize("load", [Decoder.from_pretrained, Tokenizer.load, ModelConfig.load])
@pytest.mark.parametrize("name", ["x" * 10_000, "closed"])
def test_fault_54_a_path_that_may_not_be_read_is_named(
    load: Callable[[Path], object], name: str, tmp_path: Path, permissions: None
) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(InputError, match=r"cannot read this path: (File name too long|Permission denied)") as error:
        load(tmp_path / name)
    assert error.value.where == tmp_path / name
    (tmp_path / "closed").chmod(0o755)


def test_fault_54_a_current_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["plan", "llama-7b"]) == 1  # MKL ends the process at the first matrix product
    assert capsys.readouterr().err.startswith("error: the current folder cannot be read\n")


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
