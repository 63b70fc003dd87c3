"""Faults 17, 25 and 26: flipped bits in a checkpoint, kill -9 at every write of a save, a disk that fills up."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama.commands.cli import main
from minillama.errors import InputError
from minillama.runs import parts
from minillama.runs.checkpoint import Checkpoint, CheckpointCopy, newest_checkpoint, steps
from minillama.runs.report import SilentReport
from minillama.runs.writer import CheckpointWriter

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")


def flip(path: Path) -> None:
    """Turn one bit round in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def saving(words: list[str], out: Path, count: int = 3) -> list[str]:
    """A run of `count` steps that saves after each."""
    return [*words, "--train.steps", str(count), "--checkpoint.every", "1", "--checkpoint.keep", "9", "--out", str(out)]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "run.json", "config.json"])
def test_fault_17_a_flipped_bit(
    name: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(saving(words, out)) == 0
    final = load_file(out / "model" / "model.safetensors")
    flip(out / "checkpoints" / "step-3" / name)
    shutil.rmtree(out / "model")
    capsys.readouterr()
    assert main([*saving(words, out), "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"passing over {out}/checkpoints/step-3/{name}: a file of the checkpoint has changed" in said
    assert "resuming at step 2" in said
    again = load_file(out / "model" / "model.safetensors")
    assert all(torch.equal(final[key], again[key]) for key in final)


def test_fault_17_all_checkpoints_damaged(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(saving(words, out, 2)) == 0
    for folder in (out / "checkpoints").iterdir():
        flip(folder / "optimizer.safetensors")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert main([*saving(words, out, 3), "--resume"]) == 1
    error = capsys.readouterr().err
    assert "every checkpoint of this run is damaged" in error and "step-1" in error and "step-2" in error
    assert before == {path: path.read_bytes() for path in before}


def test_fault_17_without_verifying_sizes_still_count(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(saving(words, out, 2)) == 0
    folder = out / "checkpoints" / "step-2"
    flip(folder / "optimizer.safetensors")
    assert Checkpoint(folder, verify=False).step == 2
    with pytest.raises(InputError, match=r"has changed since it was written(?s:.*)SHA-256"):
        Checkpoint(folder)
    with (folder / "optimizer.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="has another size"):
        Checkpoint(folder, verify=False)
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(InputError, match="is missing"):
        Checkpoint(folder, verify=False)
    manifest = json.loads((out / "checkpoints" / "step-1" / "manifest.json").read_text())
    assert all(set(entry) == {"bytes", "sha256"} for entry in manifest.values())


# The process kills itself at the N-th change of the file system below `checkpoints`. A parent that has imported torch
# forks one child a run, which makes a hundred runs affordable.
KILLER = """
    import os, sys
    import matplotlib.backends.backend_agg, matplotlib.figure
    import torch._dynamo  # an optimizer imports it: a second of each child's two
    import minillama.training.run
    from killing import kill_at_change
    from minillama.commands.cli import main

    def run(words, kill_at=0):
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kill_at_change(kill_at, "/runs/", "step-2")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(words))

    words, out = sys.argv[2:], sys.argv[1]
    kill_at, killed = 1, 0
    while True:
        folder = f"{out}/{kill_at}"
        status = run([*words, "--out", folder], kill_at)
        if status == 0:
            break
        assert status == -9, status
        killed += 1
        assert run([*words, "--out", folder, "--resume"]) == 0, kill_at
        kill_at += 1
    print(killed)
"""


@pytest.mark.slow
@LINUX
def test_fault_25_kill_9_at_every_write_of_a_save(words: list[str], tmp_path: Path) -> None:
    script = tmp_path / "killer.py"
    script.write_text(textwrap.dedent(KILLER))
    shutil.copy(Path(__file__).with_name("killing.py"), tmp_path)
    options = saving(words, tmp_path / "x", 2)[:-2]
    options[options.index("--checkpoint.keep") + 1] = "1"  # so that old ones are removed, too
    command = [sys.executable, str(script), str(tmp_path / "runs"), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 25  # writes at which a run was killed
    folders = sorted((tmp_path / "runs").iterdir(), key=lambda path: int(path.name))
    whole = load_file(folders[-1] / "model" / "model.safetensors")
    lines = [json.loads(line) for line in (folders[-1] / "metrics.jsonl").read_text().splitlines()]
    losses = [line.get("val_loss") for line in lines]
    for folder in folders:
        weights = load_file(folder / "model" / "model.safetensors")
        assert all(torch.equal(whole[key], weights[key]) for key in whole), folder.name
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
        assert newest_checkpoint(folder / "checkpoints")[0] is not None
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1, 2], folder.name
        assert [line.get("val_loss") for line in lines] == losses, folder.name


def in_mount(script: str, place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own, with a small file system at `place`."""
    place.mkdir()
    command = ["unshare", "--mount", "sh", "-ec", script, str(place), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a file system of its own size takes root on Linux",
)


@pytest.mark.slow
@needs_root
def test_fault_26_the_disk_fills_up_during_a_run(words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "small"
    script = """
        place=$0; mount -t tmpfs -o size=40m none "$place"; run=$place/run
        "$@" --out $run --train.steps 100000 --checkpoint.every 5 --validate.every 100000 > $place.log 2> $place.err &
        pid=$!
        while ! ls $run/checkpoints/step-* > /dev/null 2>&1; do kill -0 $pid; sleep 0.05; done
        dd if=/dev/zero of=$place/ballast bs=4k > /dev/null 2>&1 || true
        status=0; wait $pid || status=$?
        rm $place/ballast
        echo "status $status"; cat $place.err; ls -A $run/checkpoints
        at=$(ls $run/checkpoints | sed s/step-// | sort -n | tail -1)
        "$@" --out $run --train.steps $((at + 3)) --checkpoint.every 5 --validate.every 100000 --resume
    """
    done = in_mount(script, place, sys.executable, "-m", "minillama", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "status 1" in done.stdout  # metrics.jsonl could not grow, and said so
    assert "cannot write" in done.stdout and "No space left on device" in done.stdout
    assert ".tmp" not in done.stdout and "Traceback" not in done.stdout + done.stderr
    assert "resuming at step" in done.stdout and "finished" in done.stdout


@needs_root
def test_fault_26_a_disk_that_is_too_small_is_refused(words: list[str], tmp_path: Path) -> None:
    place = tmp_path / "small"
    options = ["--model.dim", "256", "--model.n_layers", "4", "--model.hidden_dim", "512"]
    script = 'mount -t tmpfs -o size=8m none "$0"; status=0; "$@" --out "$0"/run || status=$?; ls -A "$0"; exit $status'
    done = in_mount(script, place, sys.executable, "-m", "minillama", *words, *options)
    assert done.returncode == 1
    assert "the disk is too small for this run" in done.stderr and "--checkpoint.keep" in done.stderr
    assert "GiB free" in done.stderr and "step 0" not in done.stdout and done.stdout.strip() == ""


def test_a_checkpoint_with_values_that_are_no_numbers_is_never_written(tmp_path: Path) -> None:
    snapshot = CheckpointCopy(
        {"a.weight": torch.ones(3)}, {"a.weight/exp_avg": torch.tensor([1.0, torch.nan])}, {"step": 4}
    )
    with pytest.raises(InputError, match=r"is not written, step 4(?s:.*)a.weight/exp_avg"):
        snapshot.check()


def test_parts_of_a_checkpoint_that_failed_are_removed(tmp_path: Path) -> None:
    def fail(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        raise InputError("cannot write", found="no space left on device")

    (tmp_path / ".parts-3").mkdir()
    (tmp_path / ".parts-3" / parts.file_name(1, 2)).write_bytes(bytes(100))
    writer = CheckpointWriter(tmp_path, 2, fail, SilentReport())
    writer.submit(lambda: CheckpointCopy({}, {}, {"step": 3}, index=0, count=2))
    with pytest.raises(InputError, match="cannot write"):
        writer.finish()
    assert not [*tmp_path.iterdir()]


def test_the_best_and_the_newest_checkpoints_stay(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--train.steps", "12", "--validate.every", "2", "--optim.lr", "1e3", "--optim.warmup_steps", "12"]
    assert main([*words, *options, "--out", str(out)]) == 0  # a rate that rises until all is lost
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line and line["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 10 and steps(out / "checkpoints") == [best, 10, 12]


def test_a_best_step_without_a_checkpoint_evicts_nothing(words: list[str], tmp_path: Path) -> None:
    from minillama.runs.checkpoint import CheckpointCopy
    from minillama.runs.report import make_report
    from minillama.runs.writer import CheckpointWriter

    def write(path: Path, tensors: object) -> None:
        if len(steps(tmp_path)) == 2:
            raise OSError(28, "No space left on device")
        for name in ("config.json", "model.safetensors"):
            (path / name).write_text("x")

    said: list[str] = []
    report = make_report()
    report.say = said.append  # type: ignore[method-assign, assignment]
    writer = CheckpointWriter(tmp_path, 1, write, report)
    for step, loss in ((2, 3.0), (4, 5.0), (6, 1.0)):
        writer.submit(lambda step=step: CheckpointCopy({}, {"a": torch.ones(1)}, {"step": step}))  # type: ignore[misc]
        writer.wait()
        writer.losses[step] = loss
    assert steps(tmp_path) == [2, 4] and writer.best == 2
    assert "No space left" in said[0] and "the run continues" in said[0]
    with pytest.raises(InputError, match="cannot write"):
        writer.finish()


def test_fault_17_what_is_damaged_does_not_count_among_the_newest(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(saving(words, out, 3)) == 0
    flip(out / "checkpoints" / "step-3" / "model.safetensors")
    assert main([*saving(words, out, 4), "--resume", "--checkpoint.keep", "1"]) == 0
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert "damaged-step-3" in names and "step-4" in names


def test_a_manifest_is_not_trusted(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert main(saving(words, out, 1)) == 0
    folder = out / "checkpoints" / "step-1"
    manifest = json.loads((folder / "manifest.json").read_text())
    for odd in ({}, manifest | {"../../secret": {"bytes": 1, "sha256": ""}}, [1]):
        (folder / "manifest.json").write_text(json.dumps(odd))
        with pytest.raises(InputError, match=r"unknown format|cannot be read|not a JSON object"):
            Checkpoint(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = json.loads((folder / "run.json").read_text())
    for step in (-1, "1"):
        text = json.dumps(run | {"step": step}).encode()
        (folder / "run.json").write_bytes(text)
        known = manifest | {"run.json": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}}
        (folder / "manifest.json").write_text(json.dumps(known))
        with pytest.raises(InputError, match=r"no step of a run|another version"):
            Checkpoint(folder)
