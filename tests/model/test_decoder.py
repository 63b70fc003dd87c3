"""The decoder: counts, initialization, equalities between ways of computing the same thing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.formats import gguf, meta
from minillama.inference.quantize import quantize
from minillama.layers.mask import Mask
from minillama.model import Decoder

CONFIG = ModelConfig(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=97, max_seq_len=64)


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(CONFIG).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return decoder


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_forward_on_the_meta_device() -> None:
    with torch.device("meta"):
        logits = Decoder(CONFIG)(torch.zeros(2, 5, dtype=torch.long))
    assert logits.shape == (2, 5, 97) and logits.is_meta


def test_fresh_loss_is_near_ln_v() -> None:
    torch.manual_seed(0)
    config = replace(CONFIG, vocab_size=512, dim=96)
    ids = torch.randint(0, 512, (4, 64))
    loss = F.cross_entropy(Decoder(config)(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


def test_residual_scaling_is_on_o_proj_and_down_proj_alone() -> None:
    config = replace(CONFIG, dim=256, n_heads=4, n_kv_heads=2, head_dim=64, hidden_dim=512, n_layers=8)
    scaled = 0.02 / math.sqrt(16)
    for name, parameter in Decoder(config).named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            continue
        expected = scaled if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


def test_initialization_follows_its_generator() -> None:
    a, b = Decoder(CONFIG), Decoder(CONFIG)
    for model in (a, b):
        model.init_weights(torch.Generator().manual_seed(4))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_forward_is_hidden_then_head(model: Decoder) -> None:
    ids = tokens(2, 9)
    torch.testing.assert_close(model(ids), model.hidden(ids) @ model.output_weight.T)
    tied = Decoder(replace(CONFIG, tie_embeddings=True))
    assert tied.output_weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in tied.state_dict()


def test_state_that_is_full_says_so(model: Decoder) -> None:
    state = model.state(1, max_len=4)
    with pytest.raises(ValueError, match="4 slots"):
        model(tokens(1, 5), state=state)


def test_packed_documents_equal_documents_alone(model: Decoder) -> None:
    ids = tokens(1, 11)
    documents = torch.tensor([[0] * 4 + [1] * 7])
    positions = torch.tensor([[*range(4), *range(7)]])
    packed = model(ids, positions=positions, mask=Mask(documents=documents))
    torch.testing.assert_close(packed[:, :4], model(ids[:, :4]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed[:, 4:], model(ids[:, 4:]), atol=1e-5, rtol=1e-5)


def test_positions_are_relative(model: Decoder) -> None:
    ids = tokens(1, 9)
    torch.testing.assert_close(model(ids, positions=torch.arange(20, 29)), model(ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(ids, positions=torch.arange(0, 18, 2)), model(ids), atol=1e-2)


def test_checkpointing_changes_no_gradient(model: Decoder) -> None:
    ids = tokens(2, 10)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        model.checkpointing = checkpointing
        model.zero_grad()
        model(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_only_while_training() -> None:
    model = Decoder(CONFIG, dropout=0.5)
    ids = tokens(1, 6)
    assert not torch.equal(model.train()(ids), model(ids))
    assert torch.equal(model.eval()(ids), model(ids))


def test_fuse_computes_the_same_and_is_not_saved(model: Decoder, tmp_path) -> None:
    ids = tokens(2, 9)
    before = model(ids)
    model.fuse()
    assert not hasattr(model.model.layers[0].self_attn, "q_proj")
    torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="fused"):
        model.save_pretrained(tmp_path)


def test_save_and_load_are_an_identity(model: Decoder, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    back = Decoder.from_pretrained(tmp_path)
    assert back.config == CONFIG
    assert torch.equal(back(tokens(2, 9)), model(tokens(2, 9)))
    half = Decoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half(tokens(1, 3)).dtype == torch.bfloat16


def test_bfloat16_autocast_is_close(model: Decoder) -> None:
    ids = tokens(2, 20)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids)
    exact = model(ids)
    assert (half.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(model: Decoder) -> None:
    ids = tokens(2, 16)
    expected = model.train()(ids)
    names = list(model.state_dict())
    model.compile_blocks()
    logits = model(ids)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    state = model.state(2)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):  # decoding leaves compiled code alone
        read = [model(part, state=state) for part in ids.split([9, 4, 3], dim=1)]
    torch.testing.assert_close(torch.cat(read, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.cuda
def test_cuda_equals_cpu(model: Decoder) -> None:
    ids = tokens(2, 16)
    torch.testing.assert_close(model.cuda()(ids.cuda()).cpu(), model.cpu()(ids), atol=1e-3, rtol=1e-3)


@pytest.mark.mps
def test_mps_equals_cpu(model: Decoder) -> None:
    ids = tokens(2, 16)
    torch.testing.assert_close(model.to("mps")(ids.to("mps")).cpu(), model.cpu()(ids), atol=1e-3, rtol=1e-3)


class Adapted(nn.Linear):
    """A linear layer that adds something of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x.sum()


class Wrapped(nn.Module):
    """A linear layer within another."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 1


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("verb", ["fused", "quantized"])
def test_layers_that_are_more_than_linear_are_refused(wrap: bool, verb: str) -> None:
    model = Decoder(ModelConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=50, max_seq_len=16))
    attention = model.blocks[1].self_attn
    attention.q_proj = Wrapped(attention.q_proj) if wrap else Adapted(64, 64, bias=False)
    before = model.state_dict().keys()
    with pytest.raises(InputError, match=f"cannot be {verb}") as error:
        model.fuse() if verb == "fused" else quantize(model, "int8")
    assert "model.layers.1.self_attn.q_proj" in str(error.value)
    assert model.state_dict().keys() == before  # nothing was changed


def test_tensors_that_would_not_be_written_are_refused(tmp_path: Path) -> None:
    model = Decoder(ModelConfig(dim=64, n_layers=1, n_heads=4, hidden_dim=96, vocab_size=50, max_seq_len=16))
    model.score = nn.Linear(64, 1, bias=False)
    with pytest.raises(InputError, match="would not be written") as error:
        model.save_pretrained(tmp_path / "a")
    assert "score.weight" in str(error.value) and not (tmp_path / "a").exists()
    for write in (gguf.write, meta.write):
        with pytest.raises(InputError, match="would not be written"):
            keys = ({}, "f32", "x") if write is gguf.write else (torch.float32,)
            write(tmp_path / "b", model.config, model.state_dict(), *keys)
    assert not (tmp_path / "b").exists()


def test_hooks_fire_while_decoding_as_in_a_forward_pass(model: Decoder) -> None:
    """On every module of a pass, once per call; what a hook returns is what the next layer reads."""
    calls: list[str] = []
    handles = [
        part.register_forward_hook(lambda _, inputs, output, name=name: calls.append(name))
        for name, part in model.named_modules()
        if name
    ]
    ids = tokens(1, 4)
    model(ids)
    expected, state = sorted(calls), model.state(1)
    for token in ids.split(1, dim=1):
        calls.clear()
        model(token, state=state)
        assert sorted(calls) == expected
    assert {"model.norm", "model.layers.1", "model.layers.0.mlp.gate_proj"} <= set(expected)
    for handle in handles:
        handle.remove()
    model.blocks[-1].register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    assert not model.hidden(ids, state=model.state(1)).any()


def test_hooks_fire_beside_compiled_blocks(model: Decoder) -> None:
    """A state is read by the layers as they are, whatever was compiled."""
    model.compile_blocks()
    calls: list[int] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: calls.append(1))
    with torch.inference_mode():
        model(tokens(1, 3), state=model.state(1))
    assert calls == [1]


def test_positions_are_named(model: Decoder) -> None:
    with pytest.raises(TypeError, match="positional"):
        model(tokens(1, 4), tokens(1, 4))  # targets, as another trainer takes them


def test_a_name_is_no_configuration() -> None:
    with pytest.raises(InputError, match=r"ModelConfig.load\('llama-tiny'\)"):
        Decoder("llama-tiny")  # type: ignore[arg-type]


class Gated(nn.Module):
    """SwiGLU's parameters, another function."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x).relu() * self.up_proj(x))


def test_a_changed_model_is_not_saved_as_another(tmp_path: Path) -> None:
    """Layers with the same names of parameters, with fewer, and of another shape; no folder is left."""
    config = ModelConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=96, vocab_size=50, max_seq_len=16)
    changes = {
        "model.layers.1.mlp": lambda model: setattr(model.blocks[1], "mlp", Gated(model.blocks[1].mlp)),
        "model.layers.0.mlp.gate_proj": lambda model: setattr(model.blocks[0], "mlp", nn.Identity()),
        "model.layers.0.self_attn.o_proj": lambda model: setattr(
            model.blocks[0].self_attn, "o_proj", nn.Linear(64, 32, bias=False)
        ),
        "model.norm": lambda model: setattr(model.model, "norm", nn.LayerNorm(64, bias=False)),
    }
    for name, change in changes.items():
        model = Decoder(config)
        change(model)
        with pytest.raises(InputError) as error:
            model.save_pretrained(tmp_path / "a")
        assert name in str(error.value) and not (tmp_path / "a").exists()


def test_a_kernel_of_its_own_is_used_by_a_fused_layer(model: Decoder) -> None:
    """Set before fuse() or after it."""
    ids = tokens(1, 5)

    def kernel(x: torch.Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> torch.Tensor:
        return down(gate(x).relu() * up(x))

    for block in model.blocks:
        block.mlp.kernel = kernel
    expected = model(ids)
    torch.testing.assert_close(model.fuse()(ids), expected, atol=1e-5, rtol=1e-5)
    plain = Decoder(model.config).eval()
    assert (plain.fuse()(ids) - expected).abs().max() > 1e-3


def test_a_head_that_was_changed_is_used_by_the_loss(model: Decoder) -> None:
    ids = tokens(2, 9)

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model.hidden(ids[:, :-1])
        logits = model.head(hidden).flatten(0, 1)
        return model.loss(hidden, ids[:, 1:]), F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")

    torch.testing.assert_close(*losses())
    plain = losses()[0]
    hook = model.lm_head.register_forward_hook(lambda _, __, logits: 3 * torch.tanh(logits / 3))
    torch.testing.assert_close(*losses())
    hook.remove()
    for head in (nn.Linear(48, 97), nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 97))):
        model.lm_head = head
        torch.testing.assert_close(*losses())
        assert abs(losses()[0] - plain) > 0.1
    with pytest.raises(TypeError):
        model.blocks[0] = nn.Identity()  # it would change nothing
