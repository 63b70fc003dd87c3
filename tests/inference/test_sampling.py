"""Samplers on distributions of four tokens, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from minillama.errors import InputError
from minillama.inference.request import GREEDY
from minillama.inference.sampling import (
    Sampler,
    Sampling,
    choose,
    min_p,
    repetition_penalty,
    temperature,
    top_k,
    top_p,
)

P = torch.tensor([[0.15, 0.5, 0.05, 0.3]])
LOGITS = P.log()


def kept(logits: torch.Tensor) -> list[bool]:
    return logits.isfinite()[0].tolist()


def test_temperature_divides() -> None:
    torch.testing.assert_close(temperature(LOGITS, 0.5).softmax(-1), P**2 / (P**2).sum())


def test_top_k_keeps_the_largest() -> None:
    assert kept(top_k(LOGITS, 2)) == [False, True, False, True]
    assert kept(top_k(LOGITS, 9)) == [True] * 4


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (0.4, [False, True, False, False]),
        (0.6, [False, True, False, True]),
        (0.9, [True, True, False, True]),  # 0.5 + 0.3 = 0.8, and the token that crosses 0.9 stays
        (0.99, [True] * 4),
    ],
)
def test_top_p_keeps_the_token_that_crosses(p: float, expected: list[bool]) -> None:
    assert kept(top_p(LOGITS, p)) == expected


def test_min_p_is_relative_to_the_most_probable() -> None:
    assert kept(min_p(LOGITS, 0.25)) == [True, True, False, True]  # 0.05 < 0.125 <= 0.15
    assert kept(min_p(LOGITS, 0.5)) == [False, True, False, True]


def test_repetition_penalty_lowers_both_signs() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert repetition_penalty(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert choose(LOGITS, [Sampler(Sampling(temperature=0), [0], 4)]) == [1]


def test_repetition_penalty_follows_what_was_chosen() -> None:
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=4.0), [3], 4)
    logits = torch.tensor([[0.0, 2.0, 1.0, 3.0]])
    assert [choose(logits, [sampler])[0] for _ in range(3)] == [1, 2, 3]  # 3/4 and 2/4 fall below 1, then 1/4 below 3/4


def test_frequencies_follow_the_distribution() -> None:
    sampler = Sampler(Sampling(temperature=1.0, seed=7), [0], 4)
    counts = torch.bincount(torch.tensor([choose(LOGITS, [sampler])[0] for _ in range(4000)]), minlength=4) / 4000
    torch.testing.assert_close(counts, P[0], atol=0.03, rtol=0)


def test_a_row_draws_the_same_whatever_its_neighbours() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = [Sampler(Sampling(temperature=1.0), [0], 50, seed) for seed in (5, 6, 7)]
    alone = Sampler(Sampling(temperature=1.0, seed=7), [0], 50)
    both = [(choose(logits, together)[2], choose(logits[2:], [alone])[0]) for _ in range(20)]
    assert all(a == b for a, b in both) and len(set(both)) > 5


def test_rows_are_chosen_together_as_they_are_alone() -> None:
    settings = [
        Sampling(temperature=1.0, seed=5, repetition_penalty=1.5),
        GREEDY,
        Sampling(temperature=1.0, seed=7, repetition_penalty=1.5),
        Sampling(temperature=0.7, top_p=0.8, seed=5),
    ]
    together, alone = ([Sampler(each, [i + 1], 50) for i, each in enumerate(settings)] for _ in range(2))
    for step in range(5):
        logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(step))
        expected = [choose(logits[i : i + 1], [sampler])[0] for i, sampler in enumerate(alone)]
        assert choose(logits, together) == expected
    for one, other in zip(alone, together, strict=True):
        assert (one.seen is None) == (other.seen is None)
        assert one.seen is None or torch.equal(one.seen, other.seen)  # type: ignore[arg-type]


def test_nan_logits_are_refused() -> None:
    with pytest.raises(InputError, match="not numbers"):
        choose(torch.full((1, 4), float("nan")), [Sampler(Sampling(), [0], 4)])
