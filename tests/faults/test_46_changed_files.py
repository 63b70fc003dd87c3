"""Model files that are changed while they are open: the old model or a clear error, and no signal of the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minillama import Decoder, InputError, ModelConfig
from minillama.convert import convert
from minillama.formats import meta
from minillama.formats.open import open_model
from minillama.tokenizer import byte_tokenizer

CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=96, vocab_size=257, max_seq_len=32)
FORMATS = ("hf", "m.gguf", "m.bin", "meta")
CUT = """
import os, sys, torch
from minillama import Decoder
for path, file in zip(sys.argv[1::2], sys.argv[2::2]):
    model = Decoder.from_pretrained(path)
    before = model(torch.tensor([[5, 9, 77, 200]]))
    os.truncate(file, 100)
    assert torch.equal(before, model(torch.tensor([[5, 9, 77, 200]]))), path
"""


@pytest.fixture
def models(shared: Path, tmp_path: Path) -> dict[str, tuple[Path, Path]]:
    """A model in each format: what is opened, and the file that holds its tensors."""
    folder = tmp_path / "hf"
    Decoder(CONFIG).save_pretrained(folder)
    byte_tokenizer().save(folder)
    convert(folder, tmp_path / "m.gguf", "gguf")
    shutil.copyfile(shared / "models/stories260K/checkpoint_v1.bin", tmp_path / "m.bin")
    files = {name: (tmp_path / name, tmp_path / name) for name in ("m.gguf", "m.bin")}
    meta.write(tmp_path / "meta", CONFIG, Decoder(CONFIG).state_dict())
    files["meta"] = tmp_path / "meta", tmp_path / "meta/consolidated.00.pth"
    return files | {"hf": (folder, folder / "model.safetensors")}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("how", ["cut", "overwritten", "replaced", "removed"])
def test_fault_46_an_opened_model_that_changes_is_refused(
    kind: str, how: str, models: dict[str, tuple[Path, Path]]
) -> None:
    path, file = models[kind]
    data = file.read_bytes()
    opened = open_model(path)
    first, *_, last = opened.tensors
    assert opened.tensors[first].isfinite().all()
    time.sleep(0.02)  # times of files have a grain
    if how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "overwritten":
        file.write_bytes(data[::-1])
    elif how == "replaced":
        file.unlink()
        file.write_bytes(data)
    else:
        file.unlink()
    expected = "cannot read" if how == "removed" else "the file was changed while it was read"
    for name in (first, last):
        with pytest.raises(InputError, match=expected):
            opened.tensors[name]


def test_fault_46_a_loaded_model_does_not_need_its_files(models: dict[str, tuple[Path, Path]]) -> None:
    """A mapped file that is cut short ends the process with SIGBUS, so this is another process."""
    words = [str(path) for pair in models.values() for path in pair]
    subprocess.run([sys.executable, "-c", CUT, *words], check=True, timeout=120)
