"""A process of several that dies, hangs, fails or meets a NaN: all end in seconds with one error, or all go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from minillama.runs.checkpoint import steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]
ROOT = Path(__file__).parents[2]
# train.py, in which one process misbehaves once before a step
ODD = """
import os, signal, sys, time
import torch
from minillama.commands.cli import main
from minillama.runs import parts
from minillama.training import watch
from minillama.training.objectives.lm import LanguageModel

who, when, what = int(os.environ["ODD_RANK"]), int(os.environ["ODD_STEP"]), os.environ["ODD"]
whole = LanguageModel.batch

def batch(self, step, rank=0, world=1):
    made = whole(self, step, rank, world)
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if what == "loops" and step == when - 1:
        time.sleep(3)  # a slow step, and no more than that
    if step == when and int(os.environ.get("RANK", "0")) == who and is_first:
        if what == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "hangs":
            time.sleep(600)
        while what == "loops":
            pass
        if what == "fails":
            raise OSError(5, "the disk is gone")
        if what == "is out of memory":
            raise torch.OutOfMemoryError("no memory for 4 GiB")
        if what == "waits for all":
            torch.distributed.barrier()
        if what == "nan":
            made.weights[0, 0] = float("nan")
    return made

def write(path, tensors, places):
    global writes
    writes += 1
    if writes == 1 and int(os.environ["RANK"]) == who and what == "has no disk":
        raise OSError(28, "No space left on device")
    whole_write(path, tensors, places)
    is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if writes == 2 and int(os.environ["RANK"]) == who and what == "dies writing" and is_first:
        os.kill(os.getpid(), signal.SIGKILL)

if what == "loops":
    watch.LEAST, watch.TIMES = 6.0, 2.0
writes, whole_write = 0, parts.write
LanguageModel.batch, parts.write = batch, write
if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
"""


def command(folder: Path, words: list[str], *options: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    """Words and environment of torchrun over two processes."""
    script = folder / "odd.py"
    script.write_text(ODD)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {"ODD": "", "ODD_RANK": "1", "ODD_STEP": "4", "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return [*launcher, str(script), *words], os.environ | variables


def torchrun(
    folder: Path, words: list[str], *options: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    line, variables = command(folder, words, *options, **environment)
    began = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=variables, cwd=folder, check=False)
    return done, time.monotonic() - began


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "internal error:"))]


def run(words: list[str], out: Path, *more: str) -> list[str]:
    small = ["--train.steps", "6", "--checkpoint.every", "3", "--validate.every", "100", "--train.dtype", "float32"]
    return [*words[1:], *small, "--optim.muon_lr", "0", "--out", str(out), *more]


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_is_named(words: list[str], tmp_path: Path, rank: str) -> None:
    done, seconds = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.shard", "2"), ODD="dies", ODD_RANK=rank)
    assert done.returncode != 0 and seconds < 40
    assert len(errors(done)) == 1, done.stderr
    assert "a process has ended without a word" in done.stderr and f"process {rank} of 2 (pid" in done.stderr


def test_a_process_that_hangs_is_found_where_it_is(words: list[str], tmp_path: Path) -> None:
    done, seconds = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.timeout", "5"), ODD="hangs")
    assert done.returncode != 0 and seconds < 50
    assert len(errors(done)) == 1, done.stderr
    assert "a process keeps the others waiting" in done.stderr and "process 1 of 2 (pid" in done.stderr
    assert "training/trainer.py" in done.stderr


def test_a_step_that_does_not_end_is_found_by_the_time_of_those_before(words: list[str], tmp_path: Path) -> None:
    """Long before a collective has waited for too long; not one that is slower than they."""
    done, seconds = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.shard", "2"), ODD="loops")
    assert done.returncode != 0 and seconds < 80
    assert len(errors(done)) == 1, done.stderr
    assert "a process keeps the others waiting" in done.stderr and "process 1 of 2 (pid" in done.stderr
    assert "process 0 of 2" not in done.stderr and "training/trainer.py" in done.stderr
    assert "where none before had more than" in done.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4


def test_a_process_without_memory_ends_all(words: list[str], tmp_path: Path) -> None:
    done, seconds = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.shard", "2"), ODD="is out of memory")
    assert done.returncode != 0 and seconds < 40
    assert len(errors(done)) == 1 and "memory" in errors(done)[0] and "process 1 of 2" in done.stderr, done.stderr


def test_a_part_that_one_process_cannot_write_leaves_no_checkpoint(words: list[str], tmp_path: Path) -> None:
    """As in one process the run goes on, and says so; the next checkpoint is whole."""
    done, _ = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.shard", "2"), ODD="has no disk")
    assert done.returncode == 0, done.stderr
    assert "a process has not written its part" in done.stdout and "00002-of-00002" in done.stdout
    assert "No space left on device" in done.stdout
    assert steps(tmp_path / "run/checkpoints") == [6]


def test_a_process_alone_in_a_collective_ends_all_after_the_timeout(words: list[str], tmp_path: Path) -> None:
    done, seconds = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.timeout", "20"), ODD="waits for all")
    assert done.returncode != 0 and seconds < 80
    assert len(errors(done)) == 1, done.stderr


def test_an_error_of_one_process_is_said_once(words: list[str], tmp_path: Path) -> None:
    done, seconds = torchrun(tmp_path, run(words, tmp_path / "run"), ODD="fails")
    assert done.returncode != 0 and seconds < 40
    assert len(errors(done)) == 1 and "process 1 of 2" in errors(done)[0] and "the disk is gone" in errors(done)[0]
    done, _ = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.shard", "3"))
    assert len(errors(done)) == 1 and "is not 2 processes" in errors(done)[0]
    done, _ = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.shart", "3"))
    assert len(errors(done)) == 1 and "did you mean" in done.stderr


def test_a_step_that_one_process_cannot_take_is_taken_by_none(words: list[str], tmp_path: Path) -> None:
    done, _ = torchrun(tmp_path, run(words, tmp_path / "run", "--parallel.shard", "2"), ODD="nan")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [5]
    assert [row.partition(":")[0] for row in lines[5]["rows"]] == ["row 1"]


def test_torchrun_restarts_a_run_by_itself(words: list[str], tmp_path: Path) -> None:
    options = ["--parallel.shard", "2", "--resume"]
    done, _ = torchrun(tmp_path, run(words, tmp_path / "cut", *options), "--max-restarts", "1", ODD="dies")
    assert done.returncode == 0 and "resuming at step 3" in done.stdout, done.stderr
    often, odd = [*options, "--checkpoint.every", "2"], {"ODD": "dies writing"}
    for rank in ("0", "1"):
        again = run(words, tmp_path / f"written {rank}", *often)
        done, _ = torchrun(tmp_path, again, "--max-restarts", "1", ODD_RANK=rank, **odd)
        assert done.returncode == 0 and "resuming at step 2" in done.stdout, done.stderr
    whole, _ = torchrun(tmp_path, run(words, tmp_path / "whole", *options[:2]))
    assert whole.returncode == 0
    ours = load_file(tmp_path / "whole/model/model.safetensors")
    for name in ("cut", "written 0", "written 1"):
        again = load_file(tmp_path / name / "model/model.safetensors")
        assert all(torch.equal(ours[key], again[key]) for key in ours), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_and_stops_all(words: list[str], tmp_path: Path, number: int) -> None:
    long = ["--train.steps", "100000", "--parallel.shard", "2"]
    line, variables = command(tmp_path, run(words, tmp_path / "run", *long))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(line, env=variables, cwd=tmp_path, **pipes)  # type: ignore[call-overload]
    try:
        while not steps(tmp_path / "run/checkpoints") and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "stopping after this step" in said and "saved at step" in said
    last = int(said.partition("saved at step ")[2].split(".")[0])
    assert steps(tmp_path / "run/checkpoints")[-1] == last
