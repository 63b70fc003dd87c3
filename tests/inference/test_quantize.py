"""Weights of one byte and half a byte: the numbers, the products, the models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.formats.open import open_model
from minillama.inference.quantize import importance_matrix, int4_numbers, quantize, quantized, save_gguf, stored_kind
from minillama.layers.int4 import Int4, search, storable
from minillama.layers.quantized_linear import ROWS, Int4Linear, Int8Linear, int8_rows
from minillama.model import Decoder
from minillama.tokenizer import byte_tokenizer


def test_int8_numbers_by_hand() -> None:
    q, scale = int8_rows(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(scale[0], torch.tensor([0.01]))


def test_int4_takes_a_grid_of_q4_0_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-8, 8, (48, 3, 32), generator=generator)
    steps[..., 0] = -8  # the value that gives Q4_0 its scale
    weight = (steps * torch.rand(48, 3, 1, generator=generator).bfloat16().float()).flatten(1)
    assert torch.equal(Int4.of(weight).weight(), weight)


def test_int4_is_better_than_its_plain_grid() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    groups = weight.view(64, 2, 32)
    error = (Int4.of(weight).weight() - weight).square().sum()
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum()
    assert error < 0.85 * plain


def test_a_grid_is_found_for_what_counts() -> None:
    """One input in eight counts a hundred times: its error is smaller than in the plain search, the sum's as well."""
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    importance = torch.ones(32)
    importance[::8] = 100
    plain, weighted = (Int4.of(weight, importance=k).weight() - weight for k in (None, importance))
    assert weighted[:, ::8].square().sum() < 0.7 * plain[:, ::8].square().sum()
    assert (importance * weighted.square()).sum() < 0.8 * (importance * plain.square()).sum()
    assert weighted.square().sum() > plain.square().sum()


@pytest.mark.parametrize("size", [1e-5, 0.02, 3.0, 200.0])
def test_a_grid_is_the_same_number_in_bfloat16_and_float16(size: float) -> None:
    weight = (
        torch.randn(256, 64, generator=torch.Generator().manual_seed(2)) + torch.linspace(-9, 9, 256)[:, None]
    ) * size
    first, second = weight[:, :1], weight[:, 1:2]
    near = second.abs() < 100 * first.abs()
    for scale, offset in (search(weight), storable(first[near], second[near])):
        least = offset - 8 * scale
        assert torch.equal(scale, scale.bfloat16().float()) and torch.equal(scale, scale.half().float())
        assert torch.equal(offset, offset.bfloat16().float()) and torch.equal(least, least.half().float())


@pytest.mark.parametrize("rows", [1, 5, ROWS + 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear.of])
def test_products_are_those_of_their_weight(
    kind: Callable[[nn.Linear], Int8Linear | Int4Linear], bias: bool, rows: int
) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(96, 48, bias=bias)
    module, x = kind(linear), torch.randn(2, rows, 96)
    expected = x @ module.weight.float().T + (linear.bias if bias else 0)
    assert (module(x) - expected).norm() < 0.004 * expected.norm()  # bfloat16 in, bfloat16 out
    assert (module.weight.float() - linear.weight).norm() < (0.01 if kind is Int8Linear else 0.1) * linear.weight.norm()


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear.of])
def test_a_change_of_dtype_keeps_the_numbers(kind: Callable[[nn.Linear], Int8Linear | Int4Linear]) -> None:
    torch.manual_seed(2)
    module = kind(nn.Linear(96, 48))
    before, numbers = module.weight, {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.bfloat16()
    assert module.weight.dtype == module.bias.dtype == torch.bfloat16
    assert all(torch.equal(buffer, numbers[name]) for name, buffer in module.named_buffers())
    assert torch.equal(module.float().weight, before)


def test_shapes_that_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match="in_features 20"):
        Int8Linear(nn.Linear(20, 32))
    with pytest.raises(ValueError, match="out_features 24"):
        Int4Linear.of(nn.Linear(32, 24))


def model(tied: bool, **changes: object) -> Decoder:
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80, max_seq_len=48, tie_embeddings=tied
    )
    torch.manual_seed(3)
    return Decoder(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("int4", 0.3)])
def test_a_model_is_nearly_what_it_was(
    tied: bool,
    kind: str,
    bound: float,
    decode: Callable[..., list[list[int]]],
    uncached: Callable[..., list[list[int]]],
) -> None:
    plain, changed = model(tied), quantize(model(tied).fuse(), kind)  # type: ignore[arg-type]
    assert not [name for name, part in changed.named_modules() if isinstance(part, nn.Linear)]
    tokens = torch.randint(0, 80, (4, 9), generator=torch.Generator().manual_seed(4))  # over ROWS
    with torch.no_grad():
        expected, found = plain(tokens), changed(tokens)
        assert 0 < (found - expected).norm() < bound * expected.norm()
        torch.testing.assert_close(changed.loss(changed.hidden(tokens), tokens), plain_loss(changed, tokens))

    few = [tokens[0, :3].tolist()]
    assert decode(changed, few, 12) == uncached(changed, few, 12)


def plain_loss(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens)
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="sum")


def test_weights_of_a_q4_0_file_stay_as_they_are() -> None:
    quants = pytest.importorskip("gguf.quants", reason="the gguf package")
    from gguf import GGMLQuantizationType

    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(6)).numpy()
    stored = quants.dequantize(quants.quantize(weight, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    linear = nn.Linear(96, 32, bias=False)
    linear.weight = nn.Parameter(torch.from_numpy(stored.copy()), requires_grad=False)
    found = Int4Linear.of(linear).weight.float()
    torch.testing.assert_close(found, linear.weight.detach(), atol=1e-6, rtol=2**-7)  # the grid is in bfloat16


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_calibrated_model_comes_back_from_its_file(tied: bool, fused: bool, tmp_path: Path) -> None:
    """The same numbers, queries' and keys' rows turned twice; calibrated in the same way fused or not."""
    tokenizer = byte_tokenizer()
    config = replace(model(tied).config, vocab_size=tokenizer.vocab_size, head_dim=24)
    torch.manual_seed(3)
    decoder = Decoder(config).eval()
    whole = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    ids = torch.randint(0, 80, (6, 16), generator=torch.Generator().manual_seed(5))
    changed = quantize(decoder.fuse() if fused else decoder, "int4", calibration=ids)
    save_gguf(changed, tmp_path / "a.gguf", tokenizer)
    opened = open_model(tmp_path / "a.gguf")
    assert stored_kind(opened, torch.device("cpu")) == "int4"
    back = quantized(opened, "int4")
    mine, theirs = int4_numbers(changed), int4_numbers(back)
    assert mine.keys() == theirs.keys() == {name for name in config.tensors() if "_proj" in name}
    for name in mine:
        assert all(torch.equal(a, b) for a, b in zip(mine[name], theirs[name], strict=True)), name
        torch.testing.assert_close(opened.tensors[name], mine[name].weight(), atol=1e-6, rtol=1e-6)
        assert (mine[name].weight() - whole[name]).norm() < 0.15 * whole[name].norm()
    norms = {name for name in whole if "norm" in name}
    assert all(torch.equal(back.state_dict()[name], whole[name]) for name in norms)
    with torch.no_grad():
        a, b = changed(ids), back(ids)
    assert (a - b).norm() < 0.02 * a.norm()  # the embedding and the head are Q8_0 in the file


def test_importances_are_the_mean_squares_of_the_inputs() -> None:
    """By hand from the first layer's norm, and from what the output product of the last one is given."""
    decoder = model(True).fuse().eval()
    ids = torch.randint(0, 80, (300, 16), generator=torch.Generator().manual_seed(5))  # read in two parts
    block, last = decoder.blocks[0], decoder.blocks[1]
    seen: list[torch.Tensor] = []
    handle = last.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))  # type: ignore[union-attr]
    found = importance_matrix(decoder, ids)
    handle.remove()
    with torch.no_grad():
        first = block.input_layernorm(decoder.model.embed_tokens(ids)).square().mean((0, 1))  # type: ignore[operator]
    torch.testing.assert_close(found["model.layers.0.self_attn.qkv_proj"], first)
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"], torch.cat(seen).square().mean((0, 1)))
    assert len(found) == 8 and not any(part._forward_pre_hooks for part in decoder.modules())


def test_calibration_helps_where_inputs_are_unequal() -> None:
    """Norms that make a few channels large: calibrated on other ids, the logits' error is a seventh smaller or less."""
    ids = torch.randint(0, 80, (24, 32), generator=torch.Generator().manual_seed(5))
    errors = []
    for calibration in (None, ids[:16]):
        decoder = model(True)
        with torch.no_grad():
            for block in decoder.blocks:
                for norm in (block.input_layernorm, block.post_attention_layernorm):
                    norm.weight[::9] = 12  # type: ignore[index, union-attr]
            expected = decoder(ids[16:])
            found = quantize(decoder.fuse(), "int4", calibration=calibration)(ids[16:])
        errors.append((found - expected).norm() / expected.norm())
    assert errors[1] < 0.85 * errors[0]


def test_calibration_is_of_int4() -> None:
    with pytest.raises(InputError, match="int4 alone is calibrated"):
        quantize(model(False), "int8", calibration=torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", torch.float32), ("int8", torch.bfloat16), ("int4", torch.float32)]
)
def test_read_one_product_at_a_time(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From a folder: what quantizing the whole model gives, to the bit; products that no kernel takes among them."""
    config = replace(model(False).config, hidden_dim=80, bias="qkv")
    plain = Decoder(config)
    with torch.no_grad():
        for layer in plain.blocks:
            layer.self_attn.q_proj.bias.normal_()  # type: ignore[union-attr, operator]
    plain.save_pretrained(tmp_path / "m")
    opened = open_model(tmp_path / "m")
    assert stored_kind(opened, torch.device("cpu")) == "none"
    one = quantized(opened, kind, dtype)  # type: ignore[arg-type]
    whole = quantize(Decoder.from_pretrained(opened, dtype).fuse(), kind)  # type: ignore[arg-type]
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(one(tokens), whole(tokens))


def test_int4_elsewhere_than_on_a_cpu() -> None:
    with torch.device("meta"):
        elsewhere = Decoder(model(False).config)
    with pytest.raises(InputError, match="int4 products run on a CPU alone"):
        quantize(elsewhere, "int4")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_batch_in_bfloat16(kind: str, decode: Callable[..., list[list[int]]]) -> None:
    changed = quantize(model(True).bfloat16().fuse(), kind)  # type: ignore[arg-type]
    assert sum(map(len, decode(changed, [[3, 1, 2], [4, 5, 6]], 3))) == 6


def test_a_recurrent_model_and_widths_that_no_kernel_takes() -> None:
    config = ModelConfig(dim=48, n_layers=1, n_heads=4, hidden_dim=96, vocab_size=31, max_seq_len=16)
    torch.manual_seed(0)
    changed = quantize(Decoder(config), "int4")
    kinds = {name: type(part) for name, part in changed.model.layers[0].named_modules()}
    assert kinds["self_attn.q_proj"] is nn.Linear and kinds["mlp.down_proj"] is Int4Linear
    assert changed(torch.tensor([[1, 2, 30]])).shape == (1, 3, 31)
    recurrent = ModelConfig(
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=96,
        vocab_size=80,
        max_seq_len=16,
        mixer="wkv",
        mlp="channel-mix",
        position="none",
        norm="layer",
    )
    plain = Decoder(recurrent)
    tokens = torch.randint(0, 80, (1, 9))
    with torch.no_grad():
        expected = plain(tokens)
        assert (quantize(plain, "int8")(tokens) - expected).norm() < 0.05 * expected.norm()


def test_a_broken_weight_is_not_hidden() -> None:
    linear = nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        linear.weight[3, 5] = torch.nan
    assert Int4Linear.of(linear)(torch.ones(1, 32)).isnan().any()


def test_weights_beyond_the_grids_are_refused() -> None:
    weight = torch.randn(3, 64)
    weight[2, 40] = 60000  # float16 holds it
    assert Int4.of(weight).weight().isfinite().all()
    weight[1, 7] = -3e6
    with pytest.raises(InputError, match=r"too large for int4(?s:.*)3e\+06(?s:.*)int8"):
        Int4.of(weight)


def test_a_calibration_that_overflows_is_named() -> None:
    importance = torch.ones(64)
    importance[3] = torch.inf
    with pytest.raises(InputError, match=r"calibration text(?s:.*)1 of 64 inputs"):
        Int4.of(torch.randn(3, 64), importance=importance)


def test_what_was_quantized_is_not_saved_or_fused(tmp_path: Path) -> None:
    changed = quantize(model(False), "int8")
    for refused in (lambda: changed.save_pretrained(tmp_path / "m"), changed.fuse):
        with pytest.raises(InputError, match="quantized"):
            refused()
    assert not (tmp_path / "m").exists()
