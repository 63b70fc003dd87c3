"""ROUGE-L: rouge_score's numbers on English, sense in other scripts, and a search that gives what brute force gives."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.evaluate.rouge import Similar, lcs, rouge_l, rouge_tokens

WORDS = [
    *("the", "a", "cat's", "dog", "writes", "short-story", "story,", "about", "3", "cafés", "über", "under_score"),
    *("IT'S", "x2", "and", "of", "poem;", "why?", "(yes)"),
]
ZH = "请写一首关于春天秋天的诗把下面的句子翻译成英文"


def sentences(count: int, words: list[str], seed: int, longest: int = 30) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=chance.randrange(longest))) for _ in range(count)]


def test_the_published_measure_on_a_thousand_pairs() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the oracle").RougeScorer(["rougeL"])
    for one, other in zip(sentences(1000, WORDS, 1), sentences(1000, WORDS, 2), strict=True):
        assert abs(scorer.score(one, other)["rougeL"].fmeasure - rouge_l(one, other)) <= 1e-12


def test_known_answers() -> None:
    assert rouge_l("write a short story about a dog", "write a short poem about a cat") == pytest.approx(5 / 7)
    assert rouge_l("give three tips for staying healthy", "give five tips for staying healthy") == pytest.approx(5 / 6)
    assert rouge_l("", "a") == rouge_l("", "") == 0


def test_other_scripts_count() -> None:
    assert rouge_l(ZH, ZH) == 1 and rouge_l("写一首春天的诗", "写一首秋天的诗") == pytest.approx(6 / 7)
    assert rouge_tokens("Привет, мир! 東京 v2 ok") == ["привет", "мир", "東", "京", "v2", "ok"]
    assert rouge_l("напиши рассказ о море", "напиши стихи о море") == 0.75


@given(st.lists(st.sampled_from("abcd"), max_size=70), st.lists(st.sampled_from("abcd"), max_size=70))
def test_the_bits_are_the_table(one: list[str], other: list[str]) -> None:
    row = [0] * (len(other) + 1)
    for a in one:
        above = row[:]
        for j, b in enumerate(other):
            row[j + 1] = above[j] + 1 if a == b else max(above[j + 1], row[j])
    assert lcs(one, other) == row[-1] == lcs(other, one)


@pytest.mark.parametrize("count", [1, 10])
def test_the_search_is_exact(count: int) -> None:
    texts, index = [*sentences(1500, WORDS, 3, 12), *(ZH[i : i + 9] for i in range(12))], Similar()
    for text in texts:
        index.add(text)
    for asked in [*sentences(40, WORDS, 4, 12), ZH, "", "nothing of that"]:
        scored = sorted(((rouge_l(asked, text), -i) for i, text in enumerate(texts)), reverse=True)
        assert index.search(asked, count) == [
            (s, texts[-i]) for s, i in scored[:count] if s > 0 or rouge_overlap(asked, texts[-i])
        ]


def rouge_overlap(one: str, other: str) -> bool:
    return bool({*rouge_tokens(one)} & {*rouge_tokens(other)})


@pytest.mark.slow
def test_fifty_thousand_are_searched_in_time() -> None:
    """Under 50 ms of processor time per candidate."""
    words = [f"word{int(i**1.7)}" for i in range(60)] + WORDS
    index = Similar()
    for text in sentences(50_000, words, 5, 25):
        index.add(text)
    asked, begun = sentences(50, words, 6, 25), time.process_time()
    for text in asked:
        index.search(text)
    assert (time.process_time() - begun) / len(asked) < 0.05
