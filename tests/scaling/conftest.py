"""Epoch's 245 points, and their rows as arrays."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillama.scaling.points import Table, read_csv

EPOCH = Path(__file__).resolve().parents[2].parent / "shared/data/scaling/epoch.csv"


@pytest.fixture(scope="session")
def epoch_csv() -> Path:
    if not EPOCH.exists():
        pytest.skip("../shared/data/scaling is not here")
    return EPOCH


@pytest.fixture(scope="session")
def epoch(epoch_csv: Path) -> Table:
    return read_csv(epoch_csv).without_highest(5)
