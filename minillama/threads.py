"""Waiting policy of OpenMP's threads: they spin while the machine is quiet and sleep beside other programs.

A thread that reaches a barrier first spins for some milliseconds before it sleeps (libgomp: 300,000 iterations). On a
quiet machine that is the fastest; on an oversubscribed one it burns the very CPU that the thread it waits for needs,
and a step takes up to fifty times as long. libgomp reads `GOMP_SPINCOUNT` and `OMP_WAIT_POLICY` once, when it is
loaded, but it spins for 100 iterations only whenever its threads outnumber the CPUs. `adapt` samples ten times a second
how long the process's threads were runnable without running, and while that is much it holds a team of idle threads,
so that libgomp's threads outnumber the CPUs. Results are the same to the bit. What was measured, on two CPUs:
benchmarks/README.md, "Beside other programs".
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # read by libgomp, the first by LLVM's OpenMP too
BLOCKTIME = "KMP_BLOCKTIME"  # of LLVM's: milliseconds before a thread sleeps
INTERVAL = 0.1  # seconds between two samples
DELAY = 0.1  # run delay of all threads together, seconds per second, from which on the machine is oversubscribed
SPARE = 0.3  # of a CPU, which others may use while threads spin
PATIENCE = 5  # quiet samples before threads spin again
FALLBACK = {"GOMP_SPINCOUNT": "1000"}  # where Linux does not count run delay: costs a tenth of a quiet step


def adapt() -> None:
    """Settle how OpenMP's threads wait in this process; before torch is loaded if possible, and once is enough.

    What the user has set in `VARIABLES` or KMP_BLOCKTIME stays. On Linux a daemon thread is started that adapts libgomp
    as above. Where that cannot be, and for LLVM's OpenMP (macOS), environment variables are set to a compromise, which
    holds if torch is not loaded yet.
    """
    global _monitor
    if any(name in os.environ for name in VARIABLES) or _is_adaptive():
        return
    os.environ.setdefault(BLOCKTIME, "1")
    try:
        _Sample()
        _monitor = Monitor()
        _monitor.start()
    except (OSError, RuntimeError, ValueError):  # no /proc, none that says it, no thread to be had
        _monitor = None
        os.environ.update(FALLBACK)


def free_threads(wanted: int) -> int:
    """How many of so many threads run without sharing a CPU, 1 at least; all of them unless `adapt` was called.

    For kernels whose results do not depend on the number of threads: beside a busy program one thread less is faster
    than one that all others wait for.
    """
    return max(1, min(wanted, _monitor.free)) if _monitor is not None and _is_adaptive() else wanted


def policy() -> str:
    """The waiting policy in force, in words."""
    if given := [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]:
        return f"{' '.join(given)}, from the environment"
    if _monitor is not None and _is_adaptive():
        return f"adaptive, now {'oversubscribed: threads sleep' if _monitor.oversubscribed else 'quiet: threads spin'}"
    return "OpenMP's own"


class Monitor(threading.Thread):
    """Samples the run delay of this process's threads, and has libgomp's threads sleep or spin.

    Attributes:
        oversubscribed: whether threads sleep now.
        free: CPUs that this process may take without sharing them; all while it is quiet.
    """

    def __init__(self) -> None:
        super().__init__(name="openmp-waiting", daemon=True)
        self.cpus = len(os.sched_getaffinity(0))
        self.oversubscribed, self.free, self.quiet = False, self.cpus, 0
        self._team: threading.Event | None = None

    def run(self) -> None:
        """Sample and decide, until something cannot be read."""
        with suppress(OSError, RuntimeError, ValueError):
            while not hasattr(sys.modules.get("torch"), "get_num_threads"):
                time.sleep(INTERVAL)
            samples = [_Sample()]
            while _libgomp() is not None:
                time.sleep(INTERVAL)
                samples = [*samples[-PATIENCE:], _Sample()]
                self.decide(samples[-2].until(samples[-1])[0], samples[0].until(samples[-1])[1])
        self._spin()
        self.free = self.cpus

    def decide(self, delay: float, others: float) -> None:
        """Sleep, spin, or leave it as it is.

        Args:
            delay: of all threads, in seconds per second: how long they were runnable without running.
            others: CPUs that other programs used.
        """
        threads = _threads()
        # threads that sleep are delayed by being woken, so that a team of many is never without delay
        is_quiet = delay <= DELAY * max(1, threads / 2) and others + threads <= self.cpus + SPARE
        self.quiet = self.quiet + 1 if is_quiet else 0
        if delay > DELAY and not is_quiet:
            self._sleep()
        elif self.quiet >= PATIENCE:
            self._spin()
        # not less than half: what others use says how much this process left to them
        self.free = max(round(self.cpus - others), self.cpus // 2) if self.oversubscribed else self.cpus

    def _sleep(self) -> None:
        """Have a thread of ours open a team that outnumbers the CPUs whatever the other teams' size, and keep it."""
        if self.oversubscribed or not _can_start(self.cpus + 1):
            return
        self.oversubscribed, self._team = True, threading.Event()
        threading.Thread(target=_hold, args=(self.cpus + 1, self._team), name="openmp-team", daemon=True).start()

    def _spin(self) -> None:
        """Let that thread end, and its team with it."""
        if self._team is not None:
            self._team.set()
        self.oversubscribed, self._team = False, None


_monitor: Monitor | None = None


def _is_adaptive() -> bool:
    return _monitor is not None and _monitor.is_alive()  # a forked child has the object and not the thread


class _Sample:
    """Counters, in seconds: the time, each thread's run delay, this process's CPU time, that of everything.

    Raises:
        OSError, ValueError: Linux does not say.
    """

    def __init__(self) -> None:
        self.now, self.own = time.monotonic(), time.process_time()
        self.delays, ran = {}, 0
        for task in os.listdir("/proc/self/task"):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                run, delay, *_ = Path("/proc/self/task", task, "schedstat").read_bytes().split()
                self.delays[task], ran = int(delay) / 1e9, ran + int(run)
        mine = {b"cpu%d" % number for number in os.sched_getaffinity(0)}
        lines = [line.split() for line in Path("/proc/stat").read_bytes().splitlines()]
        counts = [list(map(int, words)) for name, *words in lines if name in mine]
        if not ran or not counts:
            raise ValueError("no scheduler statistics")
        # user, nice (it gives way to a process that is not nice itself), system, irq, softirq, steal
        kinds = (0, 2, 5, 6, 7) if os.nice(0) <= 0 else (0, 1, 2, 5, 6, 7)
        self.all = sum(line[kind] for line in counts for kind in kinds) / os.sysconf("SC_CLK_TCK")

    def until(self, later: _Sample) -> tuple[float, float]:
        """Run delay per second, and the CPUs that others used."""
        passed = later.now - self.now
        delay = sum(seconds - self.delays.get(task, seconds) for task, seconds in later.delays.items())
        return delay / passed, max(0.0, later.all - self.all - later.own + self.own) / passed


def _threads() -> int:
    """Of torch, as a thread has them that did not change their number."""
    return int(sys.modules["torch"].get_num_threads())


def _libgomp() -> str | None:
    """The path of torch's own libgomp, or the system's: other packages load copies, whose threads are others."""
    lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    loaded = {Path(line.split(maxsplit=5)[5]) for line in lines if "libgomp" in line}
    torch = Path(sys.modules["torch"].__file__ or "").parent
    own = [path for path in loaded if path.parent in (torch / "lib", torch.with_name("torch.libs"))]
    system = [path for path in loaded if path.name == "libgomp.so.1" and "site-packages" not in path.parts]
    return str((own or system)[0]) if own or system else None


def _can_start(count: int) -> bool:
    """Whether so many threads can be had; libgomp ends the process when it gets none."""
    import resource  # of Unix

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False  # each takes a stack of it
    gate, started = threading.Event(), []
    try:
        for _ in range(count):
            started.append(threading.Thread(target=gate.wait, daemon=True))
            started[-1].start()
    except RuntimeError:
        return False
    finally:
        gate.set()
    return True


def _hold(count: int, until: threading.Event) -> None:
    """A team of idle threads, as long as this thread lives: `getpid` is what they run, since it does nothing."""
    nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
    ctypes.CDLL(_libgomp()).GOMP_parallel(nothing, None, ctypes.c_uint(count), ctypes.c_uint(0))
    until.wait()
