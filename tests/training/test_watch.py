"""Failures among the processes of a run: one of them reports, also where the first one is stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import distributed

from minillama.training import watch

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


def test_another_process_reports_where_the_first_one_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "WORDS", 0.2)
    monkeypatch.setattr(watch, "SILENCE", 0.0)
    ended: list[int] = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    try:
        first, second, third = (watch.Watch(index, 3) for index in range(3))
        second._look()
        assert not second.store.check([watch.FAILURE])  # its first sign of life has just come
        second._look()
        second._end_if_failed()
        third._end_if_failed()
    finally:
        distributed.destroy_process_group()
    said = capsys.readouterr().err.splitlines()
    assert ended == [1, 1] and len(said) == 1
    assert said[0].startswith("error: process 0 of 3 (pid ") and "no sign of life" in said[0]
    assert first.seen == {}
