from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.data.permutation import derive_keys, permute


def order(size: int, *key: int) -> list[int]:
    return permute(np.arange(size, dtype=np.uint64), size, derive_keys(*key)).astype(int).tolist()


@given(st.integers(1, 5000), st.integers(0, 2**70))
@settings(deadline=None)
def test_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(order(size, seed)) == list(range(size))


@given(st.integers(1, 2**62), st.integers(0, 100))
@settings(deadline=None)
def test_one_index_at_a_time_is_the_same(size: int, seed: int) -> None:
    indices = np.unique(np.array([0, size // 3, size // 2, size - 1], np.uint64))
    together = permute(indices, size, derive_keys(seed))
    alone = [permute(indices[i : i + 1], size, derive_keys(seed))[0] for i in range(len(indices))]
    assert together.tolist() == [int(x) for x in alone]
    assert len(set(together.tolist())) == len(indices)
    assert (together < size).all()


def test_order_is_the_same_for_ever() -> None:
    """Recorded: a run that is resumed with a later version must go on with the same data."""
    assert order(10, 1) == [7, 0, 8, 1, 3, 6, 4, 2, 9, 5]


def test_keys_make_different_orders_that_look_random() -> None:
    orders = np.array([order(1000, seed) for seed in range(50)])
    assert len(np.unique(orders, axis=0)) == 50
    # Neighbours land 333 apart on average, where places are independent, and the mean over orders is flat.
    assert abs(np.abs(np.diff(orders, axis=1)).mean() - 1000 / 3) < 5
    assert abs(orders.mean(axis=0) - 499.5).max() < 5 * 1000 / np.sqrt(12 * 50)
