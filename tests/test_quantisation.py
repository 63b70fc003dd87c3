"""Weights of one byte and half a byte: the numbers, the products, the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from minillama.config import ModelConfig
from minillama.decoding import decode
from minillama.errors import InputError
from minillama.layers.quantised import ROWS, Int4Linear, Int8Linear, int4_groups, int8_rows
from minillama.model import Decoder
from minillama.quantisation import quantise


def test_int8_numbers_by_hand() -> None:
    q, scale = int8_rows(torch.tensor([[1.27, -0.5, 0.004], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[127, -50, 0], [0, 0, 0]]
    torch.testing.assert_close(scale[0], torch.tensor([0.01]))


def test_int4_takes_a_grid_of_q4_0_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-8, 8, (48, 3, 32), generator=generator)
    steps[..., 0] = -8  # the value that gives Q4_0 its scale
    weight = (steps * torch.rand(48, 3, 1, generator=generator)).flatten(1)
    q, scale, offset = int4_groups(weight)
    exact = ((q.view(48, 3, 32) - 8) * scale[..., None] + offset[..., None]).flatten(1)
    torch.testing.assert_close(exact, weight, atol=1e-6, rtol=1e-5)


def test_int4_is_better_than_its_plain_grid() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    groups = weight.view(64, 2, 32)
    q, s, z = int4_groups(weight)
    error = ((q.view(64, 2, 32) - 8) * s[..., None] + z[..., None] - groups).square().sum()
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum()
    assert error < 0.85 * plain


@pytest.mark.parametrize("rows", [1, 5, ROWS + 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
def test_products_are_those_of_their_weight(kind: type[nn.Module], bias: bool, rows: int) -> None:
    torch.manual_seed(2)
    linear = nn.Linear(96, 48, bias=bias)
    module, x = kind(linear), torch.randn(2, rows, 96)
    expected = x @ module.weight.float().T + (linear.bias if bias else 0)
    assert (module(x) - expected).norm() < 0.004 * expected.norm()  # bfloat16 in, bfloat16 out
    assert (module.weight.float() - linear.weight).norm() < (0.01 if kind is Int8Linear else 0.1) * linear.weight.norm()


def test_shapes_that_the_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match="20 inputs"):
        Int8Linear(nn.Linear(20, 32))
    with pytest.raises(ValueError, match="24 outputs"):
        Int4Linear(nn.Linear(32, 24))


def model(tied: bool, **changes: object) -> Decoder:
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=80, max_seq_len=48, tie_embeddings=tied
    )
    torch.manual_seed(3)
    return Decoder(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("int4", 0.3)])
def test_a_model_is_nearly_what_it_was(tied: bool, kind: str, bound: float) -> None:
    plain, changed = model(tied), quantise(model(tied).fuse(), kind)  # type: ignore[arg-type]
    assert not [name for name, part in changed.named_modules() if isinstance(part, nn.Linear)]
    tokens = torch.randint(0, 80, (4, 9), generator=torch.Generator().manual_seed(4))  # over ROWS
    with torch.no_grad():
        expected, found = plain(tokens), changed(tokens)
        assert 0 < (found - expected).norm() < bound * expected.norm()
        torch.testing.assert_close(changed.loss(changed.hidden(tokens), tokens), plain_loss(changed, tokens))

    few = [tokens[0, :3].tolist()]
    one_by_one = [token for step in decode(changed, few, 12) for _, token in step]
    again = [token for step in decode(changed, few, 12, use_state=False) for _, token in step]
    assert one_by_one == again


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
    found = Int4Linear(linear).weight.float()
    torch.testing.assert_close(found, linear.weight.detach(), atol=1e-6, rtol=2**-7)  # the grid is in bfloat16


def test_int4_elsewhere_than_on_a_cpu() -> None:
    with torch.device("meta"):
        elsewhere = Decoder(model(False).config)
    with pytest.raises(InputError, match="int4 products run on a CPU alone"):
        quantise(elsewhere, "int4")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_batch_in_bfloat16(kind: str) -> None:
    changed = quantise(model(True).bfloat16().fuse(), kind)  # type: ignore[arg-type]
    out = [token for step in decode(changed, [[3, 1, 2], [4, 5, 6]], 3) for _, token in step]
    assert len(out) == 6


def test_a_recurrent_model_and_widths_that_no_kernel_takes() -> None:
    config = ModelConfig(dim=48, n_layers=1, n_heads=4, hidden_dim=96, vocab_size=31, max_seq_len=16)
    torch.manual_seed(0)
    changed = quantise(Decoder(config), "int4")
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
        assert (quantise(plain, "int8")(tokens) - expected).norm() < 0.05 * expected.norm()


def test_a_broken_weight_is_not_hidden() -> None:
    linear = nn.Linear(32, 16, bias=False)
    with torch.no_grad():
        linear.weight[3, 5] = torch.nan
    assert Int4Linear(linear)(torch.ones(1, 32)).isnan().any()


def test_what_was_quantised_is_not_saved_or_fused(tmp_path: Path) -> None:
    changed = quantise(model(False), "int8")
    for refused in (lambda: changed.save_pretrained(tmp_path / "m"), changed.fuse):
        with pytest.raises(InputError, match="quantised"):
            refused()
    assert not (tmp_path / "m").exists()
