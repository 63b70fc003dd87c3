"""Training of an adapter: what is trained, written, resumed and read again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama.errors import InputError
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.model.lora import load_adapter
from minillama.runs.config import RunConfig
from minillama.training.run import train

from .test_several_models import StopAt
from .test_trainer import Quiet

Make = Callable[..., RunConfig]


@pytest.fixture
def base(tiny_config: Make, tmp_path: Path) -> Path:
    assert train(tiny_config("--train.steps", "4"), str(tmp_path / "base"), report=Quiet()) == 0
    return tmp_path / "base/model"


def words(base: Path, *more: str) -> list[str]:
    return ["--train.init_from", str(base), "--lora.rank", "4", "--lora.alpha", "8", "--optim.muon_lr", "0", *more]


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_trained_and_resumed_to_the_bit(
    tiny_config: Make, base: Path, tmp_path: Path, dtype: str, quantize: str
) -> None:
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    config = tiny_config(*words(base, "--train.dtype", dtype, "--train.quantize", quantize))
    assert train(config, str(tmp_path / "whole"), report=Quiet()) == 0
    assert train(config, str(tmp_path / "cut"), report=StopAt(5)) == 143
    assert train(config, str(tmp_path / "cut"), resume=True, report=Quiet()) == 0
    ours, again = (load_file(tmp_path / name / "model/adapter_model.safetensors") for name in ("whole", "cut"))
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in ours.items())
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    first, last = (next(line["val_loss"] for line in order if "val_loss" in line) for order in (lines, lines[::-1]))
    assert last < first
    if quantize == "none" and dtype == "float32":
        opened = open_model(base)
        model = load_adapter(Decoder.from_pretrained(base), tmp_path / "whole/model", base=opened)
        plain = Decoder.from_pretrained(base)
        ids = torch.arange(12)[None]
        assert (model(ids) - plain(ids)).abs().max() > 1e-4
    sizes = [sum(f.stat().st_size for f in (tmp_path / name).rglob("*.safetensors")) for name in ("base", "whole")]
    assert sizes[1] < sizes[0]  # no base in any checkpoint


def test_another_base_is_refused_on_resume(tiny_config: Make, base: Path, tmp_path: Path) -> None:
    config = tiny_config(*words(base))
    assert train(config, str(tmp_path / "run"), report=StopAt(5)) == 143
    model = Decoder.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(base)
    with pytest.raises(InputError, match="trained on another base"):
        train(config, str(tmp_path / "run"), resume=True, report=Quiet())


def test_settings_that_do_not_go_together_are_refused(tiny_config: Make, base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an adapter needs a model"):
        tiny_config("--lora.rank", "4")
    with pytest.raises(InputError, match="quantized weights are not trained"):
        tiny_config("--train.init_from", str(base), "--train.quantize", "int4")
    with pytest.raises(InputError, match="no layer has such a name"):
        train(tiny_config(*words(base, "--lora.targets", "query")), str(tmp_path / "run"), report=Quiet())
