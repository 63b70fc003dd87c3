"""How OpenMP's threads wait: what is decided, what a user set, whose pool it is. How fast: benchmarks/contention.py."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from minillama import threads
from minillama.threads import Monitor, free_threads

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp, and what Linux says of threads")


def python(code: str, **env: str) -> str:
    left = (*threads.VARIABLES, "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    given = {name: value for name, value in os.environ.items() if name not in left}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=given | env, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    """Of a process of two threads on four processors, that only decides."""
    made = Monitor()
    made.processors = made.free = 4
    monkeypatch.setattr(threads, "_threads", lambda: 2)
    monkeypatch.setattr(threads, "_hold", lambda count, until: None)
    monkeypatch.setattr(threads, "_monitor", made)
    return made


def test_threads_sleep_at_once_and_spin_again_after_a_while(monitor: Monitor) -> None:
    monitor.decide(0.05, 0.3)
    assert not monitor.crowded and free_threads(4) == 4
    monitor.decide(0.4, 2.9)
    assert monitor.crowded and free_threads(4) == 1
    for _ in range(threads.PATIENCE - 1):
        monitor.decide(0.0, 1.6)
    assert monitor.crowded and free_threads(4) == free_threads(2) == 2
    monitor.decide(0.0, 1.6)
    assert not monitor.crowded and free_threads(4) == 4


def test_no_waiting_is_not_quiet_while_others_use_the_processors(monitor: Monitor) -> None:
    monitor.decide(1.0, 3.0)
    for _ in range(3 * threads.PATIENCE):  # one thread runs by itself, and does not wait
        monitor.decide(0.0, 3.0)
    assert monitor.crowded and free_threads(2) == 1
    monitor.decide(0.0, 9.0)
    assert free_threads(2) == 1


def test_nothing_is_watched_unasked() -> None:
    assert python("import minillama.threads as t; print(t.free_threads(7), t._monitor)") == "7 None"


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_what_a_user_set_stays(name: str) -> None:
    code = "import os, minillama.threads as t; t.adapt(); print(t._monitor, os.environ.get('KMP_BLOCKTIME')); "
    value = "PASSIVE" if name == "OMP_WAIT_POLICY" else "7"
    said = python(code + "print(t.policy())", **{name: value})
    assert said == f"None None\n{name}={value}, from the environment"


def test_without_the_kernels_word_variables_are_set() -> None:
    code = "import os, minillama.threads as t; t._waited = lambda: None; t.adapt(); print(t._monitor, "
    assert python(code + "os.environ['GOMP_SPINCOUNT'], os.environ['KMP_BLOCKTIME'])") == "None 1000 1"


def test_a_command_adapts_before_torch_is_loaded() -> None:
    code = "import sys; from minillama import threads as t; t.adapt = lambda: print('torch' in sys.modules); "
    assert python(code + "from minillama.commands.cli import main; main(['--version'])").startswith("False")


def test_idle_threads_come_and_go() -> None:
    code = """
import os, time, torch
from minillama import threads
def until(count):
    return any(len(os.listdir("/proc/self/task")) == count or time.sleep(0.02) for _ in range(500))
torch.rand(300, 300).exp()
made, before = threads.Monitor(), len(os.listdir("/proc/self/task"))
made.processors = torch.get_num_threads() + 1
for _ in range(3):
    made._sleep()
    there = until(before + 3)  # ours, and two more of a team of three
    made._spin()
    print(there, until(before))
"""
    assert python(code) == "\n".join(["True True"] * 3)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_there_is_one_pool_of_threads(compiled: bool) -> None:
    code = (
        "import torch; from minillama.native import building; "
        "building.load_library('step.cpp') if building.can_build() else None; "
        f"torch.compile(lambda x: x.sin().cos(), disable={not compiled})(torch.rand(300, 300)); "
        "lines = open('/proc/self/maps').read().splitlines(); "
        "print(len({line.split()[-1] for line in lines if 'libgomp' in line or 'libomp' in line}))"
    )
    assert python(code) == "1"
