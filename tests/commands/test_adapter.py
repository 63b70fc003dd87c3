"""Adapters on the command line: merged by `convert`, used by `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch

from minillama import Decoder, ModelConfig
from minillama.commands.cli import main
from minillama.config.lora import LoRAConfig
from minillama.formats.open import open_model
from minillama.inference.generate import generate
from minillama.inference.load import load_model
from minillama.inference.quantize import quantize
from minillama.inference.sampling import Sampling
from minillama.model.lora import adapter_names, add_lora, load_adapter, lora_parameters, save_adapter
from minillama.native.build import can_build
from minillama.native.decode import NativeStep
from minillama.tokenizer import byte_tokenizer

CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=257, max_seq_len=64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Decoder(CONFIG).save_pretrained(tmp_path / "base")
    byte_tokenizer().save(tmp_path / "base")
    return tmp_path / "base"


def tuned(base: Path, folder: Path, seed: int = 1, **settings: object) -> Decoder:
    """A base with an adapter that changes what it says, written into a folder."""
    opened = open_model(base)
    model = add_lora(Decoder.from_pretrained(opened), LoRAConfig(rank=4, **settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    save_adapter(model, folder, base=opened)
    return model.eval()


@pytest.mark.parametrize(
    ("words", "bound"),
    [
        (["--to", "hf"], 1e-5),
        (["--to", "hf", "--dtype", "bf16"], 0.05),
        (["--to", "gguf"], 1e-5),
        (["--to", "gguf", "--dtype", "q8_0"], 0.1),
    ],
)
def test_convert_merges(words: list[str], bound: float, base: Path, tmp_path: Path) -> None:
    model = tuned(base, tmp_path / "a", use_dora=True, targets=("all-linear", "embed_tokens", "lm_head"))
    before = (base / "model.safetensors").read_bytes()
    assert main(["convert", str(base), str(tmp_path / "b"), *words, "--merge", str(tmp_path / "a")]) == 0
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = model(ids), Decoder.from_pretrained(tmp_path / "b", torch.float32)(ids)
    assert (found - expected).norm() < bound * expected.norm()
    assert (base / "model.safetensors").read_bytes() == before


def test_merging_into_weights_that_were_quantized(base: Path, tmp_path: Path) -> None:
    """They are dequantized, and the update is not lost in the int4 matrices that the file has ready."""
    assert main(["convert", str(base), str(tmp_path / "q4.gguf"), "--to", "gguf", "--dtype", "q4_0"]) == 0
    model = tuned(tmp_path / "q4.gguf", tmp_path / "a", targets=("q_proj", "down_proj"))
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, plain = model(ids), Decoder.from_pretrained(tmp_path / "q4.gguf")(ids)
        assert (plain - expected).norm() > 0.5 * expected.norm()
        for name, bound in (("f32", 1e-5), ("q4_1", 0.3)):
            words = ["--to", "gguf", "--dtype", name, "--merge", str(tmp_path / "a")]
            assert main(["convert", str(tmp_path / "q4.gguf"), str(tmp_path / f"{name}.gguf"), *words]) == 0
            found = Decoder.from_pretrained(tmp_path / f"{name}.gguf")(ids)
            assert (found - expected).norm() < bound * expected.norm()


def test_the_tokenizer_beside_an_adapter_is_taken(base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "a")
    byte_tokenizer().save(tmp_path / "a")
    (tmp_path / "a/generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert main(["convert", str(base), str(tmp_path / "b"), "--to", "hf", "--merge", str(tmp_path / "a")]) == 0
    own = byte_tokenizer().eos_id  # the tokenizer's first, then the adapter's
    assert json.loads((tmp_path / "b/generation_config.json").read_text())["eos_token_id"] == [own, 7, 9]
    assert open_model(tmp_path / "b").stop_ids == {own, 7, 9}


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned(base, tmp_path / "a")
    torch.manual_seed(5)
    Decoder(CONFIG).save_pretrained(tmp_path / "other")
    words = ["convert", str(tmp_path / "other"), str(tmp_path / "b"), "--to", "hf", "--merge"]
    assert main([*words, str(tmp_path / "a")]) == 1
    said = capsys.readouterr().err
    assert "another base model" in said and str(base) in said and "Traceback" not in said
    assert main([*words, str(base)]) == 1
    assert "no adapter in this folder" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def written(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["generate", "--temperature", "0", "--max-new-tokens", "12", "--prompt", *argv]) == 0
    return capsys.readouterr().out


def greedy(model: Decoder, prompt: str) -> str:
    return generate(model.eval(), byte_tokenizer(), [prompt], 12, Sampling(temperature=0))[0].text


def test_generate_with_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tuned(base, tmp_path / "a", use_dora=True)
    assert main(["convert", str(base), str(tmp_path / "merged"), "--to", "hf", "--merge", str(tmp_path / "a")]) == 0
    found = written(["Once", "--model", str(base), "--adapter", str(tmp_path / "a")], capsys)
    assert found == written(["Once", "--model", str(tmp_path / "merged")], capsys)
    assert found == greedy(model, "Once")
    assert found != written(["Once", "--model", str(base)], capsys)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_adapters_stay_beside_quantized_weights(kind: Literal["int8", "int4"], base: Path, tmp_path: Path) -> None:
    tuned(base, tmp_path / "a", use_dora=True)
    opened = open_model(base)
    expected = load_adapter(quantize(Decoder.from_pretrained(opened), kind), tmp_path / "a", base=opened)
    found = load_model(opened, "auto", "cpu", kind, compiles=True, adapters={"a": tmp_path / "a"})
    assert found.step is None and adapter_names(found) == ["a"]
    plain = load_model(opened, "auto", "cpu", kind)
    ids = torch.randint(0, 257, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(found(ids), expected(ids), atol=1e-5, rtol=1e-5)
        assert (found(ids) - plain(ids)).norm() > 0.5 * plain(ids).norm()
    assert greedy(found, "Once") == greedy(expected, "Once")


def test_one_adapter_of_float_weights_keeps_the_fast_step(base: Path, tmp_path: Path) -> None:
    if not can_build():
        pytest.skip("no compiler")
    model = tuned(base, tmp_path / "a")
    found = load_model(open_model(base), "auto", "cpu", compiles=True, adapters={"a": tmp_path / "a"})
    assert isinstance(found.step, NativeStep)
    assert greedy(found, "Once") == greedy(model, "Once")


def test_several_adapters(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {name: tuned(base, tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    words = ["Once", "Twice", "--model", str(base), "--adapter", str(tmp_path / "first"), f"b={tmp_path / 'second'}"]
    lines = [json.loads(line) for line in written(words, capsys).splitlines()]
    assert [(line["adapter"], line["prompt"]) for line in lines] == [
        ("first", "Once"),
        ("first", "Twice"),
        ("b", "Once"),
        ("b", "Twice"),
    ]
    for line in lines:
        model = models["first" if line["adapter"] == "first" else "second"]
        assert line["completion"] == greedy(model, line["prompt"])
    assert main(["generate", "--prompt", *words[:-1], f"first={tmp_path / 'second'}"]) == 1
    assert "two adapters of one name" in capsys.readouterr().err
    byte_tokenizer().with_chat_template("{{ messages[0].content }}").save(tmp_path / "second")
    assert main(["generate", "--prompt", *words]) == 1
    assert "different tokenizers or chat templates" in capsys.readouterr().err
    glm = [str(base), "--adapter", str(tmp_path / "first"), f"b={tmp_path / 'second'}"]
    assert main(["infill", "--text", "a [MASK]", "--model", *glm]) == 1
    assert "one adapter at a time" in capsys.readouterr().err


def test_an_adapter_given_as_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x"]) == 1
    said = capsys.readouterr().err
    assert "this is an adapter, not a model" in said and f"(convert: --merge) {tmp_path}" in said
