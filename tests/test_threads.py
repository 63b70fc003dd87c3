"""How OpenMP's threads wait: what is decided, what a user set, whose pool it is. How fast: benchmarks/contention.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillama import threads
from minillama.threads import Monitor, free_threads

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp, and what Linux says of threads")


def python(code: str, **env: str) -> str:
    left = (*threads.VARIABLES, threads.BLOCKTIME, "OMP_NUM_THREADS")
    given = {name: value for name, value in os.environ.items() if name not in left}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=given | env, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Monitor:
    """Of a process of two threads on four CPUs, that only decides."""
    made = Monitor()
    made.cpus = made.free = 4
    monkeypatch.setattr(threads, "_threads", lambda: 2)
    monkeypatch.setattr(threads, "_hold", lambda count, until: None)
    monkeypatch.setattr(threads, "_monitor", made)
    monkeypatch.setattr(threads, "_is_adaptive", lambda: True)
    return made


def test_threads_sleep_at_once_and_spin_again_after_a_while(monitor: Monitor) -> None:
    monitor.decide(0.05, 0.3)
    assert not monitor.oversubscribed and free_threads(4) == 4
    monitor.decide(0.4, 2.9)
    assert monitor.oversubscribed and free_threads(4) == 2
    for _ in range(threads.PATIENCE - 1):
        monitor.decide(0.0, 1.1)
    assert monitor.oversubscribed and free_threads(4) == 3
    monitor.decide(0.0, 1.6)
    assert not monitor.oversubscribed and free_threads(4) == 4


def test_no_delay_is_not_quiet_while_others_use_the_cpus(monitor: Monitor) -> None:
    monitor.decide(1.0, 3.0)
    for _ in range(3 * threads.PATIENCE):  # one thread runs by itself, and is not delayed
        monitor.decide(0.0, 3.0)
    assert monitor.oversubscribed and free_threads(4) == 2
    monitor.decide(0.0, 9.0)  # never less than half, or two programs that both give way would end with nothing
    assert free_threads(4) == 2


def test_a_team_of_many_that_is_woken_often_is_quiet(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor.cpus = 16
    monkeypatch.setattr(threads, "_threads", lambda: 8)
    monitor.decide(2.0, 15.0)
    for _ in range(threads.PATIENCE):
        monitor.decide(0.3, 0.1)
    assert not monitor.oversubscribed


def test_where_threads_cannot_be_had_none_are_asked_for(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_can_start", lambda count: False)
    monitor.decide(1.0, 3.0)
    assert not monitor.oversubscribed and free_threads(4) == 4


def test_limited_memory_starts_no_threads() -> None:
    code = "import resource as r; r.setrlimit(r.RLIMIT_AS, (2**36, 2**36)); from minillama.threads import _can_start; "
    assert python(code + "print(_can_start(1))") == "False"
    assert python("from minillama.threads import _can_start; print(_can_start(3))") == "True"


def test_a_monitor_that_cannot_read_lets_threads_spin() -> None:
    code = """
import time, torch
from minillama import threads
threads.adapt()
threads._monitor.oversubscribed, threads._monitor.free = True, 1
def broken(self): raise PermissionError
threads._Sample.__init__ = broken
threads._monitor.join(10)
print(threads._monitor.is_alive(), threads._monitor.oversubscribed, threads.free_threads(5), threads.policy())
"""
    assert python(code) == "False False 5 OpenMP's own"


def test_a_forked_child_adapts_anew() -> None:
    code = """
import os, torch
from minillama import threads
threads.adapt()
if not os.fork():
    before = threads._is_adaptive()
    threads.adapt()
    print(before, threads._is_adaptive(), flush=True)
    os._exit(0)
os.wait()
"""
    assert python(code) == "False True"


def test_nothing_is_watched_unasked() -> None:
    assert python("import minillama.threads as t; print(t.free_threads(7), t._monitor)") == "7 None"


@pytest.mark.parametrize("name", threads.VARIABLES)
def test_what_a_user_set_stays(name: str) -> None:
    code = "import os, minillama.threads as t; t.adapt(); print(t._monitor, os.environ.get('KMP_BLOCKTIME')); "
    value = "PASSIVE" if name == "OMP_WAIT_POLICY" else "7"
    said = python(code + "print(t.policy())", **{name: value})
    assert said == f"None None\n{name}={value}, from the environment"


def test_without_the_kernels_word_variables_are_set() -> None:
    code = "import os, minillama.threads as t; t._Sample = lambda: int('x'); t.adapt(); print(t._monitor, "
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
for _ in range(3):
    made._sleep()
    there = until(before + 1 + made.cpus)  # ours, and the rest of a team of one more than there are CPUs
    made._spin()
    print(there, until(before))
"""
    assert python(code) == "\n".join(["True True"] * 3)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_there_is_one_pool_of_threads(compiled: bool) -> None:
    code = (
        "import torch; from minillama.native import build; "
        "build.load_library('decode.cpp') if build.can_build() else None; "
        f"torch.compile(lambda x: x.sin().cos(), disable={not compiled})(torch.rand(300, 300)); "
        "lines = open('/proc/self/maps').read().splitlines(); "
        "print(len({line.split()[-1] for line in lines if 'libgomp' in line or 'libomp' in line}))"
    )
    assert python(code) == "1"


def test_the_lines_of_the_documentation_work() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs/runs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert python(f"import torch\n{block}").startswith("adaptive, now")
