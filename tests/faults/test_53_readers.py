"""Evaluation sets, results, tables, models of cleaning steps and caches that are damaged: refused by name."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest

from minillama import Decoder, ModelConfig
from minillama.data.cleaning.ngram_lm import NgramLM
from minillama.data.cleaning.perplexity import PieceLM
from minillama.data.cleaning.topics import _pattern
from minillama.data.cleaning.warc import read_warc
from minillama.errors import InputError
from minillama.evaluate import files, judge
from minillama.evaluate.results import ITEMS, earlier, read_outcomes
from minillama.files import complete_records
from minillama.scaling.points import read_csv
from minillama.tokenizer import byte_tokenizer
from minillama.training.compile import Compiler

LINE = {"task": "t", "id": "1", "prompt": "p", "subject": "s", "gold": 0, "nats": [-1.0, -2.0]}
LINE |= {"characters": [1, 2], "bytes": [1, 2], "prior": []}


def line(**changes: object) -> bytes:
    return json.dumps(LINE | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "second", [b"\xff\n", b"3\n", line(nats=["a"]), line(characters=[1]), line(task=[]), b"[" * 5000 + b"\n", b"{}\n"]
)
def test_fault_53_outcomes(second: bytes, tmp_path: Path) -> None:
    (tmp_path / ITEMS).write_bytes(line() + second)
    with pytest.raises(InputError) as error:
        read_outcomes(tmp_path / ITEMS)
    assert str(error.value.where).startswith(str(tmp_path / ITEMS))


def test_fault_53_verdicts_and_summaries(tmp_path: Path) -> None:
    (tmp_path / "v.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(InputError, match="not a verdict"):
        complete_records(tmp_path / "v.jsonl", lambda value: judge.Verdict(**value), "this line is not a verdict")
    (tmp_path / "s.json").write_text('{"limit": 3}')
    with pytest.raises(InputError, match="damaged"):
        earlier(tmp_path / "s.json", 3, None)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.csv", b'q,a\n"' + b"x" * (csv.field_size_limit() + 1) + b'",b\n'),
        ("a.csv", b"q\n\xff\n"),
        ("a.csv.gz", gzip.compress(b"q,a\n1,2\n" * 99, mtime=0)[:-6]),
        ("a.txt.bz2", bz2.compress(b"q\n" * 600)[:-6]),
        ("a.txt.bz2", b"not an archive"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1"),
    ],
)
def test_fault_53_evaluation_sets(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        list(files.read(tmp_path / name, ()))
    assert error.value.where == tmp_path / name and "None" not in str(error.value)


def test_fault_53_a_packed_table_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\ufeffq,a\n1,x\u2028y\n".encode()))
    assert [row.value for row in files.read(tmp_path / "a.csv.gz", ())] == [{"q": "1", "a": "x\u2028y"}]


def test_fault_53_a_pipe_is_no_set_and_no_crawl(tmp_path: Path) -> None:
    for name in ("a.csv", "a.txt", "a.warc", "a.arpa", "words"):
        os.mkfifo(tmp_path / name)
    reads: list[tuple[str, Callable[[Path], object]]] = [
        ("a.csv", lambda path: list(files.read(path, ()))),
        ("a.txt", lambda path: list(files.read(path, ()))),
        ("a.warc", lambda path: list(read_warc(path, 100))),
        ("a.arpa", NgramLM.read_arpa),
        ("words", lambda path: _pattern(str(path))),
        ("a.csv", read_csv),
    ]
    for name, read in reads:
        with pytest.raises(InputError, match="not a regular file"):
            read(tmp_path / name)


@pytest.mark.parametrize("row", ["3,1e6,2e7,a\u2028b", "3,1e6,2e7"])
def test_fault_53_tables_of_runs(row: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"loss,params,tokens,name\n{row}\n", encoding="utf-8")
    (point,) = read_csv(tmp_path / "a.csv").points
    assert point.name == row[10:] and point.loss == 3


@pytest.mark.parametrize("change", [{"order": 9}, {"order": "a"}, {"tokens": []}, {"tokens": [[]]}, {"tokens": ["a"]}])
def test_fault_53_models_of_a_language(change: dict[str, object], tmp_path: Path) -> None:
    PieceLM.train(["the tide is in\n"], byte_tokenizer(), 2).save(tmp_path / "lm")
    path = tmp_path / "lm" / "ngram_lm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="not an n-gram model"):
        PieceLM.load(tmp_path / "lm")


def test_fault_53_a_cache_that_cannot_be_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compilation took is forgotten then, and the run goes on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "minillama").write_text("a file")
    config = ModelConfig(dim=16, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=16, vocab_size=16, max_seq_len=16)
    compiler = Compiler("false", Decoder(config), Mock())
    compiler.eager = 1.0
    compiler._remember([1.0, 0.1, 0.1])
    assert compiler._file() == {}
