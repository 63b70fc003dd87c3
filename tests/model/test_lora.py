"""Low-rank adapters: formulas, training over float and quantized bases, several at once, refusals."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.config.lora import LoRAConfig
from minillama.errors import InputError
from minillama.formats.peft import fingerprint
from minillama.inference.engine import Engine
from minillama.inference.quantize import quantize
from minillama.inference.request import Request
from minillama.inference.sampling import Sampling
from minillama.layers.lora import Adapter, LoRALayer, LoRALinear
from minillama.layers.quantized_linear import Int4Linear, Int8Linear
from minillama.model import Decoder
from minillama.model.linears import linears
from minillama.model.lora import (
    activate,
    active,
    adapter_names,
    add_lora,
    base_tensors,
    load_adapter,
    lora_layers,
    lora_parameters,
    save_adapter,
)
from minillama.training.precision import WorkingCopy, choose_precision

Kind = Literal["none", "int8", "int4"]
CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80, max_seq_len=48)
GREEDY = Sampling(temperature=0)
ENDS = ("embed_tokens", "lm_head")


def make(kind: Kind = "none", **changes: Any) -> Decoder:
    torch.manual_seed(3)
    model = Decoder(replace(CONFIG, **changes))
    with torch.no_grad():
        for parameter in model.parameters():  # norms that are no ones, biases that are no zeros
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return quantize(model, kind)


def tokens(rows: int = 4, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 80, (rows, length), generator=torch.Generator().manual_seed(4))


def randomized(model: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in adapter_names(model):
            for parameter in lora_parameters(model, name).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def nats(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return model.loss(model.hidden(ids[:, :-1]), ids[:, 1:]) / ids[:, 1:].numel()


def test_dora_by_hand() -> None:
    adapter = Adapter(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [2.0]]), 0.5, torch.tensor([5.0, 2.0]))
    merged = adapter.merged(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    torch.testing.assert_close(merged, torch.tensor([[3.2925230, 3.7628835], [0.8944272, 1.7888544]]))


def test_scales() -> None:
    a, b = torch.zeros(8, 4), torch.zeros(6, 8)
    assert Adapter(a, b, 32).scale == LoRAConfig(8, 32).scale == 4
    assert Adapter(a, b, 32, use_rslora=True).scale == pytest.approx(11.3137085)


def test_parameter_counts_of_chinese_llama() -> None:
    """Ymcui/Chinese-LLaMA-Alpaca: its README's 6.06% and 6.22% are these numbers."""
    model = replace(ModelConfig.load("llama-7b"), vocab_size=49953)
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert LoRAConfig(8).num_params(model) == 19_988_480
    assert LoRAConfig(8, targets=attention).num_params(model) == 8_388_608
    assert LoRAConfig(8, targets=attention, modules_to_save=ENDS).num_params(model) == 417_603_584
    assert LoRAConfig(8, modules_to_save=ENDS).num_params(model) == 429_203_456
    small = LoRAConfig(3, targets=("all-linear", *ENDS), use_dora=True)
    made = lora_parameters(add_lora(Decoder(CONFIG), small))
    assert sum(p.numel() for p in made.values()) == small.num_params(CONFIG)


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing(kind: Kind, dora: bool) -> None:
    model = make(kind)
    with torch.no_grad():
        expected = model(tokens())
        targets = ("all-linear", *ENDS) if kind == "none" else ("all-linear",)
        assert torch.equal(add_lora(model, LoRAConfig(use_dora=dora, targets=targets))(tokens()), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_training_leaves_the_base_as_it_is(kind: Kind, checkpointing: bool) -> None:
    model = make(kind)
    before = fingerprint(base_tensors(model))
    add_lora(model, LoRAConfig(rank=4, alpha=8, dropout=0.05), generator=torch.Generator().manual_seed(1))
    model.train().checkpointing = checkpointing
    torch.manual_seed(0)
    trained = lora_parameters(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for step in range(12):
        loss = nats(model, tokens())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 0:
            assert all(p.any() for name, p in trained.items() if name.endswith("lora_B"))
    assert losses[-1] < losses[0] - 0.3
    assert fingerprint(base_tensors(model)) == before
    assert len(trained) == 2 * 7 * CONFIG.n_layers


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_gradients_pass_a_quantized_base(kind: Kind, dora: bool, rows: int) -> None:
    """They are those over a float model of the dequantized weights, also where the packed kernels would be used."""
    small, twin = make(kind), make()
    assert {type(part) for part in linears(small).values()} == {Int8Linear if kind == "int8" else Int4Linear}
    with torch.no_grad():
        for name, part in linears(small).items():
            twin.get_submodule(name).weight.copy_(part.weight)  # type: ignore[union-attr, operator]
        twin.lm_head.weight.copy_(small.lm_head.weight)  # type: ignore[union-attr]
    config = LoRAConfig(rank=4, alpha=8, use_dora=dora)
    gradients = []
    for model in (small, twin):
        randomized(add_lora(model, config, generator=torch.Generator().manual_seed(1)))
        nats(model, tokens(rows, 9)).backward()
        gradients.append({name: p.grad for name, p in lora_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.any()
        expected = gradients[1][name]
        assert expected is not None
        # of few tokens the first products, which pass no gradient, round their inputs to bfloat16
        assert (gradient - expected).norm() < (0.03 if rows == 1 else 1e-4) * expected.norm(), name


def test_a_quantized_weight_is_not_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    linear = Int8Linear(nn.Linear(64, 96, bias=False))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # type: ignore[func-returns-value]
        linear(torch.randn(40, 64, requires_grad=True)).sum().backward()
    assert max(kept, default=0) < 64 * 96


def test_float32_adapters_over_a_bfloat16_base() -> None:
    model = make().bfloat16()
    randomized(add_lora(model, LoRAConfig(rank=4, use_dora=True, targets=("all-linear", *ENDS))))
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    assert choose_precision(model, torch.bfloat16).model is model
    loss = nats(model, tokens())
    loss.backward()
    assert model(tokens()).dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(model).values())
    exact = make().bfloat16().float()
    load = randomized(add_lora(exact, LoRAConfig(rank=4, use_dora=True, targets=("all-linear", *ENDS))))
    assert abs(nats(load, tokens()).item() - loss.item()) < 0.02


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
def test_a_working_copy_hands_gradients_to_the_adapters(kind: Kind) -> None:
    model = make(kind)
    before = fingerprint(base_tensors(model))
    copy = WorkingCopy(add_lora(model, LoRAConfig(rank=4)), torch.bfloat16)
    nats(copy.model, tokens()).backward()  # type: ignore[arg-type]
    copy.refresh()
    assert fingerprint(base_tensors(model)) == before
    assert all(p.grad is not None and p.grad.any() for n, p in lora_parameters(model).items() if n.endswith("lora_B"))


def test_one_product_is_the_separate_ones() -> None:
    """To the bit in the forward pass: a reference that needs no gradients has the log-probabilities of the policy."""
    model = randomized(add_lora(make(), LoRAConfig(rank=4, alpha=8)))
    with torch.no_grad():
        expected = model(tokens())
    assert torch.equal(model(tokens()), expected)
    gradients = []
    for forward in (LoRALinear.forward, LoRALayer.forward):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoRALinear, "forward", forward)
            nats(model, tokens()).backward()
        gradients.append([parameter.grad for parameter in lora_parameters(model).values()])
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_head_has_its_adapter_in_the_loss_too(use_dora: bool) -> None:
    model = randomized(add_lora(make(logit_scale=0.5), LoRAConfig(rank=3, targets=ENDS, use_dora=use_dora)))
    gradients = []
    for fused in (True, False):
        hidden = model.hidden(tokens())
        loss = (
            model.loss(hidden, tokens())
            if fused
            else F.cross_entropy(model.head(hidden).flatten(0, 1), tokens().flatten(), reduction="sum")
        )
        loss.backward()
        gradients.append([(loss.detach(), *(p.grad.clone() for p in lora_parameters(model).values()))])  # type: ignore[union-attr]
        model.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_several_adapters_by_name() -> None:
    model = make()
    plain = model(tokens())
    add_lora(model, LoRAConfig(rank=2, targets=("q_proj", "down_proj")), "first")
    add_lora(model, LoRAConfig(rank=3, targets=("v_proj", "down_proj"), use_dora=True), "second")
    randomized(model)
    assert adapter_names(model) == ["first", "second"] and len(lora_layers(model)) == 6
    assert not set(lora_parameters(model, "first")) & set(lora_parameters(model, "second"))
    second = model(tokens())
    activate(model, "first")
    first = model(tokens())
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    with active(model, None):
        assert torch.equal(model(tokens()), plain)
        with active(model, "second"):
            assert torch.equal(model(tokens()), second)
        assert torch.equal(model(tokens()), plain)
    assert torch.equal(model(tokens()), first)
    nats(model, tokens()).backward()
    assert all(p.grad is not None for p in lora_parameters(model, "first").values())
    assert all(p.grad is None and p.requires_grad for p in lora_parameters(model, "second").values())
    assert torch.equal(copy.deepcopy(model)(tokens()), first)
    with pytest.raises(InputError, match="no adapter of this name"):
        activate(model, "third")


def test_a_faster_step_does_not_outlive_the_model_that_it_was_made_of() -> None:
    model = make()
    model.step = lambda tokens, state, mask: None
    add_lora(model, LoRAConfig(rank=2))
    assert model.step is None
    model.step = step = lambda tokens, state, mask: None
    with active(model, None):
        assert model.step is None
    assert model.step is step


@pytest.mark.parametrize("kind", ["none", "int8"])
def test_decoding_with_an_adapter(kind: Kind) -> None:
    model = make(kind).eval()
    before = fingerprint(base_tensors(model))
    randomized(add_lora(model, LoRAConfig(rank=4, use_dora=True)))
    rows = [[3, 1, 2], [4, 5, 6, 7, 8]]
    found = [request.tokens for request in Engine(model).run([Request(row, 12, GREEDY) for row in rows])]
    for row, made in zip(rows, found, strict=True):
        with torch.no_grad():
            whole = model(torch.tensor([row + made]))[0, len(row) - 1 : -1]
        assert len(made) == 12 and made == whole.argmax(-1).tolist()
    assert fingerprint(base_tensors(model)) == before


def test_dropout_is_that_of_the_adapters() -> None:
    model = randomized(add_lora(make(), LoRAConfig(rank=4, dropout=0.5)))
    model.train()
    torch.manual_seed(1)
    first, second = model(tokens()), model(tokens())
    torch.manual_seed(1)
    assert torch.equal(model(tokens()), first) and not torch.equal(first, second)
    with active(model, None):
        assert torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_a_thousand_rollouts_leave_the_base_as_it_is() -> None:
    """An adapter that is merged and taken out again by += and -= would drift."""
    model = randomized(add_lora(make().bfloat16(), LoRAConfig(rank=4))).eval()
    before = fingerprint(base_tensors(model))
    engine = Engine(model, max_rows=100)
    for number in range(10):
        with active(model, None if number % 2 else "default"):
            assert len(engine.run([Request([3, 1, number], 2, GREEDY) for _ in range(100)])) == 100
    assert fingerprint(base_tensors(model)) == before


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoRAConfig(targets=("q_projj",)), "q_proj"),
        (LoRAConfig(targets=()), "targets"),
        (LoRAConfig(targets=("lm_head",), dropout=0.1), "dropout"),
        (LoRAConfig(targets=("lm_head",), modules_to_save=("lm_head",)), "lm_head"),
        (LoRAConfig(modules_to_save=("norm",)), "norm"),
        (LoRAConfig(rank=0), "lora.rank"),
        (LoRAConfig(alpha=math.nan), "lora.alpha"),
    ],
)
def test_settings_that_make_no_adapter(config: LoRAConfig, words: str) -> None:
    model = make()
    with pytest.raises(InputError) as error:
        add_lora(model, config)
    assert words in str(error.value) and not lora_layers(model)


def test_names_of_adapters() -> None:
    model = add_lora(make(), LoRAConfig())
    for name in ("default", "a.b", ""):
        with pytest.raises(InputError, match="adapter"):
            add_lora(model, LoRAConfig(), name)


RELATIVES: dict[str, dict[str, Any]] = {
    "rwkv": {"mixer": "wkv", "mlp": "channel-mix", "position": "none", "norm": "layer", "n_kv_heads": 4},
    "gelu": {"mlp": "gelu", "bias": "all", "norm": "layer", "position": "alibi"},
    "parallel": {"parallel_block": True, "n_kv_heads": 1},
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives(name: str) -> None:
    model = make(**RELATIVES[name])
    randomized(add_lora(model, LoRAConfig(rank=4)))
    nats(model, tokens()).backward()
    assert len(lora_layers(model)) == len(linears(model))
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_compiled_blocks(kind: Kind, tmp_path: Path) -> None:
    plain = make(kind).train()
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks()
    for model in (plain, compiled):
        randomized(add_lora(model, LoRAConfig(rank=4), generator=torch.Generator().manual_seed(1)))
        nats(model, tokens()).backward()
    for name, parameter in lora_parameters(plain).items():
        other = lora_parameters(compiled)[name]
        assert parameter.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad, parameter.grad, atol=2e-5, rtol=1e-3)
    if kind == "none":
        with active(plain, None), active(compiled, None):  # not what was compiled
            torch.testing.assert_close(nats(compiled, tokens()), nats(plain, tokens()), atol=1e-5, rtol=1e-5)
        save_adapter(compiled, tmp_path)
        with pytest.raises(InputError, match=r"no model that was opened(?s:.*)open_model"):
            load_adapter(make(), tmp_path, base=str(tmp_path))  # type: ignore[arg-type]
        again = load_adapter(make(), tmp_path)
        torch.testing.assert_close(nats(again, tokens()), nats(plain, tokens()), atol=1e-5, rtol=1e-5)
