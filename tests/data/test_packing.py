from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.data.packing import document_ids, document_positions


def test_known_answer() -> None:
    tokens = np.array([[5, 0, 7, 8, 0, 0, 9], [0, 1, 2, 0, 3, 4, 5]])
    assert document_ids(tokens, 0).tolist() == [[0, 1, 1, 1, 2, 3, 3], [1, 1, 1, 2, 2, 2, 2]]
    assert document_positions(tokens, 0).tolist() == [[0, 0, 1, 2, 0, 0, 1], [0, 1, 2, 0, 1, 2, 3]]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=50))
@settings(deadline=None)
def test_against_a_loop(tokens: list[int]) -> None:
    ids, positions, document, position = [], [], 0, -1
    for token in tokens:
        document, position = (document + 1, 0) if token == 0 else (document, position + 1)
        ids.append(document)
        positions.append(position)
    assert document_ids(np.array(tokens), 0).tolist() == ids
    assert document_positions(np.array(tokens), 0).tolist() == positions
