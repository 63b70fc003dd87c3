"""A run of a few thousand parameters, as command-line words."""

from __future__ import annotations

from pathlib import Path

import pytest

SMALL = {
    "model.dim": 16,
    "model.n_layers": 1,
    "model.n_heads": 2,
    "model.n_kv_heads": 1,
    "model.hidden_dim": 24,
    "model.vocab_size": 300,
    "model.max_seq_len": 16,
    "train.steps": 2,
    "train.batch_size": 2,
    "train.compile": "false",
    "sample.max_new_tokens": 0,
}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} of {i * i % 91}, the tide is in." for i in range(400)), encoding="utf-8")
    small = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    return ["train", *small, "--data.sources", str(text), "--data.cache", str(tmp_path / "cache")]
