"""Faults 31 and 32: SIGTERM during a step, an evaluation and a save; a second Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama.runs.checkpoint import Checkpoint, newest_checkpoint, steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="signals are those of Unix"),
]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(words: list[str], tmp_path: Path) -> Iterator[Start]:
    """Begin a run in a process of its own, whatever its folder; it is ended with the test."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "minillama", *words, "--out", str(tmp_path / "run"), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        begun.append(process)
        return process

    yield begin
    for process in begun:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def ends_with(process: subprocess.Popen[str], status: int) -> str:
    said = process.communicate(timeout=90)[0]
    assert process.returncode == status, said
    assert "Traceback" not in said, said
    return said


def recorded(out: Path) -> list[int]:
    path = out / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_fault_31_sigterm_during_a_step(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--train.steps", "1000000", "--checkpoint.every", "1000000", "--validate.every", "1000000"]
    process = start(*options)
    wait_for(lambda: len(recorded(out)) > 20, process)
    process.send_signal(signal.SIGTERM)
    said = ends_with(process, 143)
    found, _ = newest_checkpoint(out / "checkpoints")
    assert found is not None and f"stopped by SIGTERM; saved at step {found.step}" in said
    assert recorded(out)[-1] in (found.step, found.step - 1)
    said = ends_with(start("--resume", *options, "--train.steps", str(found.step + 5)), 0)
    assert f"resuming at step {found.step}" in said
    assert recorded(out) == list(range(found.step + 6))


# An evaluation of seconds: all of a long text, one row at a time. A save of seconds: many parameters.
SLOW_EVALUATION = ["--data.val_fraction", "0.97", "--train.micro_batch_size", "1", "--train.batch_size", "1"]


def test_fault_31_sigterm_during_an_evaluation(start: Start, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of {i * i % 997}." for i in range(40_000)))
    out = tmp_path / "run"
    options = [*SLOW_EVALUATION, "--train.steps", "4", "--validate.every", "3"]
    process = start(*options)
    wait_for(lambda: steps(out / "checkpoints"), process)  # it is written while the evaluation goes on
    process.send_signal(signal.SIGTERM)
    said = ends_with(process, 143)
    assert "stopping\n" in said and "saved at step 3" in said
    assert steps(out / "checkpoints") == [3] and recorded(out) == [0, 1, 2]
    ends_with(start("--resume", *options), 0)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 4] and len(lines) == 5
    assert lines[3]["loss"] is not None


def test_fault_31_sigterm_during_a_save(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--model.dim", "512", "--model.n_layers", "8", "--model.hidden_dim", "2048", "--train.steps", "1000"]
    options += ["--checkpoint.every", "2", "--validate.every", "1000"]
    process = start(*options)
    wait_for(lambda: list((out / "checkpoints").glob(".step-*.tmp")), process)
    process.send_signal(signal.SIGTERM)
    said = ends_with(process, 143)
    found, passed = newest_checkpoint(out / "checkpoints")
    assert found is not None and not passed and f"saved at step {found.step}" in said
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_fault_32_a_second_signal_stops_at_once(number: int, start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of {i * i % 997}." for i in range(20_000)))
    options = ["--train.steps", "1000000", "--checkpoint.every", "2", "--train.batch_size", "4096"]
    options += ["--validate.every", "1000000", "--validate.tokens", "200"]  # a step takes a second
    process = start(*options)
    wait_for(lambda: steps(out / "checkpoints"), process)
    process.send_signal(number)
    time.sleep(0.15)  # two at once would be one
    process.send_signal(number)
    ends_with(process, 130)
    for step in steps(out / "checkpoints"):
        saved = Checkpoint(out / "checkpoints" / f"step-{step}")
        assert all(tensor.isfinite().all() for tensor in load_file(saved.path / "model.safetensors").values())
    assert torch.isfinite(torch.tensor(recorded(out), dtype=torch.float32)).all()
    last = steps(out / "checkpoints")[-1]
    said = ends_with(start("--resume", *options, "--train.steps", str(last + 1)), 0)
    assert f"resuming at step {last}" in said
