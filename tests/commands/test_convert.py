"""`minillama convert` and `minillama inspect` as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from minillama import Decoder, ModelConfig
from minillama.commands.cli import main
from minillama.tokenizer import byte_tokenizer, char_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=257, max_seq_len=32)
    Decoder(config).save_pretrained(tmp_path / "hf")
    byte_tokenizer().save(tmp_path / "hf")
    return tmp_path / "hf"


def test_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "a.gguf"), "--dtype", "f32"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and re.search("wrote .*: 21 tensors, .* MB in 1 file\n", captured.err)
    assert main(["convert", str(folder), str(tmp_path / "b")]) == 1
    assert "the format of the output is not given" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "a.gguf"), str(tmp_path / "back"), "--to", "hf"]) == 0
    mine, back = (folder / "model.safetensors").read_bytes(), (tmp_path / "back/model.safetensors").read_bytes()
    assert mine == back
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "back", "hf"], "nothing temporary is left"


def test_nothing_is_overwritten_and_nothing_half_is_left(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").write_text("mine")
    assert main(["convert", str(folder), str(tmp_path / "there"), "--to", "hf"]) == 1
    assert "the destination exists" in capsys.readouterr().err
    assert (tmp_path / "there").read_text() == "mine"
    char_tokenizer(["abc"]).save(tmp_path / "chars")
    words = ["convert", str(folder), str(tmp_path / "b.gguf"), "--to", "gguf", "--tokenizer", str(tmp_path / "chars")]
    assert main(words) == 1
    assert "GGUF cannot express this tokenizer" in capsys.readouterr().err
    monkeypatch.setattr("minillama.formats.gguf.layout", lambda *args, **named: 1 / 0)
    assert main(["convert", str(folder), str(tmp_path / "b.gguf"), "--to", "gguf"]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chars", "hf", "there"]


@pytest.mark.parametrize("words", [["--to", "hf", "--dtype", "q8_0"], ["--to", "meta"]])
def test_what_a_format_has_not_is_refused(words: list[str], folder: Path, tmp_path: Path) -> None:
    assert main(["convert", str(folder), str(tmp_path / "x"), *words]) == 1
    assert not (tmp_path / "x").exists()


def test_calibrated_by_a_text(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The miller kept two donkeys and a clock. " * 20)
    words = ["convert", str(folder), str(tmp_path / "a.gguf"), "--to", "gguf", "--calibrate", str(text)]
    assert main([*words, "--dtype", "q8_0"]) == 1
    assert "leave out --calibrate" in capsys.readouterr().err
    assert main([*words, "--dtype", "q4_1"]) == 0
    said = capsys.readouterr().err
    assert "held-out tokens" in said and "perplexity" in said
    assert main(["generate", "--model", str(tmp_path / "a.gguf"), "--prompt", "The", "--max-new-tokens", "2"]) == 0
    text.write_text("Too short.")
    assert main([*words[:2], str(tmp_path / "b.gguf"), *words[3:], "--dtype", "q4_1"]) == 1
    assert "too short to calibrate by" in capsys.readouterr().err
    assert not (tmp_path / "b.gguf").exists()


def test_inspect(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "a.gguf"), "--to", "gguf", "--dtype", "q4_0"]) == 0
    capsys.readouterr()
    for path, kind, name in [
        (folder, "Hugging Face folder", "model.layers.1.self_attn.k_proj.weight"),
        (tmp_path / "a.gguf", "GGUF version 3", "blk.1.attn_k.weight"),
    ]:
        assert main(["inspect", str(path)]) == 0
        out = capsys.readouterr().out
        assert kind in out and name in out and "n_kv_heads" in out and "16 x 32" in out
        assert main(["inspect", str(path), "--json"]) == 0
        table = json.loads(capsys.readouterr().out)
        assert table["parameters"] == 35_040 and table["tensors"][name]["shape"] == [16, 32]
    assert "tokenizer.ggml.tokens" in table["metadata"] and table["tensors"][name]["dtype"] == "Q4_0"
