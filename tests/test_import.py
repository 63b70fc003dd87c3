"""`import minillama` is cheap: nothing heavy is loaded until a name needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

import minillama

HEAVY = ("torch", "numpy", "transformers", "rich", "tyro", "tokenizers", "hypothesis")


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_import_loads_nothing_heavy() -> None:
    assert not loaded_after("import minillama; dir(minillama)").intersection(HEAVY)


@pytest.mark.parametrize(
    "statement",
    [
        "from minillama import Tokenizer, InputError",
        "from minillama import ModelConfig",
        "from minillama.commands.cli import main; main([])",
    ],
)
def test_torch_waits_until_it_is_needed(statement: str) -> None:
    loaded = loaded_after(statement)
    assert "minillama" in loaded
    assert "torch" not in loaded


def test_a_model_without_numbers_needs_no_compiler() -> None:
    """On meta torch does much of its arithmetic in Python, which imports torch._dynamo and sympy: a second."""
    made = "torch.set_default_device('meta'); Decoder(ModelConfig.load('llama-tiny')).fuse()"
    loaded = loaded_after(f"import torch; from minillama import Decoder, ModelConfig; {made}")
    assert "minillama.model" in loaded
    assert "torch._dynamo" not in loaded


def test_import_time_is_shown() -> None:
    command = [sys.executable, "-X", "importtime", "-c", "import minillama"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (line,) = [line for line in report.splitlines() if line.rsplit("|", 1)[-1].strip() == "minillama"]
    print(f"import minillama: {int(line.split('|')[1]) / 1000:.1f} ms")


def test_public_names_resolve_and_are_listed() -> None:
    for name in minillama.__all__:
        assert getattr(minillama, name) is not None
        assert name in dir(minillama)
    with pytest.raises(AttributeError, match="no attribute 'Decodr'"):
        minillama.Decodr  # noqa: B018
