"""Progress of a command where standard error is no terminal."""

from __future__ import annotations

import pytest

from minillama.commands import progress


def test_a_time_left_is_given_from_the_first_hundredth(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter((0.0, 9.0, 11.0, 20.0, 21.0, 40.0))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with progress.Progress("items", 1000) as bar:
        for amount in (2, 3, 15, 20, 60):
            bar.advance(amount)
    assert capsys.readouterr().err.splitlines() == [
        "items: 0%, time left not known yet",
        "items: 4%, 8:24 left",
        "items: 10%, 6:00 left",
    ]
