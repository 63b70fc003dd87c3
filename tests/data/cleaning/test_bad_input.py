"""Damaged and hostile input: counted, named, left out; nothing hangs and nothing else is lost."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from minillama.data.cleaning import inputs
from minillama.data.cleaning.code import Code
from minillama.data.cleaning.document import Draft
from minillama.data.cleaning.extraction import Extract
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.warc import read_warc
from minillama.data.skipped import BadText
from minillama.data.sources import Source, documents

PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=%s\r\n%s\r\n%s"


def record(body: bytes, length: int | None = None, url: str = "http://a.org/") -> bytes:
    size = len(body) if length is None else length
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: {url}\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"


def page(text: str, charset: str = "utf-8", more: bytes = b"") -> bytes:
    return PAGE % (charset.encode(), more, text.encode(charset))


def found(path: Path, data: bytes, limit: int = 10_000) -> list[str]:
    path.write_bytes(data)
    return [item.reason if isinstance(item, BadText) else item.text for item in read_warc(path, limit)]


@pytest.mark.parametrize("zipped", [False, True])
def test_records_around_a_damaged_one_are_read(zipped: bool, tmp_path: Path) -> None:
    path, ok = tmp_path / "a.warc.gz", record(page("fine"))
    pack = gzip.compress if zipped else bytes
    for bad, reason in [
        (record(page("long"), 10**9), "false length"),
        (record(page("short" * 9), 60), "false length"),
        (record(page("x" * 20_000)), "too long"),
        (b"not a record\r\nat all\r\n\r\n", "no WARC header"),
        (record(page("x"), -5), "no length"),
        (record(PAGE % (b"utf-8", b"", b"a\0b")), "NUL"),
        (record(PAGE % (b"utf-8", b"Content-Encoding: gzip\r\n", gzip.compress(b"x" * 10**6))), "too long"),
        (record(PAGE % (b"utf-8", b"Content-Encoding: gzip\r\n", b"\x1f\x8b\x08 junk")), "damaged page"),
    ]:
        assert found(path, pack(ok) + pack(bad) + pack(ok)) == ["fine", reason, "fine"], reason


def test_cut_and_flipped_gzip_members(tmp_path: Path) -> None:
    members = [gzip.compress(record(page(f"page {i} " * 30))) for i in range(4)]
    texts = [f"page {i} " * 30 for i in range(4)]
    damaged = members[1][:60] + b"\xff" * 9 + members[1][69:]
    got = found(tmp_path / "a.warc.gz", members[0] + damaged + members[2] + members[3])
    assert [text for text in got if text.startswith("page")] == [texts[0], *texts[2:]] and "damaged archive" in got
    got = found(tmp_path / "a.warc.gz", b"".join(members)[:-30])
    assert got[:3] == texts[:3] and got[-1] == "damaged archive"


def test_zstd_whole_and_truncated(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    records = b"".join(record(page(f"page {i} {os.urandom(200_000).hex()}")) for i in range(4))
    packed = zstandard.compress(records)
    assert len(found(tmp_path / "a.warc.zst", packed, 10**6)) == 4
    got = found(tmp_path / "a.warc.zst", packed[: len(packed) // 2], 10**6)
    assert got[0].startswith("page 0") and got[-1] == "damaged archive" and 2 <= len(got) <= 4


def test_charsets(tmp_path: Path) -> None:
    path = tmp_path / "a.warc"
    assert found(path, record(page("größer", "iso-8859-1"))) == ["größer"]
    assert found(path, record(page("汉字", "gb2312"))) == ["汉字"]
    text = "Der König hörte, daß über den Bäumen Vögel flögen; schließlich öffnete er müde die große Tür. " * 3
    assert found(path, record(PAGE % (b"utf-8", b"", text.encode("cp1252")))) == [text]  # declared as another
    assert found(path, record(PAGE % (b"nonsense", b"", "汉字".encode()))) == ["汉字"]
    meta = '<meta charset="shift_jis">日本'.encode("shift_jis")
    assert found(path, record(PAGE.replace(b"; charset=%s", b"%s") % (b"", b"", meta)))[0].endswith("日本")
    chunked = b"4\r\n<p>a\r\n3\r\nbcd\r\n0\r\n\r\n"
    assert found(path, record(PAGE % (b"utf-8", b"Transfer-Encoding: chunked\r\n", chunked))) == ["<p>abcd"]


def test_bad_lines_and_files_are_named(clean: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "LIMIT", 10_000)
    lines = ['{"text": "fine"}', "[1]", '{"text": 3}', '{"text": "a\\u0000b"}', "{", '{"text": "%s"}' % ("x" * 20_000)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "last"}']))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"a" * 10**7))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"cut off" * 99)[:-12])
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "after"}\n')
    (tmp_path / "e.html").write_text("<div>" * 1500 + "deep")
    (tmp_path / "f.json").write_text(json.dumps([{"text": "y" * 20_000}]))
    kept, removed = clean([Input(str(tmp_path), "t")], Extract(max_depth=1000), name="result")
    assert [line["text"] for line in kept] == ["fine", "last", "after"]
    reasons = {(line["where"].rpartition("/")[2].partition(",")[0], line["removed"]["reason"]) for line in removed}
    assert reasons == {
        ("a.jsonl:2", "malformed JSON"), ("a.jsonl:3", "no text field"), ("a.jsonl:4", "NUL"),
        ("a.jsonl:5", "malformed JSON"), ("a.jsonl:6", "too long"), ("b.txt.gz", "too long"),
        ("c.txt.gz", "damaged archive"), ("d.jsonl:1", "invalid UTF-8"), ("e.html", "depth"), ("f.json", "too long"),
    }  # fmt: skip


@pytest.mark.parametrize(("suffix", "pack"), [(".bz2", bz2.compress), (".GZ", gzip.compress)])
def test_compressed_files_are_of_the_kind_within(suffix: str, pack: Any, tmp_path: Path) -> None:
    for name, data in (("c.warc", record(page("<p>c"))), ("p.html", b"<p>p"), ("t.txt", b"<p>t"), ("x.png", b"x")):
        (tmp_path / f"{name}{suffix}").write_bytes(pack(data))
    source = Input(str(tmp_path))
    drafts = [draft for path in source.files() for draft in source.documents(path)]
    assert [getattr(draft, "kind", "bad") for draft in drafts] == ["html", "html", ""]
    assert [item.text for item in documents(Source(str(tmp_path)))] == ["<p>t"]
    assert Code(min_alphanumeric=0)(Draft("def f(x): return x", where=f"a.py{suffix}:1")) is None


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_bombs_do_not_stop_a_cleaning(suffix: str, clean: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minillama.data import archives
    from minillama.data.cleaning.duplicates import ExactDuplicates

    monkeypatch.setattr(archives, "SMALL", 2**20)
    pack = gzip.compress if suffix == ".gz" else pytest.importorskip("zstandard").compress
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(b'{"text": "%s"}\n' % (b"a" * 9000) * 1000))
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n')
    kept, removed = clean([Input(str(tmp_path), "t")], ExactDuplicates(), name="result")
    assert kept[-1]["text"] == "fine"
    (bomb,) = (line for line in removed if line["removed"]["reason"] == "too large")
    assert bomb["where"].endswith(f"a.jsonl{suffix}") and "unpacked bytes" in bomb["removed"]["value"]


def test_real_crawls(shared: Path) -> None:
    for name, count in (("warc/sample-0000.warc.gz", 22), ("warc/example.warc", 1), ("wet/sample.warc.txt", 3)):
        (path,) = Input(str(shared / "web" / name)).files()
        items = list(Input(str(path), "t").documents(path))
        assert len(items) == count and not any(isinstance(item, BadText) for item in items)
        assert all(item.url.startswith("http") for item in items if not isinstance(item, BadText))
