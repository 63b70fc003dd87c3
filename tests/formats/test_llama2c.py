"""llama2.c's files, with the trained model and the text that llama2.c itself prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama import Decoder, ModelConfig
from minillama.convert import convert
from minillama.formats.open import open_model

ROOT = Path(__file__).resolve().parents[2]
BOTH = pytest.mark.parametrize("name", ["checkpoint_legacy.bin", "checkpoint_v1.bin"])


@BOTH
def test_stories260k_prints_its_golden_text(name: str, shared: Path) -> None:
    model, vocabulary = shared / "models/stories260K" / name, shared / "tokenizer/stories260K/tok512.bin"
    command = [sys.executable, str(ROOT / "generate.py"), "--model", str(model), "--tokenizer", str(vocabulary)]
    command += ["--prompt", "", "--max-new-tokens", "200", "--temperature", "0"]
    printed = subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout
    assert printed == (shared / "models/stories260K/golden.txt").read_bytes()


@BOTH
def test_its_shape_is_the_presets(name: str, shared: Path) -> None:
    opened = open_model(shared / "models/stories260K" / name)
    preset = ModelConfig.load("stories260k")
    assert opened.config == preset.changed({"preset": ""}) and opened.config.num_params() == 260_032


def test_both_forms_hold_the_same_weights_and_convert(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models/stories260K"
    one, other = (Decoder.from_pretrained(folder / f"checkpoint_{name}.bin") for name in ("legacy", "v1"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    vocabulary = shared / "tokenizer/stories260K/tok512.bin"
    convert(folder / "checkpoint_v1.bin", tmp_path / "hf", "hf", tokenizer=vocabulary)
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf")
    back = Decoder.from_pretrained(tmp_path / "a.gguf")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), back.parameters(), strict=True))
