from __future__ import annotations

import gzip
import json
import os
import platform
import sys
import zipfile
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from minillama.data import archives
from minillama.data.cleaning.inputs import Input
from minillama.data.encoding import _encoding
from minillama.data.skipped import Skipped
from minillama.data.sources import Source, documents, identity, records
from minillama.data.split import SplitSource
from minillama.errors import InputError


def texts(name: str, field: str = "text") -> list[str]:
    return [document.text for document in documents(Source(name, field=field))]


def test_exactly_one_of_name_and_path() -> None:
    for wrong in ({}, {"name": "a", "path": "b"}):
        with pytest.raises(InputError, match="either a name or a path"):
            Source(**wrong)


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\nthree \xe4\xbd\xa0\r\n")
    assert texts(str(path)) == ["one\ntwo\nthree 你\n"]
    assert next(documents(Source(path=str(path)))).where == str(path)


def test_real_jsonl(shared: Path) -> None:
    path = shared / "text" / "en" / "c4_demo.jsonl"
    expected = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    found = list(documents(Source(path=str(path))))
    assert [document.text for document in found] == [text.replace("\r\n", "\n") for text in expected]
    assert len(found) == 300
    assert found[41].where == f"{path}:42"


def test_field_of_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "no", "body": "yes"}\n\n{"body": "\\u4f60\\r\\n"}', encoding="utf-8")
    assert texts(str(path), "body") == ["yes", "你\n"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_files_read_as_the_plain_one(shared: Path, tmp_path: Path, suffix: str) -> None:
    def pack(data: bytes) -> bytes:
        if suffix == "gz":
            return gzip.compress(data)
        return pytest.importorskip("zstandard").compress(data)

    for plain in (shared / "text" / "en" / "c4_demo.jsonl", shared / "text" / "en" / "alice.txt"):
        data = plain.read_bytes()
        packed = tmp_path / f"{plain.name}.{suffix}"
        packed.write_bytes(pack(data[:100_000]) + pack(data[100_000:]))  # two members, two frames
        assert texts(str(packed)) == texts(str(plain))


def test_zstd_of_many_blocks(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    text = "".join(f"{i}\n" for i in range(1_000_000))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(text.encode()))
    assert texts(str(tmp_path / "a.txt.zst")) == [text]


def test_a_folder_is_read_by_name_and_below(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/y.jsonl", "c.png", ".git/d.txt", "B.txt", "a.txt.gz", "empty.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        data = b'{"text": "a/y.jsonl"}\n' if path.suffix == ".jsonl" else name.encode() * (name != "empty.txt")
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    assert texts(str(tmp_path)) == ["B.txt", "a/y.jsonl", "a/z.md", "a.txt.gz", "b.txt"]
    assert texts(str(tmp_path / "*.txt")) == ["B.txt", "b.txt"]
    assert texts(str(tmp_path / "**" / "*.md")) == ["a/z.md"]
    assert texts(str(tmp_path / "c.png")) == ["c.png"]  # named, so wanted


def test_links_are_followed_and_circles_named(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("a")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    assert texts(str(tmp_path)) == ["a", "a"]
    (tmp_path / "one" / "up").symlink_to(tmp_path)
    with pytest.raises(InputError, match="link is circular") as caught:
        texts(str(tmp_path))
    assert str(tmp_path / "one" / "up") in str(caught.value)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    for read in (documents, identity):
        with pytest.raises(InputError, match=r"cannot read this file: (?s:.)*self\.txt"):
            list(read(Source(path=str(tmp_path / "self.txt"))))


def test_nothing_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'python-docs'"):
        texts("python-doc")
    with pytest.raises(InputError, match=r"files ending in \.txt"):
        texts(str(tmp_path))
    with pytest.raises(InputError, match="a URL instead of a path"):
        identity(Source("https://example.org/a.txt"))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file, folder or built-in source"):
        texts(str(tmp_path / "nowhere.txt"))
    with pytest.raises(InputError, match=r"nothing matches"):
        texts(str(tmp_path / "*.txt"))
    with pytest.raises(InputError, match=r"this folder holds no text files"):
        texts(str(tmp_path))


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    """A PDF without one byte beyond ASCII, what zipfile and matplotlib write, and one among texts."""
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n")
    with zipfile.ZipFile(tmp_path / "b.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    Figure().savefig(tmp_path / "c.png")
    for name, kind in (("a.pdf", "a PDF"), ("b.docx", "a ZIP archive"), ("c.png", "a picture")):
        with pytest.raises(InputError, match=rf"not text(?s:.)*{name}\n  found: {kind}"):
            texts(str(tmp_path / name))
    (tmp_path / "a.pdf").rename(tmp_path / "a.txt")
    (tmp_path / "d.txt").write_text("One.")
    report = Skipped()
    assert [d.text for d in documents(Source(str(tmp_path)), "skip", report)] == ["One."] and report.total == 1


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(archives, "regular", refuse)  # root may read everything, so no mode bits
    with pytest.raises(InputError, match=r"cannot read this file: Permission denied(?s:.)*a\.txt"):
        texts(str(tmp_path))


def test_python_docs() -> None:
    found = {document.where: document.text for document in documents(Source("python-docs"))}
    assert len(found) > 400
    assert "try" in found["python-docs, topic try"]
    decoder = found["python-docs, module json.decoder"]
    assert decoder.startswith("json.decoder\n\n")
    assert "class JSONDecodeError(ValueError)\nSubclass of ValueError with" in decoder
    assert "JSONDecoder.raw_decode(self, s, idx=0)\nDecode a JSON document" in decoder
    assert not any("test_" in where or "idlelib" in where for where in found)
    assert "python-docs, module json" in found


def test_python_code() -> None:
    found = list(documents(Source("python-code")))
    names = [Path(document.where).as_posix() for document in found]
    by_name = {name.rsplit("/lib/", 1)[-1]: document for name, document in zip(names, found, strict=True)}
    assert any(name.endswith("json/decoder.py") for name in by_name)
    assert not any(part in name for name in by_name for part in ("/test/", "/tests/", "/idlelib/", "site-packages"))
    assert len(found) > 300
    assert [d.text for d in found] == [d.text for d in documents(Source("python-code"))]


def test_identity_of_built_in_sources_is_the_python_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(Source("python-docs"))
    assert before["python"] == ".".join(map(str, sys.version_info[:3])) or sys.version_info.releaselevel != "final"
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert identity(Source("python-docs")) != before
    assert identity(Source("python-docs")) != identity(Source("python-code"))


def test_identity_of_files_follows_name_size_and_time(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    source = Source(path=str(tmp_path))
    seen = [identity(source)]
    path.write_text("ab")
    seen.append(identity(source))
    path.rename(tmp_path / "b.txt")
    seen.append(identity(source))
    (tmp_path / "c.txt").write_text("c")
    seen.append(identity(source))
    seen.append(identity(Source(path=str(tmp_path), field="body")))
    assert len({json.dumps(one) for one in seen}) == len(seen)
    assert identity(source) == seen[3]
    assert identity(Source(path=str(tmp_path), weight=3.0)) == seen[3]


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode there")
def test_a_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("a")
    assert identity(Source(path=str(tmp_path)))["files"] == 1
    assert next(documents(Source(path=str(tmp_path)))).where == str(path)


def test_datasets_library_on_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    lines = "".join(json.dumps({"body": f"text {i}", "n": i}) + "\n" for i in range(5))
    (tmp_path / "set" / "train.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    assert texts("hf:./set", "body") == [f"text {i}" for i in range(5)]
    assert identity(Source("hf:./set"))["files"] == 1
    with pytest.raises(InputError, match=r"field 'n' is not a string(?s:.)*hf:./set, row 1"):
        texts("hf:./set", "n")
    with pytest.raises(InputError, match="the datasets library cannot read this"):
        texts("hf:./absent")


@pytest.mark.parametrize(("module", "name"), [("zstandard", "a.txt.zst"), ("datasets", "hf:something")])
def test_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    (tmp_path / "a.txt.zst").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'minillama\[data\]'"):
        texts(name)


def test_skipped_counts_add_up() -> None:
    one = Skipped({"NUL": 1}, ["a:1"])
    one.merge(Skipped({"NUL": 2, "invalid UTF-8": 1}, ["b:1", "c:1", "d:1", "e:1", "f:1"]))
    assert one.total == 4
    assert str(one) == "4 documents left out: 3 NUL, 1 invalid UTF-8 (a:1, b:1, c:1, d:1, e:1)"
    assert str(Skipped({"NUL": 1}, ["a:1"])) == "1 document left out: 1 NUL (a:1)"
    assert str(Skipped()) == ""


ZH = "潮水退了，船停在沙上。孩子们在岸边找贝壳，老人说明天的风会更大。\n" * 3
KO = "나는 어제 시장에 가서 사과와 배를 샀다. 날씨가 맑고 바람이 불었다. 우리는 함께 저녁을 먹고 이야기를 나누었다.\n"


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("gb18030", "1 file in GB18030"),
        ("utf-16", "1 file in UTF-16"),
        ("utf-32", "1 file in UTF-32"),
        ("utf-16-be", "1 file in UTF-16-BE"),
        ("utf-8-sig", ""),
        ("utf-8", ""),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz"])
def test_recognized_encodings(tmp_path: Path, encoding: str, said: str, suffix: str) -> None:
    text = ZH + "And in English: the boats are out.\n"
    written = json.dumps({"text": text}, ensure_ascii=False) + "\n" if suffix == ".jsonl" else text
    data = written.encode(encoding) if encoding != "utf-16-be" else ("a boat " * 99).encode(encoding)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix == ".txt.gz" else data)
    if encoding == "utf-16-be" and suffix == ".jsonl":
        return
    report = Skipped()
    found = [document.text for document in documents(Source(str(path)), report=report)]
    assert found == ["a boat " * 99 if encoding == "utf-16-be" else text]
    assert str(report) == said


def test_nul_bytes_do_not_make_utf_16(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one two\0three fou\0five!\n")
    with pytest.raises(InputError, match="NUL"):
        texts(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    "data", [KO.encode("euc_kr"), "Le café fermé à midi".encode("cp1252"), ZH.encode()[:-4] + b"\xff"]
)
def test_other_encodings_are_asked_for(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InputError, match=r"not UTF-8(?s:.)*iconv -f ENCODING -t UTF-8"):
        texts(str(tmp_path / "a.txt"))


def test_no_text_of_the_corpus_is_misread(shared: Path, tmp_path: Path) -> None:
    """Every Chinese text through GB18030, and texts in other encodings, which it is not."""
    for path in sorted((shared / "text" / "zh").glob("*.json")):
        assert _encoding(path.read_text(encoding="utf-8").encode("gb18030")[:65536]) == "gb18030", path
    others = {"jpn_Jpan": ("euc_jp", "shift_jis"), "rus_Cyrl": ("cp1251", "koi8_r"), "zho_Hant": ("big5", "utf-8")}
    for name, encodings in others.items():
        text = (shared / "text" / "flores200" / f"{name}.dev").read_text(encoding="utf-8")
        for encoding in encodings:
            assert _encoding(text.encode(encoding, "ignore")[:65536]) == "", (name, encoding)


def test_the_field_of_records_is_found_or_asked_for(tmp_path: Path) -> None:
    poems = [{"author": "A", "title": str(i), "paragraphs": [f"line {i}", "and more"]} for i in range(3)]
    (tmp_path / "poems.json").write_text(json.dumps(poems, indent=1))
    (tmp_path / "one.ndjson").write_text('{"n": 1, "words": "the only text"}\n')
    assert texts(str(tmp_path / "poems.json"), "") == ["line 0\nand more", "line 1\nand more", "line 2\nand more"]
    assert texts(str(tmp_path / "one.ndjson"), "") == ["the only text"]
    assert texts(str(tmp_path / "poems.json"), "title") == ["0", "1", "2"]
    (tmp_path / "open.jsonl").write_text('{"a": "x", "b": "y"}\n')
    with pytest.raises(InputError, match=r"(?s)no field of this record.*open.jsonl:1.*'a', 'b'.*--data.field"):
        texts(str(tmp_path / "open.jsonl"), "")


@pytest.mark.parametrize("first", ['{"id": "doc-1", "text": null}', '{"id": "doc-1", "text": []}', '{"url": "a.org"}'])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_first_record_without_text_does_not_choose_the_field(tmp_path: Path, first: str, name: str) -> None:
    path, second = tmp_path / name, '{"id": "doc-2", "text": "A real document."}'
    path.write_text(f"[{first}, {second}]" if name == "a.json" else f"{first}\n{second}\n")
    report = Skipped()
    found = [document.text for document in documents(Source(str(path)), "skip", report)]
    assert found == ["A real document."] and report.counts == {"no text field": 1}
    items = list(Input(str(path)).documents(path))
    assert [getattr(item, "text", None) or getattr(item, "reason", None) for item in items] == ["no text field", *found]


def test_every_file_of_a_folder_is_accounted_for(tmp_path: Path) -> None:
    (tmp_path / "poems.json").write_text('[{"title": "t", "content": "sea"}]')
    (tmp_path / "settings.json").write_text('{"depth": 3, "names": {}}')
    (tmp_path / "labels.json").write_text('["cat", "dog"]')
    for name in ("a.md", "b.md", "c.txt", "scan.pdf", "d/photo.jpg", "e.txt.gz", "Makefile", ".git/HEAD"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(b"e") if name.endswith("gz") else b"" if name == "b.md" else b"x")
    report = Skipped()
    found = [document.text for document in documents(Source(str(tmp_path)), report=report)]
    assert sorted(found) == ["e", "sea", "x", "x"]
    assert str(report) == (
        "7 files: 3 .json, 2 .md, 2 .txt; 1 file of records with their texts in 'content'; files left out: "
        "2 .json without a field of text (labels.json, settings.json), 1 hidden (.git), 1 without suffix (Makefile), "
        f"1 .jpg ({Path('d/photo.jpg')}), 1 .pdf (scan.pdf), 1 empty (b.md)"
    )
    seen = Skipped()
    assert len(list(records(Source(str(tmp_path)), "skip", seen))) == 2
    assert sum(count for count, _ in seen.files.values()) == 8 and seen.files[".md"] == (2, ["a.md", "b.md"])
    (tmp_path / "only").mkdir()
    (tmp_path / "settings.json").rename(tmp_path / "only" / "settings.json")
    with pytest.raises(InputError, match=r"(?s)holds no text.*1 \.json without a field of text \(sett.*--data.field"):
        SplitSource(Source(str(tmp_path / "only")), 0.1, "stop", 99).scan()


def test_the_names_of_files_are_cut_and_escaped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sea")
    for name in ("\x1b[31m.png", "b.png", "c.png", "d.png", f"{'long' * 50}.pdf"):
        (tmp_path / name).touch()
    for i in range(9):
        (tmp_path / f"z.{i}").touch()
    report = Skipped()
    assert list(documents(Source(str(tmp_path)), report=report))
    said = str(report)
    assert r"4 .png (\x1b[31m.png, b.png, c.png and 1 more)" in said and "3 for other reasons" in said
    assert f"1 .pdf ({'long' * 7}lo...nglonglonglonglonglonglong.pdf)" in said
    assert (
        report.record()["files"][".png"][0] == len(report.record()["files"][".png"][1]) == 4
        and len(report.record()["files"]) == 11
    )


def test_broken_json_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "b": [1, 2]')
    with pytest.raises(InputError, match=r"x\.json"):
        texts(str(tmp_path), "")
