"""Waiting policy of OpenMP's threads: they spin while the machine is quiet and sleep beside other programs.

A thread that reaches a barrier first spins for some milliseconds before it sleeps (libgomp: 300,000 rounds). On a quiet
machine that is the fastest; beside other programs it burns the very core that the thread it waits for needs, and a step
takes up to fifty times as long. libgomp reads `GOMP_SPINCOUNT` and `OMP_WAIT_POLICY` once, when it is loaded, but it
spins a thousandth of that whenever its threads outnumber the processors. `adapt` looks ten times a second at how long
the process's threads waited for a processor, and while they do it holds idle threads in reserve, so that the threads
outnumber the processors. Results are the same to the bit. What was measured: benchmarks/README.md, "Beside other
programs".
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["VARIABLES", "adapt", "free_threads", "policy"]

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # read by libgomp, the first by LLVM's OpenMP too
INTERVAL = 0.1  # seconds between two looks
CROWDED = 0.1  # seconds of waiting for a processor per second, of all threads together
SPARE = 0.3  # of a processor, which may be in use although threads spin
PATIENCE = 5  # quiet looks before threads spin again
SPINCOUNT = "1000"  # rounds, where the kernel does not say how long threads waited: a tenth of a quiet step
BLOCKTIME = "1"  # milliseconds before LLVM's threads sleep, 200 otherwise: costs nothing when quiet


def adapt() -> None:
    """Settle how OpenMP's threads wait in this process; best before torch is loaded, and once is enough.

    What the user has set in `VARIABLES` or KMP_BLOCKTIME stays. On Linux a daemon thread is started that adapts libgomp
    as above. Where that cannot be, and for LLVM's OpenMP (macOS), environment variables are set to a compromise, which
    holds if torch is not loaded yet.
    """
    global _monitor
    if any(name in os.environ for name in VARIABLES) or (_monitor is not None and _monitor.is_alive()):
        return
    os.environ.setdefault("KMP_BLOCKTIME", BLOCKTIME)
    if _waited() is None:
        os.environ["GOMP_SPINCOUNT"] = SPINCOUNT
        return
    _monitor = Monitor()
    _monitor.start()


def free_threads(wanted: int) -> int:
    """How many of so many threads have a processor for themselves, 1 at least; all of them unless `adapt` runs.

    For kernels whose results do not depend on the number of threads: beside a busy program one thread less is faster
    than one that all others wait for.
    """
    return wanted if _monitor is None else max(1, min(wanted, _monitor.free))


def policy() -> str:
    """The waiting policy in force, in words."""
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if given:
        return f"{' '.join(given)}, from the environment"
    if _monitor is None or not _monitor.is_alive():
        return "OpenMP's own: threads spin for milliseconds, also beside other programs"
    return f"adaptive, now {'crowded: threads sleep' if _monitor.crowded else 'quiet: threads spin'}"


class Monitor(threading.Thread):
    """Watches how long this process's threads wait for a processor, and has libgomp's threads sleep or spin.

    Attributes:
        crowded: whether threads sleep now.
        free: processors that no other program uses, as far as it matters; `processors` while it is quiet.
    """

    def __init__(self) -> None:
        super().__init__(name="openmp-waiting", daemon=True)
        self.processors = len(os.sched_getaffinity(0))
        self.crowded, self.free, self.quiet = False, self.processors, 0
        self._reserve: threading.Event | None = None

    def run(self) -> None:
        """Look, decide, wait."""
        while not hasattr(sys.modules.get("torch"), "get_num_threads") or _libgomp() is None:
            time.sleep(INTERVAL)
        looks = [_Look()]
        while True:
            time.sleep(INTERVAL)
            looks = [*looks[-PATIENCE:], _Look()]
            self.decide(looks[-2].until(looks[-1])[0], looks[0].until(looks[-1])[1])

    def decide(self, waited: float, used_by_others: float) -> None:
        """Take what was seen last.

        Args:
            waited: seconds per second for which threads waited for a processor, all together.
            used_by_others: processors.
        """
        is_quiet = waited <= CROWDED and used_by_others + _threads() <= self.processors + SPARE
        self.quiet = self.quiet + 1 if is_quiet else 0
        if waited > CROWDED:
            self._sleep()
        elif self.quiet >= PATIENCE:
            self._spin()
        self.free = round(self.processors - used_by_others) if self.crowded else self.processors

    def _sleep(self) -> None:
        """Have a thread of ours open a team that outnumbers the processors, and keep it."""
        if self.crowded:
            return
        self.crowded, self._reserve = True, threading.Event()
        count = max(2, self.processors - _threads() + 2)
        threading.Thread(target=_hold, args=(count, self._reserve), name="openmp-reserve", daemon=True).start()

    def _spin(self) -> None:
        """Let that thread end, and its team with it."""
        if self._reserve is not None:
            self._reserve.set()
        self.crowded, self._reserve = False, None


_monitor: Monitor | None = None


class _Look:
    """Clocks, in seconds: now, this process's waiting and running, and all that its processors did."""

    def __init__(self) -> None:
        self.now, self.waited, self.own, self.all = time.monotonic(), _waited() or 0.0, time.process_time(), _used()

    def until(self, later: _Look) -> tuple[float, float]:
        """Waiting per second, and the processors that others used."""
        passed = later.now - self.now
        return (later.waited - self.waited) / passed, (later.all - self.all - later.own + self.own) / passed


def _waited() -> float | None:
    """Seconds for which this process's threads could have run and had no processor; None where nobody counts them."""
    total = 0
    try:
        tasks = os.listdir("/proc/self/task")
        for task in tasks:
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                total += int(Path("/proc/self/task", task, "schedstat").read_bytes().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return total / 1e9 if total or Path("/proc/self/schedstat").exists() else None


def _used() -> float:
    """Seconds in which something ran on a processor that this process may use."""
    mine = {b"cpu%d" % number for number in os.sched_getaffinity(0)}
    lines = [line.split() for line in Path("/proc/stat").read_bytes().splitlines()]
    ticks = sum(int(n) for name, *words in lines if name in mine for n in (*words[:3], *words[5:8]))  # not idle, iowait
    return ticks / os.sysconf("SC_CLK_TCK")


def _threads() -> int:
    torch = sys.modules["torch"]
    return int(torch.get_num_threads())


def _libgomp() -> str | None:
    """The path of torch's libgomp: other packages may have loaded theirs, whose threads are others."""
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    loaded = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    own = str(Path(sys.modules["torch"].__file__ or "").parent)
    return min(loaded, key=lambda path: (not path.startswith(own), "-" in Path(path).name), default=None)


def _hold(count: int, until: threading.Event) -> None:
    """A team of idle threads, as long as this thread lives: `getpid` is what they run, since it does nothing."""
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    ctypes.CDLL(_libgomp()).GOMP_parallel(nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
    until.wait()
