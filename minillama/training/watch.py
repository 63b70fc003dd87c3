"""Failure detection among the processes of a run: one that ends, hangs or fails ends all, and is named once.

Every process has a thread that tells the others, through the store by which they found each other, that it lives and
where its main thread is. A process that fails says so there and lets the first one speak; where a collective fails
because another is gone or late, the threads say which. A training step that does not end is found by the time that
those before it took.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import distributed

from minillama.errors import InputError

PERIOD = 0.5  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a process counts as stopped: long C code may hold the interpreter
AWAKE = 4 * PERIOD  # that the watch's clock goes on at most per sign: a process that was stopped saw no time pass
# a step hangs that lasts longer than LEAST seconds, in which a disk or a network recovers, and than so many times the
# longest before it, more than other lengths of rows make of it; a few measure that, without the first, which warms up
LEAST, TIMES, MEASURED = 30.0, 20.0, 3
WORDS = 5.0  # seconds in which the first process reports what another says
LATE, STUCK = "late", "stuck"  # a step that hangs, and one that does so in other work than a collective
FAILURE, SHOWN, ENDED = "failure", "failure shown", "|ended|the end of its run||"
PACKAGE, COLLECTIVES = Path(__file__).parents[1], Path(distributed.__file__).parent
# what torch's collectives raise when another process is gone or late
LOST = ("gloo", "Connection", "NCCL", "Timed out", "timeout", "Broken pipe", "Socket", "TCPStore", "recvValue")


class Advice(NamedTuple):
    """Way on after a process was lost, which is another for every command.

    Args:
        memory: what helps where it was killed for memory.
        again: how to go on.
        patience: how to let processes wait for longer, before `again`.
    """

    memory: str
    again: str
    patience: str = ""


RUN = Advice("divide more", "start all again with --resume", "raise parallel.timeout, or ")


class Watch(threading.Thread):
    """Signs of life of this process, and those of the others.

    Args:
        index: of this process.
        count: of all.
        on_gpus: whether they train on GPUs, which run collectives by themselves.
        advice: after a process was lost.
    """

    def __init__(self, index: int, count: int, on_gpus: bool = False, advice: Advice = RUN) -> None:
        super().__init__(name="watch", daemon=True)
        self.index, self.count, self.on_gpus, self.advice = index, count, on_gpus, advice
        store: Any = distributed.distributed_c10d._get_default_store()
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # after a restart the store still has what was said
        # a clone, as a blocking wait would hold the lock of that one
        self.store: Any = distributed.distributed_c10d.PrefixStore(f"watch {attempt}", store.clone())
        self.main, self.over = threading.main_thread().ident, threading.Event()
        self.seen: dict[int, tuple[str, float]] = {}
        self.beats = 0
        self.clock, self.beaten = 0.0, time.monotonic()
        self.worked = 0.0  # seconds out of collectives
        self.began: tuple[float, float] | None = None  # clock and `worked` as the step in flight began
        self.steps, self.longest, self.busiest = 0, 0.0, 0.0  # complete ones; the most seconds and work of one
        self._beat()

    def run(self) -> None:
        """Tell and look, until the run is over or the store is gone."""
        with suppress(RuntimeError, OSError):  # the process that has the store ended
            while not self.over.wait(PERIOD):
                self._beat()
                self._look()
                self._end_if_failed()

    def _beat(self) -> None:
        now, (place, waits) = time.monotonic(), _place(self.main)
        passed, self.beaten = min(now - self.beaten, AWAKE), now
        self.clock += passed
        self.worked += 0.0 if waits else passed
        self.beats += 1
        who = f"pid {os.getpid()} on {socket.gethostname()}"
        self.store.set(f"life {self.index}", f"{self.beats}|{who}|{place}|{self._overdue()}")

    @contextmanager
    def step(self) -> Iterator[None]:
        """A training step, which is to end in a time that those before it measured."""
        self.began = clock, worked = self.clock, self.worked
        try:
            yield
            if self.steps:
                self.longest = max(self.longest, self.clock - clock)
                self.busiest = max(self.busiest, self.worked - worked)
            self.steps += 1
        finally:
            self.began = None

    def _overdue(self) -> str:
        """State of a step in flight that should have ended, and its time beside that of others; else nothing.

        Work is held against work: a step that waited for a checkpoint of another process measures none.
        """
        began = self.began  # read once: the main thread changes it
        if began is None or self.steps < MEASURED:
            return "|"
        lasts, works = self.clock - began[0], self.worked - began[1]
        if works > max(LEAST, TIMES * self.busiest):
            return f"{STUCK}|{works:.0f} s of work in a step, where none before had more than {self.busiest:.1f} s"
        if lasts > max(LEAST, TIMES * self.longest):
            return f"{LATE}|a step of {lasts:.0f} s, where none before took more than {self.longest:.1f} s"
        return "|"

    def _look(self) -> None:
        """Signs of all at the first process; of that one at the rest."""
        for other in range(self.count) if self.index == 0 else [0]:
            if self.store.check([f"life {other}"]):
                sign = self.store.get(f"life {other}").decode()
                if sign != self.seen.get(other, ("", 0.0))[0]:
                    self.seen[other] = sign, self.clock
        silent = [other for other, (sign, at) in self.seen.items() if self.clock - at > SILENCE and sign != ENDED]
        if silent:
            what = f"{self._named(silent)}: no sign of life for {SILENCE:.0f} s, stopped or cut off"
            self.fail(str(InputError(what, fix=self.advice.again)))
        if self.index == 0:
            self._end_if_overdue()

    def _end_if_overdue(self) -> None:
        """End the run where a step hangs, by the processes that do not wait for others; by all where all do.

        A process that waits for a GPU may as well wait for another process, which writes a checkpoint: there a step
        hangs that hangs in all of them.
        """
        signs = {other: sign.split("|")[3:] for other, (sign, _) in self.seen.items()}
        late = {other: found for other, (state, found) in signs.items() if state}
        stuck = [other for other in late if signs[other][0] == STUCK]
        if len(late) == self.count or (stuck and not self.on_gpus):
            what, fix = "a process keeps the others waiting", f"look at where it is; {self.advice.again}"
            named = stuck or [*late]
            self.fail(str(InputError(what, where=self._named(named), found=late[named[0]], fix=fix)))

    def end(self) -> None:
        """Say that this process needs no one any more."""
        self.over.set()
        self.join(2 * PERIOD)
        with suppress(RuntimeError, OSError):
            self.store.set(f"life {self.index}", ENDED)

    def _named(self, others: list[int]) -> str:
        """`process 1 of 2 (pid 7 on host), at training/data.py:8 in load`."""
        found = []
        for other in others:
            _, who, place, *_ = self.seen[other][0].split("|")
            found.append(f"process {other} of {self.count} ({who}), at {place}")
        return "; ".join(found)

    def fail(self, message: str) -> None:
        """Say why the run ends, unless another process did before."""
        self.store.compare_set(FAILURE, "", f"{self.index}|{message}")

    def _end_if_failed(self) -> None:
        """End this process when one has failed: its main thread may wait for that one."""
        if not self.store.check([FAILURE]):
            return
        index, message = self.store.get(FAILURE).decode().split("|", 1)
        if self.index == int(index) and self.over.is_set():
            return  # the main thread raises its own error
        if self.index == 0:
            sys.stdout.flush()
            self._speak(message)
        else:
            self.wait_until_shown()
            self._speak(message)  # where the first process is stopped or gone
        for thread in threading.enumerate():
            if thread.name == "checkpoint":  # it is completed, whatever happened
                thread.join(WORDS)
        os._exit(1)

    def _speak(self, message: str) -> None:
        """Report a failure, unless a process has done so."""
        if self.store.compare_set(SHOWN, "", str(self.index)) == str(self.index).encode():
            print(f"error: {message}", file=sys.stderr, flush=True)

    def told(self, error: Exception) -> BaseException:
        """The error of this process as it is to be raised: the first one that is left reports, the others end."""
        gone: list[int] = []
        with suppress(ValueError):  # torchrun ends the others at once; only the main thread may say so
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(RuntimeError, OSError):  # the process that has the store ended
            if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST):
                error, gone = self.explain(error)
            self.over.set()  # no sooner: until then others see that this process lives
            speaks = self.index == min({*range(self.count)} - {*gone})
            if not gone or speaks:
                self.fail(f"process {self.index} of {self.count}: {error}" if self.index else str(error))
            if not speaks:
                self.wait_until_shown()
                return SystemExit(1)
            index, message = self.store.get(FAILURE).decode().split("|", 1)
            if self.index:
                self._speak(message)
                return SystemExit(1)
            if self.store.compare_set(SHOWN, "", "0") != b"0":
                return SystemExit(1)
            return error if int(index) == self.index else InputError(message)
        return error

    def wait_until_shown(self) -> None:
        """Wait until the first process has reported a failure."""
        with suppress(RuntimeError, OSError):
            for _ in range(int(WORDS / 0.05)):
                if self.store.check([SHOWN]):
                    return
                time.sleep(0.05)

    def explain(self, error: BaseException) -> tuple[InputError, list[int]]:
        """What other processes did, of an error that torch's collectives raised here, and those that are gone."""
        before = self._signs()
        time.sleep(6 * PERIOD)
        self.seen = {other: (sign, self.clock) for other, sign in self._signs().items()}
        gone = [other for other, sign in before.items() if self.seen[other][0] == sign]
        found = str(error).split("\n")[0][:200]
        if gone:
            what = "a process has ended without a word"
            fix = f"if it was killed for memory, {self.advice.memory}; then {self.advice.again}"
            return InputError(what, where=self._named(gone), found=found, fix=fix), gone
        fix = f"look at where each is; {self.advice.patience}{self.advice.again}"
        what = "a process keeps the others waiting"
        return InputError(what, where=self._named([*range(self.count)]), found=found, fix=fix), []

    def _signs(self) -> dict[int, str]:
        """The last sign of life of each process."""
        names = [f"life {other}" for other in range(self.count)]
        return {i: self.store.get(name).decode() for i, name in enumerate(names) if self.store.check([name])}


@contextmanager
def watched(index: int, count: int, on_gpus: bool = False, advice: Advice = RUN) -> Iterator[Watch]:
    """A block in which a failure of one process ends all.

    Raises:
        InputError: in the first process that is left, what happened in another.
        SystemExit: in the others, after it was reported.
    """
    watch = Watch(index, count, on_gpus, advice)
    watch.start()
    try:
        yield watch
    except Exception as error:
        raise watch.told(error) from error
    finally:
        watch.end()


def _place(thread: int | None) -> tuple[str, bool]:
    """Innermost line of the package that a thread executes, and whether a collective within it does not return."""
    frame, waits = sys._current_frames().get(thread or 0), False
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return f"{path.relative_to(PACKAGE)}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        waits = waits or path.is_relative_to(COLLECTIVES)
        frame = frame.f_back
    return "an unknown place", waits
