"""Overlap of training text with evaluation sets: windows, Chinese, removal, and what a run remembers of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from minillama.commands.cli import main
from minillama.errors import InputError
from minillama.evaluate.decontaminate import Index, marker, normalized, record_of, texts

GOAL = "one two three four five six seven eight nine ten eleven twelve thirteen"
CHINESE = "春天来了河边的柳树都发芽了"


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    folder = tmp_path / "eval" / "piqa"
    folder.mkdir(parents=True)
    records = [(GOAL, "left", "right"), (CHINESE, "甲", "乙"), ("too short", "a", "b"), ("a b c d e f g h", "i", "j")]
    lines = (json.dumps({"goal": goal, "sol1": a, "sol2": b}) + "\n" for goal, a, b in records)
    (folder / "valid.jsonl").write_text("".join(lines))
    (folder / "valid-labels.lst").write_text("0\n1\n0\n0\n")
    return tmp_path / "eval"


def test_thirteen_words_are_one_window(sets: Path) -> None:
    index = Index(sets)
    assert len(normalized(CHINESE)) == 13 and normalized("It's 3,5 – ÉTÉ.") == ["it's", "3", "5", "été"]
    found = index.hits(f"x {GOAL.upper().replace(' ', ', ')}! y", "f:1")
    assert [(hit.where, hit.set, hit.words) for hit in found] == [("f:1", "piqa", GOAL)]
    assert index.hits(GOAL.rpartition(" ")[0], "f:1") == []  # twelve of them
    assert len(index.hits(f"昨天，{CHINESE}。", "f:2")) == 1 and index.hits(CHINESE[:-1], "f:2") == []
    assert len(index.hits("0 a b c d e f g h 1", "f:3")) == 1  # a short text is looked for as a whole
    assert (index.items, index.short) == ({"piqa": 4}, 1)
    with pytest.raises(InputError, match="no evaluation set"):
        Index(sets / "piqa")


def test_documents_are_listed_and_removed(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, report = tmp_path / "t.jsonl", tmp_path / "clean.jsonl", tmp_path / "report.jsonl"
    records = [{"text": "nothing of it"}, {"messages": [{"content": f"so {GOAL}"}]}, {"text": CHINESE}]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["data", "decontaminate", str(source), "--against", str(sets)]
    assert main([*words, "--remove", str(out), "--report", str(report)]) == 0
    assert "2 of 3 documents" in capsys.readouterr().out
    assert [json.loads(line)["where"] for line in report.read_text().splitlines()] == [f"{source}:2", f"{source}:3"]
    assert [json.loads(line) for line in out.read_text().splitlines()] == records[:1]
    made = record_of(out)
    assert made is not None and (made["removed"], made["documents"], made["items"]) == (2, 3, {"piqa": 4})
    out.write_text(source.read_text())  # another file under the same name
    assert marker(out).exists() and record_of(out) is None and record_of(source) is None


def test_the_training_data_is_not_overwritten(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "t.jsonl"
    source.write_text(json.dumps({"text": GOAL}) + "\n")
    before = source.read_text()
    monkeypatch.chdir(tmp_path)
    for option in ("--remove", "--report"):
        assert main(["data", "decontaminate", str(source), "--against", str(sets), option, "t.jsonl"]) == 1
        assert "overwrite the training data" in capsys.readouterr().err and source.read_text() == before


@pytest.mark.parametrize("name", ["clean.txt.gz", "clean.txt.zst"])
def test_a_compressed_file_is_compressed(
    name: str, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "t.txt", tmp_path / name
    source.write_text(f"one\ntwo\n\n \n{GOAL}\n\nthree\n")
    done = main(["data", "decontaminate", str(source), "--against", str(sets), "--remove", str(out)])
    if name.endswith(".zst"):
        assert done == 1 and "compression is not written" in capsys.readouterr().err and not out.exists()
    else:
        assert done == 0 and gzip.decompress(out.read_bytes()) == b"one\ntwo\n\nthree\n\n"
        assert record_of(out) is not None and "1 of 3 documents" in capsys.readouterr().out


def test_parts_without_answers_are_compared_too(sets: Path) -> None:
    (sets / "piqa" / "test.jsonl").write_text(json.dumps({"goal": "nine " * 13, "sol1": "a", "sol2": "b"}) + "\n")
    assert Index(sets).items == {"piqa": 5} and Index(sets).hits("nine " * 14, "f:1")


def test_a_blank_is_filled_and_marks_of_wikihow_are_left_out(tmp_path: Path) -> None:
    """WinoGrande's texts in training data have an answer at the blank, where it breaks every window of 13 words."""
    before, after = "one two three four five six seven eight", "ten eleven twelve thirteen fourteen fifteen."
    for name, answer in (("dev", "1"), ("test", "")):
        record = {"sentence": f"{before} {name} _ {after}", "option1": "left", "option2": "right", "answer": answer}
        (tmp_path / "winogrande").mkdir(exist_ok=True)
        (tmp_path / f"winogrande/{name}.jsonl").write_text(json.dumps(record) + "\n")
    marked = {
        "activity_label": "Tie",
        "ctx_a": f"a b c d e f g [title] {before}",
        "ctx_b": "",
        "endings": ["0 [step] 1"],
    }
    (tmp_path / "hellaswag").mkdir()
    (tmp_path / "hellaswag/hellaswag_val.jsonl").write_text(json.dumps(marked | {"label": 0}) + "\n")
    index = Index(tmp_path)
    assert index.hits(f"{before} dev left {after}", "f:1") and not index.hits(f"{before} dev right {after}", "f:2")
    assert all(index.hits(f"{before} test {option} {after}", "f:3") for option in ("left", "right"))
    assert index.hits(f"{before} dev _ {after}", "f:4")  # as published
    assert index.hits(f"c d e f g {before}", "f:5") and index.hits(f"c d e f g [title] {before}", "f:6")
    assert index.hits("two three four five six seven eight 0 1", "f:7") == []  # nine of more than thirteen words
    assert index.hits(f"c d {before} 0 1", "f:8") == [] and index.hits(f"e f g {before} 0 1", "f:9")


def test_records_that_are_kept_stand_as_they_were(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "t.jsonl", tmp_path / "clean.jsonl"
    kept = ['{"text": "one",  "score": 1.10, "big": 1E400}', r'{"text": "\u00e9"}']
    source.write_text("\n".join([kept[0], "", json.dumps({"text": GOAL}), kept[1]]) + "\n")
    words = ["data", "decontaminate", str(source), "--against", str(sets), "--remove"]
    assert main([*words, str(out)]) == 0 and out.read_text().splitlines() == kept
    array = tmp_path / "a.json"
    array.write_text(json.dumps([{"text": "one"}, {"text": GOAL}], indent=1))
    assert main([*words[:2], str(array), *words[3:], str(out)]) == 0 and out.read_text() == '{"text": "one"}\n'
    capsys.readouterr()
    for name in ("clean.json", "clean.json.gz"):
        assert main([*words, str(tmp_path / name)]) == 1 and not (tmp_path / name).exists()
        assert "written as lines" in capsys.readouterr().err


def test_a_text_has_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one\ntwo\n\nthree\n")
    assert [(text.text.strip(), text.where) for text in texts(path)] == [
        ("one\ntwo", f"{path}, paragraph 1"),
        ("three", f"{path}, paragraph 2"),
    ]
