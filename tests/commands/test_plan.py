"""`minillama plan`: the tables, the JSON, and that it stays light."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minillama.commands import cli
from minillama.config import ModelConfig
from minillama.config.cost import inference_memory, training_memory
from minillama.config.loader import config_names


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["plan", *words, "--json"]) == 0
    table: dict[str, Any] = json.loads(capsys.readouterr().out)
    return table


def test_known_numbers_of_70b(capsys: pytest.CaptureFixture[str]) -> None:
    table = plan_json(capsys, "llama-2-70b")
    assert table["parameters"] == {
        "total": 68_976_648_192,
        "embedding": 262_144_000,
        "head": 262_144_000,
        "layer": 855_654_400,
        "non_embedding": 68_452_360_192,
    }
    assert table["inference_bytes"]["weights"] == {
        "float32": 275_906_592_768,
        "bfloat16": 137_953_296_384,
        "int8": 68_976_648_192,
        "int4": 34_488_324_096,
    }
    assert table["inference_bytes"]["state_per_token"] == 327_680
    assert table["inference_bytes"]["state"] == 4096 * 327_680
    assert table["tensors"]["model.layers.79.mlp.down_proj.weight"] == [8192, 28672]
    assert table["training"]["tokens"] == 20 * 68_976_648_192
    assert table["flops_per_token"]["training"] == 3 * table["flops_per_token"]["forward"]


@pytest.mark.parametrize("name", config_names("model"))
def test_every_preset_adds_up(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    table = plan_json(capsys, name)
    config, count = ModelConfig.load(name), table["parameters"]
    ends = {n: math.prod(shape) for n, shape in config.tensors().items() if not n.startswith("model.layers.")}
    rest = sum(number for n, number in ends.items() if "embed_tokens" not in n and "lm_head" not in n)
    assert count["non_embedding"] == config.n_layers * count["layer"] + rest
    assert count["total"] == count["embedding"] + count["head"] + count["non_embedding"] == config.num_params()
    for part in table["training_bytes"].values():
        assert part.pop("total") == sum(part.values())


def test_options_reach_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--seq-len", "64", "--batch-size", "3", "--dtype", "float32"]
    time = ["--tokens", "1e9", "--tflops", "2", "--devices", "5"]
    table = plan_json(capsys, "stories15m", *size, *time)
    config = ModelConfig.load("stories15m")
    for name, checkpointing in (("plain", False), ("checkpointing", True)):
        expected = training_memory(config, 3, 64, activation_bytes=4, checkpointing=checkpointing)
        assert table["training_bytes"][name]["activations"] == expected.activations
        assert table["training_bytes"][name]["total"] == expected.total
    assert table["inference_bytes"]["state"] == inference_memory(config, 3, 64, kv_bytes=4).state
    flops = 1e9 * config.flops_per_token(64)
    assert table["training"]["flops"] == flops
    assert table["training"]["days"] == pytest.approx(flops / (5 * 2e12) / 86400)


@pytest.mark.parametrize(("name", "kept"), [("stories15m", 38), ("bloom-tiny", 64)])
def test_a_window_takes_what_was_planned(
    name: str,
    kept: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    decode: Callable[..., list[list[int]]],
) -> None:
    monkeypatch.setattr("minillama.config.cost.SPARE", 1)
    pytest.importorskip("torch")
    from minillama.layers.cache import KVCache
    from minillama.model import Decoder

    size = ["--seq-len", "64", "--batch-size", "2", "--dtype", "float32"]
    planned = plan_json(capsys, name, *size, "--window", "16", "--sinks", "6")["inference_bytes"]
    assert planned["state_tokens"] == kept
    model = Decoder(ModelConfig.load(name))
    states, make = [], model.state
    model.state = lambda *args: states.append(made := make(*args)) or made  # type: ignore[method-assign,assignment,func-returns-value]
    decode(model, [[5] * 60] * 2, 4, window=16, sinks=6)
    layers = [layer for layer in states[0].layers if isinstance(layer, KVCache)]
    assert sum(tensor.nbytes for layer in layers for tensor in layer.tensors) == planned["state"]


@pytest.mark.parametrize("name", ["llama-2-70b", "llama-3.2-1b", "llama-tiny"])
def test_tables_are_plain_and_narrow(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", name]) == 0
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    config = ModelConfig.load(name)
    for number in (config.num_params(), config.vocab_size * config.dim):
        assert f"{number:,}" in out
    assert f"{config.vocab_size} x {config.dim}" in out
    assert out.count("self_attn.q_proj.weight") == 1
    assert f"model.layers.N, {config.n_layers} of" in out


def test_human_units(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "llama-2-70b"]) == 0
    rows = {line[:30].strip(): line.split()[-2:] for line in capsys.readouterr().out.splitlines() if "iB" in line}
    assert rows["weights, bfloat16"] == ["128.5", "GiB"]
    assert rows["KV cache, bfloat16, per token"] == ["320", "KiB"]


def test_a_hugging_face_folder_and_a_toml_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig.load("stories15m")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    path = tmp_path / "mine.toml"
    path.write_text('preset = "stories15m"\nn_layers = 7\n')
    assert plan_json(capsys, str(tmp_path))["parameters"]["total"] == config.num_params()
    assert plan_json(capsys, str(path))["config"]["n_layers"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["llama2-70b"], "did you mean 'llama-2-70b'?"),
        (["llama-tiny", "--seq-len", "100000"], "at most the model's max_seq_len"),
        (["llama-tiny", "--batch-size", "0"], "at least 1"),
        (["llama-tiny", "--tflops", "nan"], "more than 0"),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_no_torch_is_loaded(extra: list[str]) -> None:
    code = (
        "import sys; from minillama.commands.cli import main\n"
        f"assert main(['plan', 'llama-2-70b', *{extra}]) == 0\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
    assert "68976648192" in done.stdout.replace(",", "")
