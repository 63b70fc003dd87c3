"""A small run that takes seconds, on text written for these tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.runs.config import RunConfig, load_run_config

SENTENCES = [
    "The heron stands in the shallow water and waits for a fish to pass.",
    "A cart with two wheels went down the hill, and nobody had tied it to anything.",
    "When the lamp was lit, the moths came; when it went out, they left again.",
    "Seven letters were on the table, and not one of them had a stamp.",
    "She counted the steps to the tower twice and got two different numbers.",
]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 30 kB of plain text whose next word can be learnt."""
    lines = [f"{SENTENCES[i * i % 5]} {SENTENCES[(i + 2) % 5]}" for i in range(200)]
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def tiny_config(text_file: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A configuration of a few thousand parameters; further words override it."""

    def make(*words: str) -> RunConfig:
        path = tmp_path / "fixture.toml"
        path.write_text(
            f"""
name = "fixture"
[model]
dim = 32
n_layers = 2
n_heads = 4
n_kv_heads = 2
hidden_dim = 64
vocab_size = 300
max_seq_len = 32
[data]
sources = [{{path = {str(text_file)!r}}}]
val_fraction = 0.1
cache = {str(tmp_path / "cache")!r}
[train]
steps = 12
batch_size = 4
compile = false
dtype = "float32"
[optim]
lr = 1e-2
warmup_steps = 4
[validate]
every = 6
tokens = 500
[sample]
max_new_tokens = 8
[checkpoint]
every = 6
""",
            encoding="utf-8",
        )
        return load_run_config(str(path), words)

    return make
