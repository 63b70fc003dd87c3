"""Failures among the processes of a run: one of them reports, also where the first one is stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import distributed

from minillama.training import watch

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("store")
def test_another_process_reports_where_the_first_one_is_stopped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "WORDS", 0.2)
    monkeypatch.setattr(watch, "SILENCE", 0.0)
    ended: list[int] = []
    monkeypatch.setattr(watch.os, "_exit", ended.append)
    first, second, third = (watch.Watch(index, 3) for index in range(3))
    second._look()
    assert not second.store.check([watch.FAILURE])  # its first sign of life has just come
    second._beat()
    second._look()
    second._end_if_failed()
    third._end_if_failed()
    said = capsys.readouterr().err.splitlines()
    assert ended == [1, 1] and len(said) == 2
    assert said[0].startswith("error: process 0 of 3 (pid ") and "no sign of life" in said[0]
    assert said[1] == "  do: start all again with --resume"
    assert first.seen == {}


@pytest.mark.usefixtures("store")
def test_the_way_on_is_that_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: first._beat())
    for given in (watch.RUN, watch.Advice("start fewer processes", "start all again")):
        first, _ = (watch.Watch(index, 2, advice=given) for index in range(2))
        found, gone = first.explain(RuntimeError("Connection closed by peer"))
        assert gone == [1] and found.fix == f"if it was killed for memory, {given.memory}; then {given.again}"
        monkeypatch.setattr(first, "_signs", lambda first=first: {0: f"{first.beats}|a|b||", 1: f"{first.beats}|a|b||"})
        found, gone = first.explain(RuntimeError("Timed out"))
        assert not gone and found.fix == f"look at where each is; {given.patience}{given.again}"


class Processes:
    """Watches of three processes, and a clock that they read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_gpus: bool = False) -> None:
        self.now, self.place = 0.0, ("training/gradients.py:1 in accumulate", False)
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(watch, "_place", lambda thread: self.place)
        self.all = [watch.Watch(index, 3, on_gpus) for index in range(3)]

    def pass_time(self, seconds: float, waiting: tuple[int, ...] = ()) -> None:
        """Signs of all, twice a second."""
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            for one in self.all:
                self.place = self.place[0], one.index in waiting
                one._beat()
            self.all[0]._look()

    def measure(self, seconds: float, steps: int = watch.MEASURED) -> None:
        for _ in range(steps):
            self.begin()
            self.pass_time(seconds)
            self.end()

    def begin(self, *which: int) -> None:
        self.steps = {index: self.all[index].step() for index in which or range(3)}
        for step in self.steps.values():
            step.__enter__()

    def end(self) -> None:
        for step in self.steps.values():
            step.__exit__(None, None, None)

    def said(self) -> str:
        own = self.all[0].store
        return own.get(watch.FAILURE).decode() if own.check([watch.FAILURE]) else ""


@pytest.mark.usefixtures("store")
def test_a_step_that_hangs_is_one_of_a_process_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Processes(monkeypatch)
    there.measure(1.0)
    there.begin()
    there.pass_time(watch.LEAST, waiting=(0, 2))
    assert not there.said()  # as long as the bound
    there.pass_time(1, waiting=(0, 2))
    said = there.said()
    assert said.startswith("0|a process keeps the others waiting") and "process 1 of 3" in said
    assert "process 0 of 3" not in said and "process 2 of 3" not in said
    assert "found: 30 s of work in a step, where none before had more than 1.0 s" in said and "--resume" in said


@pytest.mark.usefixtures("store")
def test_a_step_ends_nothing_that_is_slower_or_has_no_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Processes(monkeypatch)
    there.measure(watch.LEAST + 5, watch.MEASURED)  # before there is one
    there.begin()
    there.pass_time(watch.TIMES * (watch.LEAST + 5))  # twenty times as long
    there.end()
    there.pass_time(1000)  # a validation
    there.begin()
    there.now += 100_000  # all processes were stopped
    there.pass_time(10)
    there.end()
    assert not there.said()


@pytest.mark.usefixtures("store")
def test_a_step_that_waits_for_a_checkpoint_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the first process writes, after which the others work on for a while; the next loop is found as before."""
    bounds = {(0, 2): watch.TIMES * 2, (0, 1, 2): watch.TIMES * (watch.LEAST + 3)}  # seconds of work, and all seconds
    for waiting, bound in bounds.items():
        there = Processes(monkeypatch)
        there.measure(1.0)
        there.begin(1, 2)
        there.pass_time(watch.LEAST + 1, waiting=(1, 2))
        there.pass_time(2)
        there.end()
        there.pass_time(1000)  # a validation
        there.begin()
        there.pass_time(bound, waiting=waiting)
        assert not there.said()
        there.pass_time(1, waiting=waiting)
        named = [index for index in range(3) if f"process {index} of 3" in there.said()]
        assert named == ([1] if 1 not in waiting else [0, 1, 2])
        there.all[0].store.delete_key(watch.FAILURE)


@pytest.mark.usefixtures("store")
def test_a_step_hangs_on_gpus_where_it_does_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run collectives by themselves: no Python stack shows who waits."""
    there = Processes(monkeypatch, on_gpus=True)
    there.measure(1.0)
    there.begin(1, 2)
    there.pass_time(watch.LEAST + 1)
    assert not there.said()
    there.end()
    there.begin()
    there.pass_time(watch.TIMES * (watch.LEAST + 2))
    assert all(f"process {index} of 3" in there.said() for index in range(3))


def test_the_place_of_a_thread_is_a_line_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it waits if a collective that this line called does not return, whatever calls it."""

    def frame(name: str, back: SimpleNamespace | None = None) -> SimpleNamespace:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=name, co_name="f"), f_lineno=7, f_back=back)

    line, torchs = str(watch.PACKAGE / "model/decoder.py"), str(watch.COLLECTIVES / "fsdp/a.py")
    outer = frame(torchs, frame(line))  # FSDP calls the forward pass
    for found, waits in ((frame(line, outer), False), (frame("own.py", frame(line, outer)), False), (outer, True)):
        monkeypatch.setattr(watch.sys, "_current_frames", lambda found=found: {1: found})
        assert watch._place(1) == ("model/decoder.py:7 in f", waits)
