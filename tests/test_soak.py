"""Many steps and many generations in one process: memory stays where it was."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

import pytest

from minillama.inference.generate import generate
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs.config import load_run_config
from minillama.tokenizer import Tokenizer
from minillama.training.run import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm"),
]

WORDS = [
    *("--model.dim", "16", "--model.n_layers", "1", "--model.n_heads", "2", "--model.n_kv_heads", "1"),
    *("--model.hidden_dim", "24", "--model.vocab_size", "280", "--model.max_seq_len", "16"),
    *("--train.batch_size", "2", "--train.compile", "false", "--train.dtype", "float32", "--optim.muon_lr", "0"),
    *("--sample.max_new_tokens", "0", "--validate.every", "1000", "--validate.tokens", "200"),
    *("--checkpoint.every", "1000"),
]


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Watch:
    """Notes memory every hundred steps."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}

    def start(self, step: int, steps: int) -> None: ...

    def stop(self) -> None: ...

    def say(self, text: str = "") -> None: ...

    def step(self, record: dict) -> None:
        if record["step"] % 100 == 0:
            self.memory[record["step"]] = resident()


def test_twenty_thousand_steps(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of {i * i % 91}, the tide is in." for i in range(400)))
    words = [*WORDS, "--data.sources", str(tmp_path / "text.txt"), "--data.cache", str(tmp_path / "cache")]
    watch = Watch()
    config = load_run_config("tiny", [*words, "--train.steps", "20000"])
    assert train(config, str(tmp_path / "run"), report=watch) == 0
    early, late = (statistics.median(watch.memory[s] for s in range(a, a + 1000, 100)) for a in (1000, 19_100))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    speed = [line["tokens_per_second"] for line in lines[1:]]
    first, last = (32e3 / statistics.median(speed[a : a + 1000]) for a in (1000, 19_000))
    print(f"memory {early / 2**20:.1f} to {late / 2**20:.1f} MiB; a step {first:.2f} to {last:.2f} ms")
    assert late < 1.01 * early
    assert len(lines) == 20_001


def test_a_thousand_generations(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of {i * i % 91}, the tide is in." for i in range(400)))
    words = [*WORDS, "--data.sources", str(tmp_path / "text.txt"), "--data.cache", str(tmp_path / "cache")]
    train(load_run_config("tiny", [*words, "--train.steps", "2"]), str(tmp_path / "run"), report=Watch())
    model, tokenizer = Decoder.from_pretrained(tmp_path / "run/model"), Tokenizer.load(tmp_path / "run/model")
    memory = []
    for i in range(1000):
        prompts = ["Line", "the tide is"][: 1 + i % 2]
        generate(model, tokenizer, prompts, 8, Sampling(seed=i))
        memory.append(resident())
    assert statistics.median(memory[-100:]) < 1.01 * statistics.median(memory[100:200])
