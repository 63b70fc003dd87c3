"""The unigram model by hand, by exhaustion and against the library."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from minillama.errors import InputError
from minillama.tokenizer.reference.splitting import count_words
from minillama.tokenizer.reference.unigram import Unigram, digamma, seed_vocabulary, train

HUGS = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
COUNTS = {
    "h": 15, "u": 36, "g": 20, "hu": 15, "ug": 20, "p": 17, "pu": 17, "n": 16, "un": 16, "b": 4, "bu": 4, "s": 5,
    "hug": 15, "gs": 5, "ugs": 5,
}  # fmt: skip
MODEL = Unigram({piece: math.log(count / 210) for piece, count in COUNTS.items()})


def cuts(text: str, pieces: dict[str, float]) -> Iterator[list[str]]:
    if not text:
        yield []
    for end in range(1, len(text) + 1):
        if text[:end] in pieces:
            yield from ([text[:end], *rest] for rest in cuts(text[end:], pieces))


@pytest.mark.parametrize(
    ("word", "p"),
    [("hug", 0.0714286), ("pug", 0.00770975), ("pun", 0.0061678), ("bun", 0.00145125), ("hugs", 0.00170068)],
)
def test_best_cuts_by_hand(word: str, p: float) -> None:
    assert math.exp(MODEL.n_best(word, 1)[0][1]) == pytest.approx(p, rel=1e-5)


def test_the_corpus_loss_by_hand() -> None:
    def loss(model: Unigram) -> float:
        return -sum(count * model.n_best(word, 1)[0][1] for word, count in HUGS.items())

    assert loss(MODEL) == pytest.approx(169.80284, abs=1e-4)
    without = Unigram({piece: score for piece, score in MODEL.scores.items() if piece != "hug"})
    assert loss(without) - loss(MODEL) == pytest.approx(23.51375, abs=1e-4)
    for piece in ("pu", "ug", "hu", "gs", "ugs", "un", "bu"):
        without = Unigram({p: score for p, score in MODEL.scores.items() if p != piece})
        assert loss(without) == pytest.approx(loss(MODEL), abs=1e-9), piece


def test_all_cuts_of_hugs_by_hand() -> None:
    table = {" ".join(cut): math.exp(value) for cut, value in MODEL.n_best("hugs", 99)}
    want = {
        "hug s": 0.00170068, "hu gs": 0.00170068, "h ugs": 0.00170068, "h u gs": 0.000291545, "hu g s": 0.00016197,
        "h ug s": 0.00016197, "h u g s": 2.77662e-5,
    }  # fmt: skip
    assert table == pytest.approx(want, rel=1e-4)
    assert math.exp(MODEL.log_partition("hugs")) == pytest.approx(0.00574529, rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "best", "worst"), [(1.0, 0.296013, 0.004833), (0.5, 0.240441, 0.030722), (0.0, 1 / 7, 1 / 7)]
)
def test_samples_come_as_often_as_they_should(alpha: float, best: float, worst: float) -> None:
    generator = random.Random(1)
    drawn = Counter(" ".join(MODEL.sample("hugs", alpha, generator)) for _ in range(20_000))
    for cut, p in {"hug s": best, "hu gs": best, "h ugs": best, "h u g s": worst}.items():
        assert drawn[cut] / 20_000 == pytest.approx(p, abs=4 * math.sqrt(p / 20_000))


@given(text=st.text("hugpnbs", min_size=1, max_size=9))
@settings(deadline=None)
def test_against_all_cuts(text: str) -> None:
    every = {tuple(cut): sum(MODEL.scores[piece] for piece in cut) for cut in cuts(text, MODEL.scores)}
    ranked = MODEL.n_best(text, 5)
    assert [value for _, value in ranked] == pytest.approx(sorted(every.values(), reverse=True)[:5])
    assert len({tuple(cut) for cut, _ in ranked}) == len(ranked)
    total = math.log(sum(math.exp(value) for value in every.values()))
    assert MODEL.log_partition(text) == pytest.approx(total)
    counts, _ = MODEL.expected_counts(text, 2.0)
    for piece in MODEL.scores:
        mean = sum(math.exp(value - total) * cut.count(piece) for cut, value in every.items())
        assert counts.get(piece, 0.0) == pytest.approx(2 * mean, abs=1e-9)


LIBRARY = Backend(models.Unigram([("<unk>", 0.0), *MODEL.scores.items()], unk_id=0))


@given(text=st.text("hugpnbs", min_size=1, max_size=12))
@settings(deadline=None)
def test_the_library_finds_no_better_cut(text: str) -> None:
    theirs = sum(MODEL.scores[piece] for piece in LIBRARY.encode(text).tokens)
    assert MODEL.n_best(text, 1)[0][1] == pytest.approx(theirs)


def test_an_unknown_character_is_a_piece_of_its_own() -> None:
    assert MODEL.encode("hugxhug") == ["hug", "x", "hug"]


def test_digamma_by_its_own_values() -> None:
    assert digamma(1.0) == pytest.approx(-0.5772156649, abs=1e-9)
    assert digamma(0.5) == pytest.approx(-1.9635100260, abs=1e-9)
    assert digamma(30.0) == pytest.approx(3.3844381326, abs=1e-9)


def test_training_finds_the_words(shared: Path) -> None:
    """Probabilities, the size asked for, every character kept, and a shorter text than characters."""
    text = (shared / "text/en/tinystories_sample.txt").read_text(encoding="utf-8")
    words = count_words([text], "words")
    model = train(words, 200)
    assert len(model.scores) <= 200 and {char for word in words for char in word} <= set(model.scores)
    # the digamma takes something from every piece, so that the sum stays below one
    assert 0.85 < sum(map(math.exp, model.scores.values())) < 1
    pieces = sum(count * len(model.encode(word)) for word, count in words.items())
    chars = sum(count * len(word) for word, count in words.items())
    assert pieces < 0.55 * chars
    likely = sum(count * model.log_partition(word) for word, count in words.items())
    seed = Unigram(seed_vocabulary(words, 200))
    assert likely > sum(count * seed.log_partition(word) for word, count in words.items())
    with pytest.raises(InputError, match="characters alone"):
        train(words, 10)


def brute_repeats(words: dict[str, int], longest: int) -> dict[str, int]:
    counts, following = Counter[str](), dict[str, set[str]]()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + longest) + 1):
                counts[word[start:end]] += count
                following.setdefault(word[start:end], set()).add(word[end : end + 1])
    ends = {piece for piece, nexts in following.items() if len(nexts) > 1 or nexts == {""} or len(piece) == longest}
    return {piece: count for piece, count in counts.items() if count > 1 and piece in ends}


@given(
    words=st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(1, 3), max_size=6),
    longest=st.sampled_from([3, 16]),
)
@settings(deadline=None)
def test_the_seed_is_every_substring_that_goes_on_in_two_ways(words: dict[str, int], longest: int) -> None:
    expected = brute_repeats(words, longest)
    seed = seed_vocabulary(words, 10**6, longest) if words else {}
    assert {piece for piece in seed if len(piece) > 1} == set(expected)
    values = {piece: len(piece) * count for piece, count in expected.items()} | Counter(
        "".join(w * words[w] for w in words)
    )
    for piece, score in seed.items():
        assert math.exp(score) == pytest.approx(values[piece] / sum(values.values()))


def test_a_seed_from_bpe(shared: Path) -> None:
    text = (shared / "text/en/tinystories_sample.txt").read_text(encoding="utf-8")
    words = count_words([text], "words")
    seed = seed_vocabulary(words, 300, source="bpe")
    assert 300 < len(seed) < 300 + len(set(text)) and sum(map(math.exp, seed.values())) == pytest.approx(1)
    losses = [
        -sum(count * train(words, 200, seed=chosen).n_best(word, 1)[0][1] for word, count in words.items())
        for chosen in (None, seed)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    with pytest.raises(InputError, match="unknown source"):
        seed_vocabulary(words, 9, source="luck")  # type: ignore[arg-type]
