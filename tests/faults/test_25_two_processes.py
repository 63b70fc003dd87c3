"""Fault 25 with two processes that have parts: kill -9 of one of them at every write of a checkpoint."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch import distributed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux"),
    pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed"),
]

# A run of two processes is copied as it was after its first checkpoint. Two forks write the second one as the run did,
# and one of them kills itself at the N-th change of the file system. The other one is told so, as the trainer
# tells its writer that the run has failed.
KILLER = """
    import json, os, shutil, signal, socket, sys, time
    from pathlib import Path
    import matplotlib.backends.backend_agg, matplotlib.figure
    import torch._dynamo, torch.distributed.fsdp
    import minillama.training.run
    from killing import kill_at_change
    from safetensors import safe_open
    from safetensors.torch import load_file
    from minillama import Decoder
    from minillama.commands.cli import main
    from minillama.errors import InputError
    from minillama.runs import checkpoint, parts
    from minillama.runs.report import SilentReport
    from minillama.runs.writer import CheckpointWriter
    from minillama.tokenizer import Tokenizer
    from minillama.training.model_folder import ModelFolder

    checkpoint.GRACE = 0.05
    out, words = Path(sys.argv[1]), sys.argv[2:]
    whole = out / "whole"

    def fork(work, *given):
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(work(*given))
        return child

    def both(work, *given, who=0):
        left, codes = {fork(work, rank, *given): rank for rank in range(2)}, {}
        while left:
            child, status = os.wait()
            codes[left.pop(child)] = os.waitstatus_to_exitcode(status)
            for other in left if codes.get(who) == -9 else ():
                os.kill(other, signal.SIGTERM)
        return codes

    def train(rank, port, *options):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return main([*words, *options])

    def run(*options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        codes = both(train, port, *options)
        assert codes == {0: 0, 1: 0}, codes

    def save(rank, folder, who, kill_at):
        path = whole / "checkpoints/step-2" / parts.file_name(rank, 2)
        with safe_open(path, "pt") as file:
            known = json.loads(file.metadata()["parts"])
        places = {
            name: parts.Place(tuple(slice(a, a + n) for a, n in zip(one["start"], shapes[rank][name])), one["shape"])
            for name, one in known.items()
        }
        copy = checkpoint.CheckpointCopy(model if rank == 0 else {}, optimizers[rank], record, places, rank, 2)
        writer = CheckpointWriter(folder / "checkpoints", 1, written.write, SilentReport(), rank == 0)
        signal.signal(signal.SIGTERM, lambda *_: writer.over.set())
        if rank == who:
            kill_at_change(kill_at, str(folder), "[.]parts-2|step-2")
        try:
            writer.submit(lambda: copy)
            writer.finish()
        except InputError:
            return 1
        return 0

    def content(folder):
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    run("--out", str(whole))
    second = whole / "checkpoints/step-2"
    expected, model = content(second), load_file(second / "model.safetensors")
    record = json.loads((second / "run.json").read_text())
    optimizers = [load_file(second / parts.file_name(rank, 2)) for rank in range(2)]
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in optimizers]
    written = ModelFolder(Decoder.from_pretrained(second), Tokenizer.load(second))
    final, found = content(whole / "model"), []
    for who in range(2):
        kill_at = 1
        while True:
            folder = out / f"{who} {kill_at}"
            shutil.copytree(whole, folder, ignore=lambda path, names: {"model", "step-2"} & {*names})
            codes = both(save, folder, who, kill_at, who=who)
            if codes == {0: 0, 1: 0}:
                break
            assert codes[who] == -9, codes
            assert codes[1 - who] in (0, 1, -signal.SIGTERM), codes  # asked to end before it had a handler
            newest, _ = checkpoint.newest_checkpoint(folder / "checkpoints")  # absent or complete
            assert newest is not None and newest.step in (1, 2), (who, kill_at)
            assert newest.step == 1 or content(newest.path) == expected, (who, kill_at)
            found.append((who, newest.step))
            if kill_at % 10 == 2:  # the run itself goes on from there
                run("--out", str(folder), "--resume")
                assert content(folder / "model") == final, (who, kill_at)
            else:
                checkpoint.remove_parts(folder / "checkpoints")
                assert both(save, folder, who, 0) == {0: 0, 1: 0}, (who, kill_at)
                assert content(folder / "checkpoints/step-2") == expected, (who, kill_at)
            assert {path.name for path in (folder / "checkpoints").iterdir()} <= {"step-1", "step-2"}, (who, kill_at)
            kill_at += 1
    print(len([who for who, _ in found if who == 0]), len([who for who, _ in found if who]), len({*found}))
"""


def test_kill_9_of_one_process_at_every_write_of_a_checkpoint(words: list[str], tmp_path: Path) -> None:
    script = tmp_path / "killer.py"
    script.write_text(textwrap.dedent(KILLER))
    shutil.copy(Path(__file__).with_name("killing.py"), tmp_path)
    options = ["--train.steps", "2", "--checkpoint.every", "1", "--checkpoint.keep", "9", "--parallel.shard", "2"]
    options += ["--validate.every", "2", "--train.dtype", "float32"]
    command = [sys.executable, str(script), str(tmp_path), *words, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    first, second, states = map(int, done.stdout.split()[-3:])
    assert first > 20 and second >= 3 and states >= 3  # of the first one before and after the rename, and the second
