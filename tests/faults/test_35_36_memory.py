"""Faults 35 and 36: memory that runs out while training and while evaluating, by a limit of the system."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.config import ModelConfig
from minillama.data.split import hash_fraction
from minillama.model import Decoder
from minillama.runs.checkpoint import newest_checkpoint
from minillama.runs.config import load_run_config
from minillama.runs.memory import available_memory, largest_micro_batch, needed_memory
from minillama.tokenizer.blanks import BLANK_TOKENS
from minillama.tokenizer.train import TokenizerTrainer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address space is limited on Linux")

# Everything is imported first; then the process may map so many bytes more.
LIMITED = """
    import resource, sys
    import torch
    import minillama.training.run
    from minillama.commands.cli import main

    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    sys.exit(main(sys.argv[2:]))
"""


def limited(script: Path, more: int, *words: str) -> subprocess.CompletedProcess[str]:
    script.write_text(textwrap.dedent(LIMITED))
    command = [sys.executable, str(script), str(more), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environment)


def test_fault_35_out_of_memory_while_training(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of {i * i % 997}, the tide." for i in range(20_000)))
    options = ["--train.batch_size", "4096", "--train.dtype", "float32", "--validate.tokens", "100", "--out", str(out)]
    options += ["--model.hidden_dim", "256", "--train.steps", "1"]
    done = limited(tmp_path / "limited.py", 400 * 2**20, *words, *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory while training" in done.stderr and "Traceback" not in done.stderr
    assert "train.micro_batch_size = 4096" in done.stderr and "GiB are needed" in done.stderr
    advice = re.search(r"--train.micro_batch_size (\d+): .* the same batch of 4096 in (\d+) micro-batches", done.stderr)
    assert advice is not None and advice.groups() == ("2048", "2")
    options += ["--train.micro_batch_size", "64", "--overwrite"]
    done = limited(tmp_path / "limited.py", 400 * 2**20, *words, *options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_fault_36_out_of_memory_while_evaluating(tmp_path: Path) -> None:
    """Held-out records are long, those to train on short: an evaluation needs more than a step."""
    long, short = "the tide is in and the boats are out " * 60, "the tide is in"
    texts = [f"{i} {short}" for i in range(200)] + [f"{i} {long}" for i in range(200)]
    records = [{"text": text, "label": "in"} for text in texts]
    kept = [
        r for r in records if (hash_fraction(json.dumps(r, sort_keys=True), "held out") < 0.2) == (len(r["text"]) > 99)
    ]
    source = tmp_path / "records.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in kept))
    tokenizer = TokenizerTrainer("char", 0, special=BLANK_TOKENS)([long + "0123456789 in out."])
    config = replace(
        ModelConfig.load("glm-tiny"),
        dim=32,
        n_layers=1,
        n_heads=2,
        n_kv_heads=2,
        head_dim=16,
        hidden_dim=32,
        vocab_size=tokenizer.vocab_size,
        max_seq_len=2400,
        tie_embeddings=False,
    )
    Decoder(config).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    out = tmp_path / "run"
    words = ["train", "--train.init_from", str(tmp_path / "base"), "--objective.name", "cloze", "--out", str(out)]
    words += ["--objective.pattern", "{text}: [MASK]", "--objective.verbalizers", "in=in", "out=out", "--data.sources"]
    words += [str(source), "--data.val_fraction", "0.2", "--train.steps", "4", "--validate.every", "2"]
    words += ["--train.compile", "false", "--sample.max_new_tokens", "0", "--train.dtype", "float32"]
    # Step 0 is evaluated as well, so the run begins without a limit and goes on with one.
    assert limited(tmp_path / "limited.py", 2**40, *words).returncode == 0
    done = limited(tmp_path / "limited.py", 600 * 2**20, *words, "--resume", "--train.steps", "6")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory while evaluating" in done.stderr and "Traceback" not in done.stderr
    found, _ = newest_checkpoint(out / "checkpoints")
    assert found is not None and found.step == 6


def test_the_setting_that_fits_is_the_batch_halved() -> None:
    config = load_run_config("tiny", ["--train.batch_size", "48"])
    need = [needed_memory(config, torch.float32, rows).total for rows in (48, 24, 12)]
    assert need[0] > need[1] > need[2]
    assert largest_micro_batch(config, torch.float32, need[0], 48) == 48
    assert largest_micro_batch(config, torch.float32, need[0] - 1, 48) == 24
    assert largest_micro_batch(config, torch.float32, need[2], 48) == 12
    assert largest_micro_batch(config, torch.float32, 2**20, 48) is None
    there = available_memory(torch.device("cpu"))
    assert there is not None and 2**20 < there < 2**50
