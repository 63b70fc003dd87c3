"""Optimizer state in parts: any slice of any division, and what is missing."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path

import pytest
import torch

from minillama.errors import InputError
from minillama.runs import parts
from minillama.runs.parts import Place

WHOLE = torch.arange(7 * 5, dtype=torch.float32).view(7, 5)
CUTS = ([0, 4, 7], [0, 2, 5])


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Four files: two rows of unequal parts by two columns of them; a scalar in the first."""
    found = []
    for index, (rows, columns) in enumerate(product(*map(pairwise, CUTS))):
        at = slice(*rows), slice(*columns)
        path = tmp_path / parts.file_name(index, 4)
        tensors = {"a/exp_avg": WHOLE[at]} | ({"a/step": torch.tensor(3.0)} if index == 0 else {})
        parts.write(path, tensors, {"a/exp_avg": Place(at, (7, 5))})
        found.append(path)
    return found


def test_any_slice_is_read(files: list[Path]) -> None:
    found = parts.read(files)
    assert found["a/exp_avg"].shape == (7, 5) and found["a/step"].whole().item() == 3
    assert torch.equal(found["a/exp_avg"].whole(), WHOLE)
    for at in ((slice(0, 3), slice(0, 5)), (slice(3, 6), slice(1, 4)), (slice(6, 7), slice(0, 1))):
        assert torch.equal(found["a/exp_avg"][at], WHOLE[at])
    assert found["a/exp_avg"][slice(7, 7), slice(0, 5)].shape == (0, 5)  # of a process without a part


def test_a_missing_part_is_named(files: list[Path]) -> None:
    found = parts.read(files[:3])
    assert torch.equal(found["a/exp_avg"][slice(0, 4), slice(0, 5)], WHOLE[:4])
    with pytest.raises(InputError, match=r"parts of the optimizer state are missing(?s:.*)a/exp_avg"):
        found["a/exp_avg"].whole()
    files[1].write_bytes(files[1].read_bytes()[:20])
    with pytest.raises(InputError, match="damaged"):
        parts.read(files)
