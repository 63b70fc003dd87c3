from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.data.corpus import BLOCK, Corpus, Split
from minillama.data.shards import Shard
from minillama.errors import InputError


def split(tokens: int, vocab_size: int = 2**31, shards: int = 1, first: int = 0) -> Split:
    """A split whose token at place i is `first` + i."""
    parts = np.array_split(np.arange(first, first + tokens), shards)
    return Split([Shard(Path(f"shard-{i}"), part) for i, part in enumerate(parts)], vocab_size, bytes=4 * tokens)


def corpus(*tokens: int, weights: list[float] | None = None) -> Corpus:
    """Sources whose tokens say where they are: source * 1_000_000 + place."""
    return Corpus([split(n, first=i * 1_000_000) for i, n in enumerate(tokens)], [split(20)], weights)


@given(st.integers(1, 60), st.integers(1, 7), st.data())
@settings(deadline=None)
def test_read_over_shards_is_a_slice(tokens: int, shards: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, tokens))
    length = data.draw(st.integers(0, tokens - start))
    assert split(tokens, shards=shards).read(start, length).tolist() == list(range(start, start + length))
    with pytest.raises(IndexError):
        split(tokens).read(start, tokens - start + 1)


@given(st.integers(0, 100), st.integers(1, 30))
@settings(deadline=None)
def test_held_out_tokens_are_targets_exactly_once(tokens: int, length: int) -> None:
    windows = list(split(tokens, shards=2).val_windows(length))
    assert [int(token) for window in windows for token in window[1:]] == list(range(1, tokens))
    assert all(window[0] == window[1] - 1 for window in windows)
    assert all(len(window) == length + 1 for window in windows[:-1])


@given(st.integers(2, 400), st.integers(1, 20), st.integers(0, 3))
@settings(deadline=None)
def test_no_window_twice_within_an_epoch(tokens: int, length: int, seed: int) -> None:
    data = corpus(max(tokens, length + 1))
    (source,) = data.train
    count = source.windows(length)
    assert max(1, source.tokens // length - 1) == count
    for epoch in range(3):
        steps = range(epoch * count, (epoch + 1) * count)
        rows = np.concatenate([data.batch(seed, step, 1, length) for step in steps])
        assert (np.diff(rows, axis=1) == 1).all()
        targets = rows[:, 1:].ravel()
        assert len(set(targets.tolist())) == count * length  # no token is predicted twice
        assert len({start % length for start in rows[:, 0].tolist()}) == 1


def test_epochs_have_different_offsets_and_orders() -> None:
    data = corpus(1000)
    count = data.train[0].windows(10)
    epochs = [data.batch(0, epoch, count, 10)[:, 0].tolist() for epoch in range(20)]
    assert len({starts[0] % 10 for starts in epochs}) > 5
    assert len({tuple(start // 10 for start in starts) for starts in epochs}) == 20
    assert {token for starts in epochs for start in starts for token in range(start, start + 11)} > set(range(10, 990))


def test_batch_is_a_function_of_its_arguments_alone() -> None:
    def make() -> Corpus:
        return corpus(5000, 3000, weights=[1, 2])

    data = make()
    asked = {step: data.batch(7, step, 16, 8) for step in (900, 3, 511, 0, 3)}
    for step, rows in asked.items():
        assert (make().batch(7, step, 16, 8) == rows).all()
    assert not (data.batch(8, 3, 16, 8) == asked[3]).all()
    assert not (data.batch(7, 4, 16, 8) == asked[3]).all()


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_rows_of_several_processes_are_those_of_one(processes: int) -> None:
    data = corpus(5000, 3000, weights=[1, 2])
    whole = data.batch(1, 130, 30, 8)
    size = 30 // processes
    parts = [data.batch(1, 130, size, 8, first_row=i * size, total_rows=30) for i in range(processes)]
    assert (np.concatenate(parts) == whole).all()


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=5), st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_mixture_is_exact_in_every_block(weights: list[float], seed: int) -> None:
    data = corpus(*[200_000] * len(weights), weights=weights)
    assert sum(data.block_counts) == BLOCK
    for block in range(2):
        rows = np.concatenate([data.batch(seed, step, 512, 10) for step in range(8 * block, 8 * block + 8)])
        seen = Counter((rows[:, 0] // 1_000_000).tolist())
        for source, weight in enumerate(weights):
            assert seen[source] == data.block_counts[source]
            assert abs(seen[source] - weight / sum(weights) * BLOCK) < 1


def test_mixture_visits_each_source_without_repetition_across_blocks() -> None:
    data = corpus(30_000, 90_000, weights=[1, 3])
    starts = np.concatenate([data.batch(3, step, 64, 10)[:, 0] for step in range(3 * BLOCK // 64)])
    for source in (0, 1):
        mine = starts[starts // 1_000_000 == source]
        count = data.train[source].windows(10)
        assert len(np.unique(mine[:count])) == count


def test_sources_with_equal_tokens_are_read_in_different_orders() -> None:
    data = corpus(10_000, 10_000)
    rows = data.batch(0, 0, 400, 10)[:, 0]
    first, second = (rows[rows // 1_000_000 == source] % 1_000_000 for source in (0, 1))
    assert len(first) and first[:50].tolist() != second[:50].tolist()


def test_a_weight_too_small_to_matter_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.sources\.1\.weight"):
        corpus(100, 100, weights=[1, 1e-5])


def test_one_window_is_enough_to_train_on() -> None:
    data = corpus(9)
    assert data.batch(0, 0, 1, 8).tolist() == [list(range(9))] == data.batch(0, 5, 1, 8).tolist()
    data.check(8, 1)
