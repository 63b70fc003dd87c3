"""BPE by hand, against a third party's merges and against the library."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from minillama.errors import InputError
from minillama.tokenizer.pre import BYTE_TO_CHAR
from minillama.tokenizer.reference import bpe
from minillama.tokenizer.reference.byte_bpe import ByteBPE
from minillama.tokenizer.reference.pairs import join
from minillama.tokenizer.reference.splitting import characters, split

HUGS = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}


def test_merges_by_hand() -> None:
    assert bpe.train(HUGS, 4) == [("u", "g"), ("u", "n"), ("h", "ug"), ("p", "un")]
    assert bpe.train(HUGS, 99)[4:] == [("p", "ug"), ("hug", "s"), ("b", "un")]
    assert bpe.train({}, 3) == [] and bpe.train({"a": 4}, 3) == []


def test_sennrichs_example_with_the_first_seen_of_ties() -> None:
    """low:5 lower:2 newest:6 widest:3 with an end mark; the mark is one symbol, here `.`."""
    words = {"low.": 5, "lower.": 2, "newest.": 6, "widest.": 3}
    expected = ["e s", "es t", "est .", "l o", "lo w", "n e", "ne w", "new est.", "low .", "w i"]
    assert [" ".join(pair) for pair in bpe.train(words, 10, "first")] == expected


def test_bytes_by_hand() -> None:
    words = {"aaabdaaabac": 1}
    assert bpe.train(words, 3, "first") == [("a", "a"), ("aa", "a"), ("aaa", "b")]


def test_the_third_partys_merges_to_the_last(shared: Path) -> None:
    folder = shared / "tokenizer/bpe_train"
    texts = (folder / "corpus.en").read_text(encoding="utf-8").split("<|endoftext|>")
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    mine = ByteBPE.train(texts, 256 + len(lines), ties="greatest")
    assert [" ".join(pair) for pair in mine.merges] == lines and len(lines) == 243
    vocabulary = json.loads((folder / "train-bpe-reference-vocab.json").read_text(encoding="utf-8"))
    assert set(mine.pieces) == set(vocabulary) - {"<|endoftext|>"}


@pytest.mark.parametrize("name", ["tinystories_sample.txt", "botchan.txt"])
def test_the_librarys_merges_and_ids(name: str, shared: Path) -> None:
    text = (shared / "text/en" / name).read_text(encoding="utf-8")[:150_000]
    theirs = Backend(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=BYTE_TO_CHAR, show_progress=False)
    theirs.train_from_iterator([text], trainer)
    mine = ByteBPE.train([text], 900)
    assert [list(pair) for pair in mine.merges] == json.loads(theirs.to_str())["model"]["merges"]
    assert mine.ids == theirs.get_vocab()
    assert mine.encode(text) == theirs.encode(text).ids


BYTE = ByteBPE.train(["low lower newest widest, isn't it? " * 5], 290)


@given(text=st.text(), pattern=st.sampled_from(["gpt-2", "cl100k", "llama-3"]))
@settings(deadline=None)
def test_nothing_is_lost(text: str, pattern: str) -> None:
    assert "".join(split(text, pattern)) == text
    mine = ByteBPE(BYTE.merges, pattern)
    assert mine.decode(mine.encode(text)) == text


@given(words=st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 9), max_size=8))
@settings(deadline=None)
@pytest.mark.parametrize("ties", ["library", "first", "greatest"])
def test_incremental_counts_are_those_of_counting_anew(ties: bpe.Ties, words: dict[str, int]) -> None:
    merges = bpe.train(words, 12, ties)
    cut = {word: list(word) for word in words}
    for pair in merges:
        counts: Counter[bpe.Merge] = Counter()
        for word, symbols in cut.items():
            for two in pairwise(symbols):
                counts[two] += words[word]
        assert counts[pair] == max(counts.values())
        if ties == "first":
            assert pair == next(p for p in counts if counts[p] == counts[pair])
        if ties == "greatest":
            assert pair == max(p for p in counts if counts[p] == counts[pair])
        cut = {word: join(symbols, pair, "".join(pair)) for word, symbols in cut.items()}


def test_splits_by_hand() -> None:
    text = "I'LL pay $12345.67  now\n\n\n  ok"
    assert split(text, "gpt-2") == ["I", "'", "LL", " pay", " $", "12345", ".", "67", " ", " now", "\n\n\n ", " ok"]
    for pattern in ("cl100k", "llama-3"):
        parts = ["I", "'LL", " pay", " $", "123", "45", ".", "67", " ", " now", "\n\n\n", " ", " ok"]
        assert split(text, pattern) == parts
    assert split("a b, c!", "words") == ["a", "b", ",", "c", "!"] and split("a b, c!", "spaces") == ["a", "b,", "c!"]
    assert characters("中é") == ["中", "é"]
    with pytest.raises(InputError, match="unknown pattern"):
        split("a", "gpt-9")
    with pytest.raises(InputError, match="unknown rule for ties"):
        bpe.train({}, 1, "luck")  # type: ignore[arg-type]
