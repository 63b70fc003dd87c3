"""Adapters merged into weights and written to files; what refuses a model that has one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minillama.config.lora import LoRAConfig
from minillama.errors import InputError
from minillama.formats.open import open_model
from minillama.inference.quantize import quantize, save_gguf
from minillama.layers.lora import Adapter, LoRALinear
from minillama.layers.mlp import swiglu
from minillama.model import Decoder
from minillama.model.linears import linears
from minillama.model.lora import add_lora, base_tensors, load_adapter, lora_layers, merge, save_adapter
from minillama.native import swiglu as native
from minillama.native.decode import unsupported
from minillama.tokenizer import byte_tokenizer

from .test_lora import ENDS, Kind, make, randomized, tokens


def test_merged_in_bfloat16_is_what_was_trained_to_its_rounding() -> None:
    model = randomized(add_lora(make().bfloat16(), LoRAConfig(rank=4, alpha=8)))
    with torch.no_grad():
        expected, plain = model(tokens()).float(), make().bfloat16()(tokens()).float()
        found = merge(copy.deepcopy(model))(tokens()).float()
    assert (found - expected).norm() < 0.02 * expected.norm() < 0.1 * (plain - expected).norm()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_merging(kind: Kind, dora: bool) -> None:
    model = make(kind, bias="all")
    shared = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    targets = ("all-linear", *ENDS) if kind == "none" else ("all-linear",)
    randomized(add_lora(model, LoRAConfig(rank=4, use_dora=dora, targets=targets)))
    held = base_tensors(model)
    with torch.no_grad():
        expected = model(tokens())
        merged = merge(model)
        torch.testing.assert_close(merged(tokens()), expected, atol=1e-5, rtol=1e-4)
    assert not lora_layers(merged) and all(type(part) is nn.Linear for part in linears(merged).values())
    assert all(torch.equal(held[name], tensor) for name, tensor in shared.items())


def test_merging_casts_once() -> None:
    linear = nn.Linear(64, 96, bias=False).bfloat16()
    layer = LoRALinear.from_base(linear)
    layer.adapters["a"] = Adapter(torch.randn(4, 64) * 1e-2, torch.randn(96, 4), 4)
    layer.active = "a"
    update = layer.part("a").lora_B @ layer.part("a").lora_A  # type: ignore[union-attr]
    assert torch.equal(layer.merged().weight, (linear.weight.float() + update).bfloat16())  # type: ignore[union-attr]


@pytest.mark.parametrize("targets", [("q_proj",), ENDS, ("down_proj",)])
def test_nothing_computes_without_the_adapter(targets: tuple[str, ...], tmp_path: Path) -> None:
    model = randomized(add_lora(make(), LoRAConfig(rank=4, targets=targets)))
    for change in (model.fuse, lambda: quantize(model, "int8")):
        with pytest.raises(InputError, match="merge adapters"):
            change()
    with pytest.raises(InputError, match="would not be written"):
        model.save_pretrained(tmp_path)
    assert unsupported(model) == "it has adapters"
    if targets is not ENDS:
        small = add_lora(make("int4"), LoRAConfig(rank=4, targets=targets))
        with pytest.raises(InputError, match="cannot be saved"):
            save_gguf(small, tmp_path / "a.gguf", byte_tokenizer())
    if targets is ENDS:
        with pytest.raises(InputError, match="adapters"):
            model.resize_embeddings(90)
    with pytest.raises(InputError, match="fused model"):
        add_lora(make().fuse(), LoRAConfig(rank=4, targets=targets))


def test_swiglu_in_cpp_steps_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "mlp", lambda *parts: pytest.fail("computed without the adapter"))
    model = randomized(add_lora(make().bfloat16(), LoRAConfig(rank=4, targets=("up_proj",))))
    mlp: Any = model.blocks[0].mlp
    x = torch.randn(1, 80, 64).bfloat16()
    parts = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    assert torch.equal(native.native_swiglu(x, *parts), swiglu(x, *parts))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_adapter_of_a_quantized_model_is_one_of_its_base(kind: Kind, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "base")
    opened = open_model(tmp_path / "base")
    model = randomized(add_lora(quantize(Decoder.from_pretrained(opened), kind), LoRAConfig(rank=4)))
    with pytest.raises(InputError, match="give base"):
        save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", base=opened)
    again = quantize(Decoder.from_pretrained(opened), kind)
    with pytest.raises(InputError, match="give base"):
        load_adapter(again, tmp_path / "a")
    load_adapter(again, tmp_path / "a", "mine", opened)
    with torch.no_grad():
        assert torch.equal(again(tokens()), model(tokens()))
    assert not any(p.requires_grad for p in again.parameters())
    load_adapter(Decoder.from_pretrained(opened), tmp_path / "a")  # the float model is the same base
