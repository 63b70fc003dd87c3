"""What a person sees of a run."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from minillama.runs.report import Pace, PlainReport, TerminalReport, quoted


def test_the_step_that_compiles_does_not_foretell_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0, 32.0, 34.0, 36.0])
    own_time = SimpleNamespace(monotonic=lambda: next(clock))  # other threads read the clock too
    monkeypatch.setattr("minillama.runs.report.time", own_time)
    out = io.StringIO()
    report = PlainReport(Console(file=out), every=0.0)
    report.start(10, 100)
    for step in range(11, 16):
        report.step({"step": step, "loss": 1.0, "lr": 0.1, "tokens_per_second": 5.0})
    etas = [line.rpartition("eta ")[2] for line in out.getvalue().splitlines()]
    assert etas == ["1:29", "1:28", "1:27", "2:09", "2:50"]


def seconds_of(text: str) -> int:
    return sum(60**i * int(part) for i, part in enumerate(reversed(text.split(":"))))


def test_the_time_left_recovers_when_a_neighbor_goes_away() -> None:
    pace = Pace()
    for seconds in [1.0] * 100 + [10.0] * 100:
        pace.add(seconds)
    assert 600 <= seconds_of(pace.left(60)) <= 630  # the first slow steps looked like something else
    for _ in range(5):
        pace.add(1.0)
    assert 60 <= seconds_of(pace.left(60)) <= 90
    for _ in range(200):
        pace.add(1.0)
    assert pace.left(60) == "1:00"


def test_validations_count_for_all_steps_and_the_step_that_compiles_for_none() -> None:
    pace = Pace()
    for step in range(1, 201):
        pace.add(31.0 if step % 50 == 0 else 200.0 if step == 10 else 1.0)
    assert pace.left(1000) == "26:40"  # 1 s, and 30 s every 50 steps


def test_the_line_of_a_terminal_has_it_too() -> None:
    out = io.StringIO()
    report = TerminalReport(Console(file=out, force_terminal=True, width=120))
    report.start(0, 1)
    report.step({"step": 1, "loss": 1.0, "lr": 0.1, "tokens_per_second": 5.0})
    report.stop()
    assert "loss 1.0000, lr 1.0e-01, 0.0k tok/s, eta 0:00" in out.getvalue()


def test_empty_lines_of_a_sample_are_counted() -> None:
    assert (
        quoted("This\n\nmodule" + "\n" * 41 + "end\n\n") == "  | This\n  | \n  | module\n  | (40 empty lines)\n  | end"
    )


def test_what_rollouts_measure_is_shown() -> None:
    out = io.StringIO()
    report = PlainReport(Console(file=out, width=200), every=0.0)
    report.start(0, 2)
    rates = {"loss": 1.0, "lr": 0.1, "tokens_per_second": 5.0}
    measured = {"kl": 1.234, "entropy": 2.5, "clipped": 0.012, "answer_length": 33.3, "ended": 0.75, "reward": 0.5}
    report.step({"step": 1, **rates, **measured})
    report.step({"step": 2, **rates, "kl": None, "entropy": 2.25})
    first, second = out.getvalue().splitlines()
    assert "reward 0.500, kl 1.23, entropy 2.50, clipped 1.2%, length 33.3, ended 75%, lr" in first
    assert "loss 1.0000, entropy 2.25, lr" in second
