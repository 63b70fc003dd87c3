"""Worker processes of a cleaning: the same calls on any number of cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from minillama.errors import InputError

Progress = Callable[[str, float], None]
"""Progress callback: the task, and the fraction of it that is done, 0 to 1."""


def run_all(
    function: Callable[..., object], calls: Sequence[tuple[Any, ...]], workers: int, report: Progress, what: str
) -> None:
    """Make all calls, in `workers` processes if there are several.

    Raises:
        InputError: that of a call, or a worker died.
    """
    report(what, 0.0)
    if workers == 1 or len(calls) < 2:
        for done, call in enumerate(calls, 1):
            function(*call)
            report(what, done / len(calls))
        return
    with ProcessPoolExecutor(min(workers, len(calls)), get_context("spawn"), _follow, (os.getpid(),)) as pool:
        try:
            for done, future in enumerate(as_completed([pool.submit(function, *call) for call in calls]), 1):
                future.result()
                report(what, done / len(calls))
        except BrokenProcessPool:
            fix = "run the command again: it goes on where it stopped; with fewer --workers if memory ran out"
            raise InputError("a worker process died", found=what, fix=fix) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _follow(parent: int) -> None:
    """End this process when its parent has ended, however that ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core per worker, also for a model that scores
    threading.Thread(target=watch, daemon=True).start()
