"""Texts that were cut, left out or measured otherwise than they are used, without a word."""

from __future__ import annotations

import gzip
import io
import json
import random
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from minillama import Decoder, InputError, ModelConfig, Tokenizer
from minillama.commands.cli import main
from minillama.config.loader import check
from minillama.data.prepare import prepare
from minillama.data.sources import CLEANED, Source, documents, find_files
from minillama.files import complete_lines
from minillama.formats.open import open_model
from minillama.inference.generate import StopText
from minillama.inference.load import read_prompts, read_texts
from minillama.inference.sampling import Sampler, Sampling
from minillama.runs.config import RunConfig
from minillama.runs.sections import DataConfig
from minillama.tokenizer import byte_tokenizer
from minillama.training.objectives.lm import LanguageModel

ROWS = [{"text": "first"}, {"text": "second"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


# prompts in files


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "p.jsonl",
            '{"prompt": "one\u2028two\u2029\x85"}\n\n{"prompt": "three"}\r\n',
            ["one\u2028two\u2029\x85", "three"],
        ),
        ("p.jsonl", '\ufeff{"prompt": "x"}', ["x"]),
        ("P.JSONL", '{"prompt": "x"}', ["x"]),
        ("p.json", '[{"prompt": "x"},\n {"prompt": "y"}]', ["x", "y"]),
        ("p.txt", "\ufeffx\x0cz\u2028 A\r\n\n y \n", ["x\x0cz\u2028 A", " y "]),
    ],
)
def test_prompts_are_lines_and_no_more(name: str, text: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_texts((), tmp_path / name, "prompt") == expected
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert read_texts((), tmp_path / f"{name}.gz", "prompt") == expected


def test_what_generate_writes_it_reads_again(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a\u2028b", "completion": "c\x85d"}, ensure_ascii=False)
    (tmp_path / "out.jsonl").write_text(line + "\n", encoding="utf-8")
    assert read_texts((), tmp_path / "out.jsonl", "completion") == ["c\x85d"]


@pytest.mark.parametrize("text", ["{", '{"text": 3}', '{"prompt": 3}', "[1]", "\xff"])
def test_a_prompt_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"prompt": "x"}\n' + text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_texts((), path, "prompt")
    assert error.value.where == f"{path}:2"


# training data


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("a.json", json.dumps(ROWS)), ("b.json", json.dumps(ROWS, indent=2)), ("c.json", LINES)),
        *(("d.ndjson", LINES), ("E.JSONL", LINES), ("F.Json", LINES)),
    ],
)
def test_records_of_any_spelling_are_documents(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    for source in (str(tmp_path / name), str(tmp_path)):
        assert [document.text for document in documents(Source(path=source))] == ["first", "second"]


@pytest.mark.parametrize("name", ["rows.csv", "rows.TSV", "rows.csv.gz", "rows.parquet"])
def test_a_table_is_no_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text\nfirst\n")
    with pytest.raises(InputError, match="a table is not read"):
        list(documents(Source(path=str(tmp_path / name))))


@pytest.mark.parametrize("listed", [["../secret.txt"], ["/etc/hostname"], [3], "x"])
def test_a_cleaned_folder_lists_its_own_files(listed: object, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "data").mkdir()
    shards = [{"file": name} for name in listed] if isinstance(listed, list) else listed
    (tmp_path / "data" / CLEANED).write_text(json.dumps({"shards": shards}))
    with pytest.raises(InputError):
        list(documents(Source(path=str(tmp_path / "data"))))


def test_a_long_document_has_the_ids_of_one_piece(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks after the first get no dummy prefix of their own."""
    monkeypatch.setattr("minillama.data.prepare.CHUNK", 100)
    tokenizer = Tokenizer.load(shared / "tokenizer/llama2/tokenizer.model")
    text = " ".join(random.Random(0).choices(["cat", "naïve", "中文", "1,000", "of\n", "dogs."], k=400))
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    corpus, _ = prepare([Source(path=str(tmp_path / "long.jsonl"))], tokenizer, cache=tmp_path / "cache")
    sides = [split for split in (*corpus.train, *corpus.val) if split.tokens]
    ids = np.concatenate([split.read(0, split.tokens) for split in sides])
    expected = [1, *tokenizer.encode(text), 2, 1, *tokenizer.encode("short"), 2]
    assert sorted(ids) == sorted(expected)


def test_chunks_of_a_text_are_encoded_as_inside(shared: Path) -> None:
    llama2, plain = Tokenizer.load(shared / "tokenizer/llama2/tokenizer.model"), byte_tokenizer()
    texts = ["a cat", " sat on", "", " \n mat"]
    for tokenizer in (llama2, plain):
        mixed = tokenizer.encode_batch(texts, [False, True, True, False])
        assert mixed == [
            tokenizer.encode(texts[0]),
            tokenizer.encode_inside(texts[1]),
            [],
            tokenizer.encode(texts[3]),
        ]
    assert llama2.encode("a cat") + llama2.encode_inside(" sat on") == llama2.encode("a cat sat on")


# training


def test_masked_documents_are_validated_as_they_are_trained() -> None:
    """Each document of a packed window as if it were alone."""
    model = Decoder(ModelConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=32, vocab_size=20, max_seq_len=32))
    documents_ = [[0, 5, 6, 7], [0, 9], [0, 11, 12, 13, 14, 15]]
    window = np.array([*chain(*documents_), 0], np.int64)
    alone, start = 0.0, 0
    for document in documents_:
        ids = torch.from_numpy(window[start : start + len(document) + 1])[None]
        alone += model.loss(model.hidden(ids[:, :-1]), ids[:, 1:]).item()
        start += len(document)
    held_out = SimpleNamespace(
        fingerprint="",
        prompt=lambda length: [0],
        held_out=lambda context, limit: [(SimpleNamespace(bytes=13, tokens=13), [window])],
    )
    for separator, is_alone in ((0, True), (None, False)):
        objective: Any = LanguageModel(model, held_out, 0, 2, 12, separator=separator)
        nats = objective.validate(2, 0)["val_loss"] * (len(window) - 1)
        assert (abs(nats - alone) < 1e-4) is is_alone


def test_a_recurrence_cannot_mask_documents() -> None:
    with pytest.raises(InputError, match="recurrences read the whole") as error:
        RunConfig(model=ModelConfig.load("rwkv-tiny"), data=DataConfig(mask_documents=True))
    assert error.value.where == "data.mask_documents"


def test_a_leap_of_the_learning_rate_is_named(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert main([*words, "--optim.warmup_steps", "1", "--out", out]) == 0
    for steps, is_leap in ((2, False), (8, True)):
        capsys.readouterr()
        assert main(["train", "--out", out, "--resume", "--train.steps", str(steps)]) == 0
        assert ("resuming with a learning rate of" in capsys.readouterr().out) is is_leap


# decoding


@pytest.mark.parametrize("temperature", [1e-7, 1e-40, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([1.0, 50.0, -3.0])
    sampler = Sampler(Sampling(temperature=temperature), [0], 3)
    assert sampler.probabilities(logits).tolist() == [0.0, 1.0, 0.0]
    assert sampler.draw(sampler.probabilities(logits)) == 1


def test_a_seed_that_no_generator_takes_is_out_of_range() -> None:
    check(Sampling(seed=-(2**63)))
    with pytest.raises(InputError, match="seed is out of range"):
        check(Sampling(seed=2**64))
    with pytest.raises(InputError, match="seed is out of range"):
        check(RunConfig(seed=2**60))


def test_where_a_text_stops_does_not_depend_on_how_it_comes() -> None:
    """The earliest stop string counts, though a later and shorter one is complete before it."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ab\nU:🦙", k=rng.randrange(1, 14)))
        stops = ["".join(rng.choices("ab\nU:🦙", k=rng.randrange(1, 4))) for _ in range(rng.randrange(1, 4))]
        ends = [at for at in map(text.find, stops) if at >= 0]
        stop, out, rest, hit = StopText(stops), "", text, False
        while rest and not hit:
            size = rng.randrange(1, 5)
            shown, hit = stop.push(rest[:size])
            out, rest = out + shown, rest[size:]
        assert out + stop.flush() == text[: min(ends, default=len(text))], (text, stops)


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    """And a link is not followed, as what it leads to would be cut."""
    path = tmp_path / "verdicts.jsonl"
    path.write_text('{"text": "one\u2028two"}\n{"text": "cut', encoding="utf-8")
    assert complete_lines(path) == ['{"text": "one\u2028two"}'] and path.read_bytes().endswith(b"}\n")
    (tmp_path / "notes.txt").write_text("kept")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "notes.txt")
    with pytest.raises(InputError):
        complete_lines(tmp_path / "link.jsonl")
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_prompts_of_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\u2028three\n"))
    assert read_prompts((), Path("-")) == ["one", "two\u2028three"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(InputError, match="the file holds no prompt"):
        read_prompts((), Path("-"))


def test_the_nearest_path_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "mytext").mkdir()
    with pytest.raises(InputError, match=r"no such model(?s:.*)did you mean .*mytext\?"):
        open_model(tmp_path / "mytxt")
    with pytest.raises(InputError, match=r"no such file(?s:.*)did you mean .*mytext\?"):
        find_files(str(tmp_path / "mytxt"))
    with pytest.raises(InputError) as error:
        open_model(tmp_path / "none" / "mytxt")
    assert error.value.fix is None
