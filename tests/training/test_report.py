"""What a person sees of a run."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from minillama.training.report import PlainReport


def test_the_step_that_compiles_does_not_foretell_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 32.0, 34.0, 36.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    report = PlainReport(Console(file=out), every=0.0)
    report.start(10, 100)
    for step in range(11, 16):
        report.step({"step": step, "loss": 1.0, "lr": 0.1, "tokens_per_second": 5.0})
    etas = [line.rpartition("eta ")[2] for line in out.getvalue().splitlines()]
    assert etas == ["1:29", "1:28", "1:27", "1:54", "2:07"]
