"""What every member of the family must do: the same checks for LLaMA and its relatives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.commands.cli import main
from minillama.config import ModelConfig, RopeScaling
from minillama.errors import InputError
from minillama.layers.mask import Mask
from minillama.model import Decoder

TINY = ["llama", "palm", "bloom", "glm", "chatglm", "chatglm2", "rwkv"]
LONG = RopeScaling("longrope", original_max_seq_len=16, short_factor=(1.0, 1.5), long_factor=(2.0, 3.0))
OTHERS: dict[str, dict[str, object]] = {
    "qwen2": {"bias": "qkv"},
    "qwen3": {"qk_norm": True},
    "mistral": {"sliding_window": 5},
    "phi3": {"rope_scaling": LONG, "rotary_dim": 4},
    "smollm3": {"nope_interval": 2},
}
MEMBERS = [*TINY, *OTHERS]


def small(name: str) -> ModelConfig:
    """A member's switches on a shape of a few thousand parameters."""
    if name in OTHERS:
        return replace(small("llama"), **OTHERS[name])  # type: ignore[arg-type]
    tiny = ModelConfig.load(f"{name}-tiny")
    kv = {"llama": 2, "palm": 1, "chatglm2": 2}.get(name, 6)
    heads = {"n_heads": 1, "n_kv_heads": 1, "head_dim": 48} if name == "rwkv" else {"n_heads": 6, "n_kv_heads": kv}
    shape = {"dim": 48, "n_layers": 3, "hidden_dim": 80, "vocab_size": 97, "max_seq_len": 64, "preset": ""}
    heads.setdefault("head_dim", 8)
    return replace(tiny, **shape, **heads, rotary_dim=4 if tiny.rotary_dim else 0)


@pytest.fixture(params=MEMBERS)
def model(request: pytest.FixtureRequest) -> Decoder:
    """Weights large enough that a wrong position or head shows."""
    torch.manual_seed(0)
    decoder = Decoder(small(request.param)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15, generator=generator)
            elif name.endswith("time_decay"):
                parameter.uniform_(-3, 1, generator=generator)
            else:
                parameter.uniform_(0.3, 1.2, generator=generator)
    return decoder


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_a_token_does_not_see_the_future(model: Decoder) -> None:
    a, b = tokens(1, 12), tokens(1, 12)
    b[0, 7] = (b[0, 7] + 1) % 97
    difference = (model(a) - model(b)).abs().amax(-1)[0]
    assert (difference[:7] == 0).all() and (difference[7:] > 0).all()


def test_order_matters(model: Decoder) -> None:
    a = tokens(1, 12)
    b = a[:, [1, 0, *range(2, 12)]]
    assert (model(a)[:, -1] - model(b)[:, -1]).abs().max() > 1e-5


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 6], [3, 9]])
def test_prefill_and_steps_equal_the_full_forward(model: Decoder, chunks: list[int]) -> None:
    ids, state = tokens(2, 12), model.state(2)
    parts = [model(part, state=state) for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-4, rtol=1e-4)
    assert state.lengths == [12, 12]


def test_a_batch_equals_single_rows(model: Decoder) -> None:
    lengths = [3, 8, 5]
    ids, state = tokens(3, 8), model.state(3)
    first = model(ids, mask=Mask(lengths=torch.tensor(lengths)), state=state)
    more = tokens(3, 4, seed=2)
    second = torch.cat([model(more[:, :1], state=state), model(more[:, 1:], state=state)], 1)
    for row, length in enumerate(lengths):
        whole = model(torch.cat([ids[row : row + 1, :length], more[row : row + 1]], 1))[0]
        torch.testing.assert_close(first[row, :length], whole[:length], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(second[row], whole[length:], atol=1e-4, rtol=1e-4)


def test_select_and_restore(model: Decoder) -> None:
    ids, state = tokens(3, 6), model.state(3)
    model(ids, state=state)
    state.select([2, 0, 2])
    point = state.snapshot()
    assert model(tokens(3, 4, seed=9), state=state).shape[1] == 4  # rejected
    state.restore(point)
    more = tokens(3, 3, seed=2)
    again = model(more, state=state)
    whole = model(torch.cat([ids[[2, 0, 2]], more], 1))[:, 6:]
    torch.testing.assert_close(again, whole, atol=1e-4, rtol=1e-4)
    assert state.lengths == [9, 9, 9]


def test_fused_products_and_checkpointing_change_nothing(model: Decoder) -> None:
    ids = tokens(2, 9)
    plain = model(ids)
    model.train().checkpointing = True
    torch.testing.assert_close(model(ids), plain)
    model.checkpointing = False
    torch.testing.assert_close(model.eval().fuse()(ids), plain, atol=1e-5, rtol=1e-5)


def test_every_parameter_has_a_gradient(model: Decoder) -> None:
    model.train()
    model(tokens(2, 9)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("member", MEMBERS)
def test_a_folder_opens_again_to_the_bit(member: str, tmp_path: Path) -> None:
    model = Decoder(small(member))
    model.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert replace(again.config, preset="") == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_compiled_blocks_change_nothing(model: Decoder) -> None:
    ids = tokens(2, 9)
    plain = model(ids)
    model.compile_blocks()
    torch.testing.assert_close(model(ids), plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("member", "switch", "value", "what"),
    [
        ("rwkv", "position", "rope", "mixer and position exclude each other"),
        ("rwkv", "mlp", "swiglu", "mixer and mlp exclude each other"),
        ("llama", "mlp", "channel-mix", "mlp and mixer exclude each other"),
        ("palm", "residual", "norm", "residual and parallel_block exclude each other"),
        ("llama", "objective", "glm", "objective and position exclude each other"),
        ("chatglm2", "rotary_dim", 3, "this width is odd"),
        ("bloom", "rotary_dim", 4, "position and rotary_dim exclude each other"),
        ("chatglm2", "rotary_dim", 128, "cannot rotate more than a head"),
        ("chatglm", "head_dim", 6, "rotate two halves of pairs"),
        ("bloom", "nope_interval", 2, "position and nope_interval exclude each other"),
        ("qwen3", "nope_interval", 2, "qk_norm and nope_interval exclude each other"),
        ("phi3", "rotary_dim", 6, "longrope has a factor per rotary pair"),
    ],
)
def test_switches_that_exclude_each_other(member: str, switch: str, value: object, what: str) -> None:
    with pytest.raises(InputError, match=what):
        replace(small(member), **{switch: value})


@pytest.mark.slow
@pytest.mark.parametrize("member", TINY)
def test_two_hundred_steps_lower_the_loss(member: str, tmp_path: Path) -> None:
    """`python train.py --model.preset NAME-tiny` on the default text, in small batches, and generation after it."""
    script = ["--model.preset", f"{member}-tiny", "--train.steps", "200", "--train.batch_size", "2"]
    script += ["--train.context", "64", "--validate.tokens", "4000", "--validate.every", "200"]
    script += ["--train.compile", "false", "--optim.muon_lr", "0", "--optim.lr", "3e-3"]
    cache = ["--data.cache", str(tmp_path.parent / "cache"), "--checkpoint.every", "200"]
    assert main(["train", *script, *cache, "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 1
    assert main(["generate", "--model", str(tmp_path / "run/model"), "--prompt", "This", "--max-new-tokens", "8"]) == 0
