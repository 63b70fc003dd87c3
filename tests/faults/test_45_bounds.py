"""Files that never end, or become a thousand times as large: nothing hangs, nothing fills the memory."""

from __future__ import annotations

import gzip
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from minillama import InputError, ModelConfig, Tokenizer
from minillama.config.loader import read_toml
from minillama.data import archives, reading
from minillama.data.skipped import BadText
from minillama.data.sources import Source, documents
from minillama.files import read_json
from minillama.formats.gguf_header import read_header
from minillama.formats.open import open_model
from minillama.formats.safetensors_header import read_header as read_safetensors
from minillama.tokenizer.sentencepiece_vocab import merges_by_score

PACK = {".gz": gzip.compress, ".zst": zstandard.compress}


def texts(path: Path) -> list[str]:
    return [document.text for document in documents(Source(path=str(path)))]


def link(path: Path) -> None:
    path.symlink_to("/dev/zero")


# pipes and devices


@pytest.mark.parametrize("make", [os.mkfifo, link])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst"])
def test_a_pipe_or_a_device_is_no_source(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match="not a regular file") as error:
            texts(source)
        assert error.value.where == tmp_path / name


MODEL_FILES = {
    "config.json": ModelConfig.load,
    "tokenizer.json": Tokenizer.load,
    "tokenizer.model": Tokenizer.load,
    "tokenizer.bin": Tokenizer.load,
    "x.gguf": open_model,
    "x.toml": lambda path: read_toml(Path(path)),
    "x.bin": open_model,
    "model.safetensors": lambda path: read_safetensors(Path(path)),
}


@pytest.mark.parametrize("make", [os.mkfifo, link])
@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_pipe_or_a_device_is_no_file_of_a_model(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    make(tmp_path / name)
    signal.setitimer(signal.ITIMER_REAL, 20)  # which ends pytest instead of letting it hang
    with pytest.raises(InputError, match="not a regular file") as error:
        MODEL_FILES[name](str(tmp_path / name))
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert error.value.where == tmp_path / name


# archives, lines, folders


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_archive_that_unpacks_too_far(
    suffix: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond a hundred times its size, and 64 MiB. What is below is read."""
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACK[suffix](line * 20_000))
    assert texts(path)
    monkeypatch.setattr(archives, "SMALL", 2**20)
    with pytest.raises(InputError, match="too large") as error:
        texts(path)
    assert error.value.where == path and "unpacked bytes" in str(error.value.expected)
    monkeypatch.setenv("MINILLAMA_LIMITS", "100")
    assert texts(path)


def test_the_bounds_are_far_from_real_files() -> None:
    assert archives.RATIO >= 20 * 5 and archives.SMALL >= 2**26 and reading.LINE >= 2**28 and reading.DOCUMENT >= 2**32


@pytest.mark.parametrize("suffix", PACK)
def test_a_bomb_takes_little_memory(suffix: str, tmp_path: Path) -> None:
    """Of 4 GB in 4 MB (gzip) and 130 KB (zstd), of which no more is unpacked at once than there is to be."""
    part = b"\0" * 2**22
    data = PACK[suffix](part) * 1000 if suffix == ".gz" else zstandard.ZstdCompressor(level=1).compress(part) * 1000
    (tmp_path / f"a.txt{suffix}").write_bytes(data)
    code = f"""
import resource
from minillama.data.sources import Source, documents
resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9))
list(documents(Source(path={str(tmp_path / f"a.txt{suffix}")!r})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "InputError: this is too large" in done.stderr


def test_a_text_or_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LINE", 100)
    monkeypatch.setattr(reading, "DOCUMENT", 100)
    long = json.dumps({"text": "x" * 200})
    (tmp_path / "a.jsonl").write_text(f'{{"text": "short"}}\n{long}\n{{"text": "next"}}\n')
    with pytest.raises(BadText, match="too long") as error:
        texts(tmp_path / "a.jsonl")
    assert error.value.where == f"{tmp_path / 'a.jsonl'}:2"
    assert [d.text for d in documents(Source(path=str(tmp_path / "a.jsonl")), "skip")] == ["short", "next"]
    (tmp_path / "b.json").write_text(f"[\n{long}]")
    with pytest.raises(BadText, match="too long"):
        texts(tmp_path / "b.json")
    (tmp_path / "c.txt").write_text(long)
    with pytest.raises(InputError, match="too large"):
        texts(tmp_path / "c.txt")
    assert any(isinstance(line, BadText) for line in reading.read_lines(tmp_path / "c.txt"))


def test_blank_lines_before_records_are_counted_and_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n" * 300 + '{"text": "x"}\n\n[]')
    with pytest.raises(BadText) as error:
        texts(tmp_path / "a.jsonl")
    assert error.value.where == f"{tmp_path / 'a.jsonl'}:303"


def test_a_folder_that_is_too_deep(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="folders above it"):
        texts(tmp_path)
    subprocess.run(["rm", "-rf", str(tmp_path / "d")], check=True)


# headers


def test_arrays_of_arrays_are_refused(tmp_path: Path) -> None:
    """Which llama.cpp does not read either; 12 MB of them were 300 MB of objects."""
    key = struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 9, 4) + struct.pack("<IQ", 0, 0) * 4
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key + bytes(64))
    with pytest.raises(InputError, match="unknown value type"):
        read_header(tmp_path / "a.gguf")


@pytest.mark.parametrize("kind", ["keys", "strings"])
def test_a_gguf_header_of_many_objects(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.formats.gguf_header._KEYS", 100)
    monkeypatch.setattr("minillama.formats.gguf_header._ITEMS", 100)
    count, body = 101, b"".join(struct.pack("<Q", 3) + b"%03d" % i + struct.pack("<IB", 0, 1) for i in range(101))
    if kind == "strings":
        count, body = 1, struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 8, 101) + bytes(8 * 101)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, count) + body + bytes(64))
    with pytest.raises(InputError, match="too large"):
        read_header(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "text", ["[" * 2000 + "]" * 2000, '{"a":' * 2000, '{"a": "\\ud800"}', '{"a": 1' + "0" * 5000 + "}", "3"]
)
def test_json_that_cannot_be_a_configuration(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(InputError, match="too large"):
        read_json(tmp_path / "config.json", most=len(text) - 1)


def test_a_vocabulary_of_long_token_pieces_does_not_take_minutes() -> None:
    began = time.monotonic()
    with pytest.raises(InputError, match="too large"):
        merges_by_score({f"{i:06}" + "x" * 900: -float(i) for i in range(10_000)})
    assert time.monotonic() - began < 20


# memory of long texts


@pytest.mark.slow
def test_a_line_of_20_mb_takes_little_memory(tmp_path: Path, words: list[str]) -> None:
    text = " ".join(f"word{i % 977}" for i in range(2_600_000))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    small = [word for word in words if word != str(tmp_path / "text.txt") and word != "--data.sources"]
    command = [
        *small,
        "--data.sources",
        str(tmp_path / "long.jsonl"),
        "--out",
        str(tmp_path / "run"),
        "--train.steps",
        "1",
    ]
    code = f"""
import resource, sys
from minillama.commands.cli import main
print(main({command!r}), file=sys.stderr)
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert int(done.stderr.split()[-1]) < 1500, done.stderr


@pytest.mark.parametrize("columns", ["1", "5"])
def test_help_in_a_narrow_terminal(columns: str) -> None:
    environment = os.environ | {"COLUMNS": columns}
    command = [sys.executable, "-m", "minillama", "inspect", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "usage" in done.stdout


def test_llama_3s_ranks_are_read_in_seconds(shared: Path) -> None:
    began = time.process_time()
    Tokenizer.load(shared / "tokenizer/llama3/tokenizer.model")
    assert time.process_time() - began < 30
