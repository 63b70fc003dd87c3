"""`minillama tokenizer ...` as a person types it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from minillama import Tokenizer
from minillama.commands.cli import main
from minillama.tokenizer.train import Kind


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(
        "The miller kept two donkeys, a clock and a barrel of rain.\n驴子在磨坊里。\n" * 30, encoding="utf-8"
    )
    return file


def run(*words: object) -> int:
    return main(["tokenizer", *map(str, words)])


@pytest.mark.parametrize("kind", ["byte-bpe", "bpe", "unigram", "sentencepiece", "wordpiece", "word", "char", "bytes"])
@pytest.mark.parametrize("reference", [False, True])
def test_every_kind(
    kind: Kind, reference: bool, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["train", "--kind", kind, "--input", text, "--output", out, *(["--reference"] if reference else [])]
    if kind not in ("char", "word", "bytes"):
        words += ["--vocab-size", 290 if kind != "wordpiece" else 80]
    assert run(*words) == 0
    assert "wrote" in capsys.readouterr().err
    assert (out / "tokenizer.model").exists() == (kind == "sentencepiece")
    assert run("encode", "two donkeys", "--model", out) == 0
    ids = [int(word) for word in capsys.readouterr().out.split()]
    assert ids == Tokenizer.load(out).encode("two donkeys")
    assert run("decode", *ids, "--model", out) == 0
    assert capsys.readouterr().out == "two donkeys\n"
    assert run("explain", "two donkeys", "--model", out) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ids ")
    assert run("encode", "two", "--model", out, "--pieces") == 0
    assert len(capsys.readouterr().out.splitlines()) == len(Tokenizer.load(out).encode("two"))


def test_merging_and_comparing(
    text: Path, tmp_path: Path, shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llama2, grown = shared / "tokenizer/llama2/tokenizer.model", tmp_path / "grown"
    assert run("merge", llama2, "--add-characters", 50, "--input", text, "--special", "[PAD]", "--output", grown) == 0
    said = capsys.readouterr().err
    assert (
        "the texts hold 3 new characters, not 50" in said and "added 0 tokens, 3 characters, 1 special tokens" in said
    )
    assert Tokenizer.load(grown).vocab_size == 32_004
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("驴\n".encode())))
    assert run("encode", "-", "--model", grown) == 0
    assert capsys.readouterr().out.split() == [str(i) for i in Tokenizer.load(grown).encode("驴\n")]
    figures = ["compare", f"old={llama2}", f"new={grown}", "--input", text]
    assert run(*figures, "--plot", tmp_path / "plot.svg") == 0
    out = capsys.readouterr().out
    assert "text.txt" in out and "old" in out and "covered" in out and (tmp_path / "plot.svg").exists()
    assert run(*figures, "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert table["new"]["text.txt"]["coverage"] > table["old"]["text.txt"]["coverage"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (
            ["train", "--kind", "bpe", "--vocab-size", "9000", "--input", "TEXT", "--output", "OUT"],
            "larger than the text",
        ),
        (["train", "--kind", "byte-bpe", "--input", "BAD", "--output", "OUT"], "not UTF-8"),
        (["train", "--kind", "byte-bpe", "--input", "NONE", "--output", "OUT"], "no such file"),
        (["train", "--kind", "char", "--input", "TEXT", "--output", "TEXT"], "something at the destination"),
        (["merge", "BYTES", "TEXT", "--output", "OUT"], "not JSON"),
        (["merge", "BYTES", "BYTES"], "--output is missing"),
        (["decode", "9999", "--model", "BYTES"], "not in the vocabulary"),
        (["encode", "a", "--model", "NONE"], "cannot read the tokenizer"),
        (["compare", "BYTES", "--input", "EMPTY"], "no text"),
    ],
)
def test_one_clear_error(
    words: list[str], what: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, empty = tmp_path / "bad.txt", tmp_path / "empty.txt"
    bad.write_bytes(b"ab\xff\xfe")
    empty.write_bytes(b"")
    run("train", "--kind", "bytes", "--input", text, "--output", tmp_path / "bytes")
    places = {"TEXT": text, "BAD": bad, "EMPTY": empty, "BYTES": tmp_path / "bytes"}
    capsys.readouterr()
    places |= {"OUT": tmp_path / "out", "NONE": tmp_path / "none"}
    assert run(*[places.get(word, word) for word in words]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and what in said.err and not said.out
    assert not (tmp_path / "out").exists()


def test_a_third_partys_merges(shared: Path, tmp_path: Path) -> None:
    """As a person types it, to the last merge."""
    folder = shared / "tokenizer/bpe_train"
    words = ["--vocab-size", 500, "--ties", "greatest", "--input", folder / "corpus.en"]
    assert run("train", "--kind", "byte-bpe", *words, "--output", tmp_path / "out") == 0
    merges = json.loads((tmp_path / "out/tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    assert [" ".join(pair) for pair in merges] == lines


def test_settings_of_another_kind_and_nothing_to_do(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shared: Path
) -> None:
    llama2 = shared / "tokenizer/llama2/tokenizer.model"
    for words, what in [
        (
            ["train", "--kind", "bpe", "--pattern", "gpt-2", "--input", text, "--output", tmp_path / "a"],
            "another kind's",
        ),
        (["merge", llama2, "--add-characters", 9, "--output", tmp_path / "a"], "counts the characters of --input"),
        (["merge", llama2, "--output", tmp_path / "a"], "nothing to append"),
        (["compare", "--input", text], "no tokenizer is named"),
    ]:
        assert run(*words) == 1
        assert what in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
