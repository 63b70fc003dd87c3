"""Faults 6 to 12: shards and text."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from minillama.data.corpus import Corpus, Split
from minillama.data.prepare import load_corpus, prepare
from minillama.data.shards import HEADER_BYTES, Shard, ShardWriter
from minillama.data.skipped import Skipped
from minillama.data.sources import Source, documents
from minillama.errors import InputError
from minillama.tokenizer import byte_tokenizer


def message(error: pytest.ExceptionInfo[InputError]) -> str:
    return str(error.value)


def shard(folder: Path, ids: list[int], stem: str = "train") -> Path:
    writer = ShardWriter(folder, stem, 300)
    writer.write(ids)
    writer.close()
    return writer.paths[0]


def prepared(tmp_path: Path) -> tuple[Source, Path]:
    """A source, and the folder that it was tokenized to."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text number {i}"}) + "\n" for i in range(100)))
    source = Source(path=str(path))
    prepare([source], byte_tokenizer(), cache=tmp_path / "cache")
    return source, next((tmp_path / "cache").iterdir())


def test_fault_06_id_outside_the_vocabulary(tmp_path: Path) -> None:
    paths = [shard(tmp_path, list(range(100)), "a"), shard(tmp_path, [*range(57), 299, 0, 1], "b")]
    split = Split([Shard.open(path) for path in paths], vocab_size=299)
    assert split.read(90, 60).tolist() == [*range(90, 100), *range(50)]
    with pytest.raises(InputError) as caught:
        split.read(90, 70)
    assert f"{paths[1]}, token 57" in message(caught)
    assert "found: 299" in message(caught)
    assert "expected: less than 299" in message(caught)
    with pytest.raises(InputError, match="token 57"):
        Corpus([split], [split]).batch(0, 0, 1, 159)
    with pytest.raises(InputError, match="token 57"):
        list(split.val_windows(7))


def test_fault_07_shorter_than_the_context() -> None:
    split = Split([Shard(Path("x"), np.arange(64))], 300, name="tiny.txt (train)")
    with pytest.raises(InputError, match="shorter than the context") as caught:
        Corpus([split], [split]).batch(0, 0, 1, 64)
    assert "tiny.txt (train)" in message(caught)
    assert "found: 64 tokens" in message(caught)
    assert "expected: at least 65 (train.context 64, and one to predict)" in message(caught)


def test_fault_07_shorter_than_one_batch() -> None:
    split = Split([Shard(Path("x"), np.arange(100))], 300, name="tiny.txt (train)")
    corpus = Corpus([split], [split])
    corpus.check(10, 9)
    for rows in (10, 1000):
        with pytest.raises(InputError, match="shorter than one batch") as caught:
            corpus.check(10, rows)
        assert "100 tokens, 9 windows of 10" in message(caught)
        assert f"at least {rows} windows (train.batch_size {rows})" in message(caught)
        with pytest.raises(InputError, match="shorter than one batch"):
            corpus.batch(0, 0, rows, 10)


def test_fault_07_one_of_several_sources_is_shorter_than_its_share() -> None:
    long, short = (Split([Shard(Path("x"), np.arange(n))], 10**6, name=f"{n}") for n in (100_000, 100))
    Corpus([long, short], [long, short], [9, 1]).check(10, 80)
    with pytest.raises(InputError, match="where: 100\n"):
        Corpus([long, short], [long, short], [9, 1]).check(10, 100)


def test_fault_07_nothing_held_out() -> None:
    split = Split([Shard(Path("x"), np.arange(100))], 300)
    with pytest.raises(InputError, match="no held-out text") as caught:
        Corpus([split], [Split([], 300)]).check(10, 2)
    assert "0 held-out tokens, 100 training tokens" in message(caught)
    assert "data.val_fraction" in message(caught)


@pytest.mark.parametrize("keep", [HEADER_BYTES + 199, HEADER_BYTES, 20])
def test_fault_08_truncated_shard(tmp_path: Path, keep: int) -> None:
    path = shard(tmp_path, list(range(100)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="this data shard is truncated") as caught:
        Shard.open(path)
    assert str(path) in message(caught)
    assert f"found: {keep} bytes" in message(caught)
    assert f"{264 if keep >= HEADER_BYTES else HEADER_BYTES} bytes" in message(caught)


def test_fault_08_other_damage_to_a_shard(tmp_path: Path) -> None:
    path = shard(tmp_path, list(range(100)))
    whole = path.read_bytes()
    for data, words in (
        (whole + b"x", "this data shard is too long"),
        (b"<!DOCTYPE html>" + whole, "this is not a data shard(?s:.)*<!DOCTYP"),
        (b"", "this is not a data shard"),
        (whole[:8] + b"\2" + whole[9:], "unknown form(?s:.)*version 2"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "truncated"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=words):
            Shard.open(path)
    path.unlink()
    with pytest.raises(InputError, match="No such file"):
        Shard.open(path)


def test_fault_09_flipped_bit(tmp_path: Path) -> None:
    source, folder = prepared(tmp_path)
    path = folder / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="checksum of a data shard does not match") as caught:
        prepare([source], byte_tokenizer(), cache=tmp_path / "cache")
    assert str(path) in message(caught)
    assert f"delete {folder}" in message(caught)


def test_fault_10_replaced_data_have_another_fingerprint(tmp_path: Path) -> None:
    source, folder = prepared(tmp_path)
    before, _ = prepare([source], byte_tokenizer(), cache=tmp_path / "cache")
    Path(source.path).write_text("".join(json.dumps({"text": f"other text {i}"}) + "\n" for i in range(100)))
    after, _ = prepare([source], byte_tokenizer(), cache=tmp_path / "cache")
    assert after.fingerprint != before.fingerprint
    replacement = next(path for path in (tmp_path / "cache").iterdir() if path != folder)
    (folder / "val-00000.bin").write_bytes((replacement / "val-00000.bin").read_bytes())
    Path(source.path).write_text("")
    with pytest.raises(InputError, match="damaged or replaced"):
        load_corpus([folder])


BAD_TEXT = [
    (b"one\ntw\xff\n", "a.txt:2", "byte 0xff, invalid start byte", "invalid UTF-8"),
    (b"one\ntwo\n\xe4\xbd", "a.txt:3", "unexpected end of data", "invalid UTF-8"),
    ("caf\xe9".encode("latin-1"), "a.txt:1", "byte 0xe9", "invalid UTF-8"),
    ("text".encode("utf-16")[:-1], "a.txt", "truncated data", "invalid utf-16"),
    (b"one\n\ntwo\0three\n", "a.txt:3", "at byte 8", "NUL"),
]
BAD_LINES = [
    (b'{"text": "caf\xe9"}', "invalid continuation byte", "invalid UTF-8"),
    (b'{"text": "a\0b"}', "NUL", "NUL"),
    (b'{"text": "a\\u0000b"}', "NUL", "NUL"),
    (b'{"text": "\\ud800"}', r"a lone surrogate, '\ud800'", "invalid Unicode"),
    (b'{"text": "cut', "Unterminated string", "malformed JSON"),
    (b'{"text": "a"} {"text": "b"}', "Extra data", "malformed JSON"),
    (b"[" * 100_000, "this line is not JSON", "malformed JSON"),
    (b'["text"]', "this line is not a JSON object", "malformed JSON"),
    (b'{"body": "a"}', "there is no field 'text'", "no text field"),
    (b'{"text": 3}', "field 'text' is not a string", "no text field"),
    (b'{"text": null}', "field 'text' is not a string", "no text field"),
]


@pytest.mark.parametrize(("data", "place", "found", "reason"), BAD_TEXT)
def test_fault_11_text_that_is_no_text(tmp_path: Path, data: bytes, place: str, found: str, reason: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt").write_text("good")
    source = Source(path=str(tmp_path))
    with pytest.raises(InputError) as caught:
        list(documents(source))
    assert f"where: {tmp_path}/{place}\n" in message(caught)
    assert found in message(caught)
    report = Skipped()
    assert [document.text for document in documents(source, "skip", report)] == ["good"]
    assert (report.counts, report.locations) == ({reason: 1}, [f"{tmp_path}/{place}"])


@pytest.mark.parametrize(("line", "found", "reason"), BAD_LINES)
def test_fault_11_12_bad_line_of_jsonl(tmp_path: Path, line: bytes, found: str, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    source = Source(path=str(path))
    with pytest.raises(InputError) as caught:
        list(documents(source))
    assert f"where: {path}:2\n" in message(caught)
    assert found in message(caught)
    assert "data.on_error" in message(caught)
    report = Skipped()
    assert [document.text for document in documents(source, "skip", report)] == ["one", "three"]
    assert (report.counts, report.locations) == ({reason: 1}, [f"{path}:2"])


def test_fault_12_skipped_lines_are_counted_on_every_start(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "number {i}"}}\n' if i % 10 else "oops\n" for i in range(100)))
    for _ in range(2):
        corpus, _ = prepare([Source(path=str(path))], byte_tokenizer(), cache=tmp_path / "c", on_error="skip")
        assert corpus.skipped.counts == {"malformed JSON": 10}
        assert corpus.skipped.locations == [f"{path}:{n}" for n in range(1, 101, 10)]
        assert f"{path}:41" in str(corpus.skipped) and f"{path}:51" not in str(corpus.skipped)  # of many the first
    with pytest.raises(InputError, match=r"a\.jsonl:1"):
        prepare([Source(path=str(path))], byte_tokenizer(), cache=tmp_path / "c", on_error="stop")


def test_fault_12_nothing_left_after_skipping(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("oops\n")
    source = Source(path=str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match=r"holds no text(?s:.)*1 document left out: 1 malformed JSON"):
        prepare([source], byte_tokenizer(), cache=tmp_path / "c", on_error="skip")


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_fault_12_damaged_archive(tmp_path: Path, suffix: str) -> None:
    data = "".join(f'{{"text": "number {i * 7919}"}}\n' for i in range(20_000)).encode()
    packed = gzip.compress(data) if suffix == "gz" else pytest.importorskip("zstandard").compress(data)
    path = tmp_path / f"a.jsonl.{suffix}"
    for damaged in (packed[: len(packed) // 2], packed[:-1], data):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged or truncated") as caught:
            list(documents(Source(path=str(path))))
        assert str(path) in message(caught)
        report = Skipped()
        kept = list(documents(Source(path=str(path)), "skip", report))
        assert report.counts == {"damaged archive": 1}
        assert [document.text for document in kept] == [f"number {i * 7919}" for i in range(len(kept))]
