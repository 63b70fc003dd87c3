"""Linear layers in split bfloat16 against float64 and float32: values, models of every kind, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.evaluate.likelihood import score
from minillama.model import Decoder
from minillama.native import build
from minillama.native import linear as native
from minillama.native.linear import SplitLinear, use_split_linears

KERNELS, UNITS, EMULATED = native, ("amx_bf16",), ("tiles",)
pytestmark = [
    pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux"),
    pytest.mark.usefixtures("kernels"),
]
CONFIG = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=96, max_seq_len=64)


# one row, parts of a tile, a block of 128 and more; widths of one tile, of a strip of eight and more, of a chunk
@pytest.mark.parametrize(
    ("tokens", "width", "outputs"), [((), 32, 32), ((3, 11), 64, 96), ((128,), 288, 160), ((2, 65), 544, 32)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_values(tokens: tuple[int, ...], width: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(width, outputs, bias=bias), 3 * torch.randn(*tokens, width)
    with torch.no_grad():
        exact, found = plain.double()(x.double()), SplitLinear(plain.float())(x)
    assert found.shape == exact.shape and found.dtype == torch.float32
    assert (found - exact).norm() < 1e-5 * exact.norm()  # 2^-17; of bfloat16 3e-3


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"position": "alibi", "norm": "layer"}])
@pytest.mark.parametrize("fused", [False, True])
def test_models_score_the_same(changes: dict[str, object], fused: bool) -> None:
    torch.manual_seed(1)
    model = Decoder(ModelConfig(**(CONFIG.__dict__ | changes))).eval()
    items = [[([1, 2, 3, 4 + i], [5 + j, 6, 7]) for j in range(3)] for i in range(5)]
    expected = dict(score(model, items))
    use_split_linears(model.fuse() if fused else model)
    left = [layer for layer in model.modules() if type(layer) is nn.Linear]
    assert not left
    for item, found in score(model, items):
        for one, other in zip(found, expected[item], strict=True):
            assert one.nats == pytest.approx(other.nats, rel=1e-5)


@pytest.mark.parametrize("name", ["palm", "bloom", "glm", "chatglm", "chatglm2", "rwkv"])
def test_relatives_have_the_same_logits(name: str) -> None:
    torch.manual_seed(2)
    model = Decoder(ModelConfig.load(f"{name}-tiny")).eval()
    tokens = torch.randint(0, model.config.vocab_size, (2, 40))
    with torch.inference_mode():
        expected = model(tokens)
        use_split_linears(model)
        assert any(isinstance(layer, SplitLinear) for layer in model.modules())
        assert (model(tokens) - expected).norm() < 3e-5 * expected.norm()


def test_what_is_refused_or_left_alone() -> None:
    model = Decoder(CONFIG).bfloat16()
    use_split_linears(model)
    assert type(model.lm_head) is nn.Linear  # another precision was asked for
    odd = Decoder(ModelConfig(dim=48, n_layers=1, n_heads=4, n_kv_heads=4, hidden_dim=96, vocab_size=96))
    use_split_linears(odd)
    assert type(odd.lm_head) is nn.Linear  # 48 is no multiple of 32
    with pytest.raises(InputError, match="no gradient"):
        SplitLinear(nn.Linear(32, 32))(torch.ones(1, 32, requires_grad=True))
