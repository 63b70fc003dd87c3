from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillama.data import prepare as module
from minillama.data.corpus import Corpus, Split
from minillama.data.prepare import load_corpus, prepare
from minillama.data.shards import Shard
from minillama.data.sources import Document, Source, documents
from minillama.data.split import Part, SplitSource, hash_fraction
from minillama.errors import InputError
from minillama.tokenizer import Tokenizer, TokenizerTrainer, byte_tokenizer

BYTES = byte_tokenizer()


def everything(split: Split) -> list[int]:
    return split.read(0, split.tokens).tolist()


def lines(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return Source(path=str(path))


def test_tinyshakespeare_is_cut_at_nine_tenths(shared: Path, tmp_path: Path) -> None:
    path = shared / "text" / "en" / "tinyshakespeare.txt"
    text = path.read_bytes().decode()
    corpus, tokenizer = prepare([Source(path=str(path))], TokenizerTrainer("char", 0), cache=tmp_path, val_fraction=0.1)
    border = int(len(text) * 0.9)
    assert corpus.separator is None
    assert (corpus.train[0].tokens, corpus.val[0].tokens) == (1_003_854, 111_540)  # nanoGPT's shakespeare_char
    assert tokenizer.decode(everything(corpus.train[0])) == text[:border]
    assert tokenizer.decode(everything(corpus.val[0])) == text[border:]
    assert corpus.val[0].bytes == len(text[border:].encode())


def test_documents_are_held_out_whole(shared: Path, tmp_path: Path) -> None:
    source = Source(path=str(shared / "text" / "en" / "c4_demo.jsonl"))
    texts = [document.text for document in documents(source)]
    corpus, _ = prepare([source], BYTES, cache=tmp_path)
    held = [text for text in texts if hash_fraction(text, "held out") < 0.05]
    kept = [text for text in texts if text not in held]
    assert 5 < len(held) < 30
    for split, expected in ((corpus.val[0], held), (corpus.train[0], kept)):
        assert everything(split) == [id_ for text in expected for id_ in [BYTES.bos_id, *text.encode()]]
        assert split.bytes == sum(len(text.encode()) for text in expected)
    assert corpus.separator == BYTES.bos_id


def test_a_document_stays_in_its_split_when_others_come(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(200)]

    def held_out(texts: list[str]) -> set[str]:
        parts = SplitSource(lines(tmp_path / "a.jsonl", texts), 0.2, "stop", 2**20).parts()
        return {part.text for part in parts if part.split == "val"}

    few, many = held_out(texts[50:150]), held_out(texts)
    assert few == many & set(texts[50:150])
    assert 20 < len(many) < 60


def test_a_long_document_is_not_held_out_among_many_short_ones(tmp_path: Path) -> None:
    long = next(text for i in range(99) if hash_fraction(text := f"{i} " * 9000, "held out") < 0.1)
    reader = SplitSource(lines(tmp_path / "a.jsonl", [*(f"text number {i}" for i in range(300)), long]), 0.1, "stop", 9)
    parts = [part for part in reader.parts() if part.split == "val"]
    assert reader.held_out == "the last 10% of each document, those under 1,000 characters whole"
    assert max(len(part.text) for part in parts) == pytest.approx(0.1 * len(long), abs=2)
    assert sum(len(part.text) for part in parts) == reader.chars["val"]


def test_two_documents_are_cut_by_characters(tmp_path: Path) -> None:
    """Both fall into the training split, so that the text is cut where 10 of 20 characters are over."""
    texts = ["c" * 8, "d" * 12]
    assert all(hash_fraction(text, "held out") > 0.5 for text in texts)
    parts = list(SplitSource(lines(tmp_path / "a.jsonl", texts), 0.5, "stop", 100).parts())
    assert parts == [Part("train", "c" * 8), Part("train", "dd", ends=False), Part("val", "d" * 10, starts=False)]


@pytest.mark.parametrize("memory", [0, 2**20])
def test_source_is_read_once_if_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    reads: list[Source] = []

    def counted(source: Source, *rest: Any) -> Iterator[Document]:
        reads.append(source)
        return documents(source, *rest)

    monkeypatch.setattr("minillama.data.split.documents", counted)
    texts = [f"text number {i}" for i in range(100)]
    reader = SplitSource(lines(tmp_path / "a.jsonl", texts), 0.1, "stop", memory)
    reader.scan()
    assert [part.text for part in reader.parts()] == texts
    assert [part.text for part in reader.parts()] == texts
    assert len(reads) == (1 if memory else 3)


def test_sample_for_the_tokenizer_spreads_over_training_documents(tmp_path: Path) -> None:
    texts = [f"{i:010d}" for i in range(1000)]
    reader = SplitSource(lines(tmp_path / "a.jsonl", texts), 0.1, "stop", 2**20)
    train = [part.text for part in reader.parts() if part.split == "train"]
    sample = list(reader.sample(2000))
    assert sum(map(len, sample)) <= 2000
    assert 150 < len(sample) <= 200
    assert [text for text in train if text in set(sample)] == sample
    assert int(sample[-1]) > 800
    assert list(reader.sample(10**6)) == train
    assert list(SplitSource(Source(path=str(_text(tmp_path, "abcdefghij"))), 0.5, "stop", 9).sample(3)) == ["abc"]


def test_sample_holds_the_beginning_of_every_long_document(tmp_path: Path) -> None:
    """A hash alone would leave all of them out, and the tokenizer would learn nothing."""
    texts = [letter * 125_000 for letter in "abcdefgh"]
    reader = SplitSource(lines(tmp_path / "a.jsonl", texts), 0.2, "stop", 2**20)
    assert sum(hash_fraction(text, "sample") < 0.01 for text in texts) < 8
    assert list(reader.sample(8000)) == [letter * 1000 for letter in "abcdefgh"]


def test_few_documents_give_their_ends(tmp_path: Path) -> None:
    """The held-out text is of all of them; short ones stay whole, and of many a hash takes some."""
    texts = ["".join(f"{name}{i:03} " for i in range(500)) for name in "abc"]
    reader = SplitSource(lines(tmp_path / "a.jsonl", [*texts, "short"]), 0.1, "stop", 2**20)
    parts = list(reader.parts())
    assert [part.text for part in parts if part.split == "val"] == [text[2250:] for text in texts]
    assert parts[-1] == Part("train", "short") and not parts[0].ends and not parts[1].starts
    assert reader.chars == {"train": 3 * 2250 + 5, "val": 3 * 250}
    said = "the last 10% of each document, those under 1,000 characters whole"
    assert reader.held_out == said
    many = SplitSource(lines(tmp_path / "b.jsonl", [f"{text}{i}" for i in range(40) for text in texts]), 0.1, "stop", 0)
    assert all(part.starts and part.ends for part in many.parts())
    assert re.fullmatch(r"\d+ of 120 documents", many.held_out)
    corpus, _ = prepare([Source(path=str(tmp_path / "a.jsonl"))], BYTES, cache=tmp_path / "c", val_fraction=0.1)
    assert corpus.held_out_part == reader.held_out
    assert BYTES.decode(corpus.prompt(8)) == texts[0][2250:2258]
    separate = Corpus(corpus.val, [Split([Shard(Path("x"), np.array([256, 7, 8, 256, 9]))], 257)], separator=256)
    assert separate.prompt(4) == [256, 7, 8]


@pytest.mark.parametrize("documents", [1, 3])
def test_a_prompt_begins_with_a_whole_word(documents: int, tmp_path: Path) -> None:
    """Held-out text is cut at a character, as that of others is, and may begin within a word."""
    text = "Once upon a midnight dreary while I pondered weak and weary " * 20
    source = lines(tmp_path / "a.jsonl", [f"{text}{i}" for i in range(documents)])
    for share in (0.1, 0.11, 0.12, 0.13):
        for i, trained in enumerate((BYTES, TokenizerTrainer("bpe", 280), TokenizerTrainer("unigram", 300))):
            corpus, tokenizer = prepare([source], trained, cache=tmp_path / f"{i}", val_fraction=share)
            prompt, held_out = tokenizer.decode(corpus.prompt(9)), tokenizer.decode(everything(corpus.val[0]))
            assert prompt.split()[0] in text.split(), (share, prompt, held_out[:40])
            assert prompt.strip() in held_out


def _text(folder: Path, text: str) -> Path:
    path = folder / "one.txt"
    path.write_text(text)
    return path


def test_second_start_reads_nothing(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = [
        Source(path=str(shared / "text" / "en" / "c4_demo.jsonl"), weight=3),
        Source(path=str(shared / "text" / "en" / "alice.txt")),
    ]
    said: list[str] = []
    first, tokenizer = prepare(
        sources, TokenizerTrainer("byte-bpe", 400), cache=tmp_path, progress=lambda what, share: said.append(what)
    )
    assert {what.split()[0] for what in said} == {"training", "tokenizing"}
    names = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(SplitSource, "scan", lambda self: pytest.fail("read again"))
    second, again = prepare(sources, TokenizerTrainer("byte-bpe", 400), cache=tmp_path)
    assert second.fingerprint == first.fingerprint
    assert again.fingerprint == tokenizer.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len(names) == 3
    assert (first.batch(1, 2, 8, 64) == second.batch(1, 2, 8, 64)).all()
    assert first.separator is not None and first.block_counts == [3072, 1024]


def test_key_follows_all_that_tokens_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lines(tmp_path / "a.jsonl", [f"text number {i}" for i in range(100)])
    cache = tmp_path / "cache"

    def folders(**changed: Any) -> int:
        tokenizer = changed.pop("tokenizer", BYTES)
        prepare([source], tokenizer, cache=cache, **changed)
        return sum(not path.name.startswith("tokenizer-") for path in cache.iterdir())

    assert folders() == 1
    assert folders() == 1
    assert folders(val_fraction=0.1) == 2
    assert folders(on_error="skip") == 3
    assert folders(tokenizer=TokenizerTrainer("char", 0)) == 4
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert folders() == 5
    monkeypatch.setattr(module, "VERSION", 0)
    assert folders() == 6


def test_table_names_the_python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.data.sources.builtin_documents", lambda name: documents(source))
    source = lines(tmp_path / "a.jsonl", [f"text number {i}" for i in range(100)])
    prepare([Source("python-docs")], BYTES, cache=tmp_path / "cache")
    (table,) = (tmp_path / "cache").glob("*/dataset.json")
    assert json.loads(table.read_text())["identity"]["python"] == platform.python_version()
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    prepare([Source("python-docs")], BYTES, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*/dataset.json"))) == 2


def test_fingerprint_follows_tokens_and_weights_and_not_the_clock(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(100)]
    first, second = lines(tmp_path / "a.jsonl", texts), lines(tmp_path / "b.jsonl", texts[:50])

    def fingerprint(*sources: Source) -> str:
        return prepare(sources, BYTES, cache=tmp_path / "cache")[0].fingerprint

    before = fingerprint(first, second)
    os.utime(tmp_path / "a.jsonl", ns=(1, 1))
    assert fingerprint(first, second) == before
    others = {
        fingerprint(second, first),
        fingerprint(first, Source(path=second.path, weight=2)),
        fingerprint(first),
        fingerprint(first, lines(tmp_path / "b.jsonl", [*texts[:49], "text number x"])),
    }
    assert len(others - {before}) == 4


def test_long_texts_are_encoded_in_pieces_that_change_nothing(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shared / "text" / "en" / "alice.txt"
    text = next(documents(Source(path=str(path)))).text
    tokenizer = TokenizerTrainer("byte-bpe", 1000)([text])
    monkeypatch.setattr(module, "CHUNK", 500)
    pieces = [piece.text for piece in module._chunks([Part("train", text)])]
    assert "".join(pieces) == text
    assert len(pieces) > 100 and max(map(len, pieces)) <= 1000
    corpus, _ = prepare([Source(path=str(path))], tokenizer, cache=tmp_path, val_fraction=0.1)
    border = int(len(text) * 0.9)
    assert everything(corpus.train[0]) == tokenizer.encode(text[:border])
    assert everything(corpus.val[0]) == tokenizer.encode(text[border:])


def test_pieces_of_a_text_without_blanks() -> None:
    text = "字" * (5 * module.CHUNK)
    pieces = list(module._chunks([Part("train", text)]))
    assert "".join(piece.text for piece in pieces) == text
    assert [(piece.starts, piece.ends) for piece in pieces] == [(True, False), (False, False), (False, True)]


def test_a_tokenizer_with_bos_and_eos_gets_both(shared: Path, tmp_path: Path) -> None:
    llama2 = Tokenizer.load(shared / "tokenizer" / "llama2" / "tokenizer.json")
    assert (llama2.bos_id, llama2.eos_id) == (1, 2)
    texts = ["Hello world", "你好", *(f"text number {i}" for i in range(50))]
    corpus, _ = prepare([lines(tmp_path / "a.jsonl", texts)], llama2, cache=tmp_path / "cache", val_fraction=0.2)
    train = [text for text in texts if hash_fraction(text, "held out") >= 0.2]
    assert everything(corpus.train[0]) == [id_ for text in train for id_ in [1, *llama2.encode(text), 2]]
    assert corpus.separator == 1


def test_two_processes_at_once(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", [f"text number {i}, with some words in it" for i in range(3000)])
    code = (
        "import sys; from pathlib import Path; from minillama.data.prepare import prepare\n"
        "from minillama.data.sources import Source; from minillama.tokenizer import TokenizerTrainer\n"
        "corpus, _ = prepare([Source('a.jsonl')], TokenizerTrainer('bpe', 300), cache=Path('cache'))\n"
        "print(corpus.fingerprint, 'torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(module.__file__).parents[2])}
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = {process.communicate()[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(printed) == 1 and printed.pop().endswith(" False\n")
    assert len(list((tmp_path / "cache").iterdir())) == 2  # a tokenizer, a data set, nothing temporary


def test_nothing_is_left_of_a_start_that_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines(path, [f"text number {i}" for i in range(100)])
    with path.open("a") as file:
        file.write("{")
    with pytest.raises(InputError, match=r"a\.jsonl:101"):
        prepare([Source(path=str(path))], TokenizerTrainer("char", 0), cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    source = lines(tmp_path / "a.jsonl", ["a", "b"])
    with pytest.raises(InputError, match=r"cannot write the cache(?s:.)*data\.cache"):
        prepare([source], BYTES, cache=tmp_path / "cache")


READ = ("splits", "skipped", "identity", "vocab_size", "separator")  # of the table


def test_broken_table(tmp_path: Path) -> None:
    prepare([lines(tmp_path / "a.jsonl", [f"text {i}" for i in range(50)])], BYTES, cache=tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    whole = json.loads((folder / "dataset.json").read_text())
    odd = [json.dumps(whole | {key: value}) for key in READ for value in ([], {"a": [3]})]
    for text in ("", "[]", "{}", '{"version": 99}', *odd):
        (folder / "dataset.json").write_text(text)
        with pytest.raises(InputError, match=r"dataset\.json(?s:.)*delete "):
            load_corpus([folder])


def test_shards_of_a_split_are_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text number {i}" for i in range(300)]
    source = lines(tmp_path / "a.jsonl", texts)
    whole, _ = prepare([source], BYTES, cache=tmp_path / "one")
    writer = module.ShardWriter
    monkeypatch.setattr(module, "ShardWriter", lambda *args: writer(*args, shard_tokens=1000))
    parts, _ = prepare([source], BYTES, cache=tmp_path / "two")
    assert len(parts.train[0].shards) > 3
    assert np.array_equal(parts.batch(1, 3, 8, 32), whole.batch(1, 3, 8, 32))
