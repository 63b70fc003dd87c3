"""The parameter table against the decoder that is built, transformers' own plan, and a split computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillama.config import ModelConfig, parameters
from minillama.config.loader import config_names
from minillama.config.parameters import FUSED, SPLIT, Parameter
from minillama.formats import hf
from minillama.formats.open import open_model
from minillama.layers.alibi import slopes
from minillama.layers.rope import rotate
from minillama.layers.wkv import Sums, wkv_scan
from minillama.model import Decoder

MEMBERS = ["llama", "palm", "bloom", "glm", "chatglm", "chatglm2", "rwkv"]
MODULES = {"embedding": nn.Embedding, "position": nn.Embedding, "recurrence": nn.Module, "token shift": nn.Module}


def odd(member: str) -> ModelConfig:
    """A member's switches with 6 heads over 3, and widths that 3 ranks divide and 2 do not."""
    tiny = ModelConfig.load(f"{member}-tiny")
    heads = (1, 1, 21) if member == "rwkv" else (6, 3, 12)
    shape = {"dim": 21, "n_layers": 2, "hidden_dim": 45, "vocab_size": 99, "max_seq_len": 32, "preset": ""}
    shape |= dict(zip(("n_heads", "n_kv_heads", "head_dim"), heads, strict=True))
    return replace(tiny, **shape, rotary_dim=4 if tiny.rotary_dim else 0, tie_embeddings=False)


def check(config: ModelConfig) -> None:
    with torch.device("meta"):
        built = Decoder(config)
    tensors, table = dict(built.named_parameters()), config.parameters()
    assert {name: row.shape(config) for name, row in table.items()} == {n: tuple(p.shape) for n, p in tensors.items()}
    assert sum(p.numel() for p in tensors.values()) == config.num_params()
    drawn = [name for name, tensor in tensors.items() if tensor.dim() > 1]  # in the order of the random numbers
    assert drawn == [name for name in table if tensors[name].dim() > 1]
    for name, row in table.items():
        path = name.rpartition(".")[0]
        module = built.get_submodule(path)
        if row.role == "bias":
            assert row.axes == table[f"{path}.weight"].axes[:1], name
        elif row.role == "norm":
            assert "Norm" in type(module).__name__ and row.split_axis is None, name
        else:
            assert isinstance(module, MODULES.get(row.role, nn.Linear)), name
    fused = {name.rpartition(".")[0] for name, _ in built.fuse().named_parameters()}
    for name, row in table.items():
        path, part = name.split(".")[:-2], name.split(".")[-2]
        assert ".".join((*path, row.fused or part)) in fused or row.role in ("recurrence", "token shift"), name
        assert not row.fused or part in FUSED[row.fused]


@pytest.mark.parametrize("name", config_names("model"))
def test_every_parameter_of_every_preset_is_in_the_table(name: str) -> None:
    check(ModelConfig.load(name))


@pytest.mark.parametrize("member", MEMBERS)
def test_every_switch_keeps_table_and_decoder_together(member: str) -> None:
    config = odd(member)
    check(config)
    for norm in ("rms", "layer", "layer-scale"):
        changes = (
            {"tie_embeddings": True},
            {"embedding_norm": True},
            {"bias": "all"},
            {"bias": "qkv"},
            {"qk_norm": True},
        )
        for change in changes:
            if config.mixer == "attention" or not {"bias", "qk_norm"} & set(change):
                check(replace(config, norm=norm, **change))


def test_the_split_of_llama_is_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    words = {"colwise": "column", "rowwise": "row"}
    plan = {
        name.removeprefix("layers.*."): words[kind]
        for name, kind in transformers.LlamaConfig.base_model_tp_plan.items()
    }
    rows = parameters.block(ModelConfig.load("llama-2-70b"))
    ours = {name.removesuffix(".weight"): row.parallel for name, row in rows.items() if row.parallel != "none"}
    assert ours == plan


def shares(model: Decoder, ranks: int) -> list[dict[str, Tensor]]:
    """Each rank's part of the parameters, by the table."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, row in model.config.parameters().items():
        tensor = model.state_dict()[name]
        split = [tensor] * ranks if row.split_axis is None else tensor.chunk(ranks, row.split_axis)
        for part, one in zip(parts, split, strict=True):
            part[name] = one
    return parts


def linear(part: dict[str, Tensor], name: str, x: Tensor, rank: int = 0) -> Tensor:
    """A rank's product; of a row-parallel layer one rank alone adds the bias."""
    bias = part.get(f"{name}.bias")
    return x @ part[f"{name}.weight"].T + (0 if bias is None or rank else bias)


def attention(model: Decoder, part: dict[str, Tensor], path: str, x: Tensor, rank: int, ranks: int) -> Tensor:
    config, length = model.config, x.shape[1]
    q, k, v = (linear(part, f"{path}.{n}_proj", x).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for n in "qkv")
    if model.model.rope is not None:
        at = torch.arange(length)
        tables = model.model.rope(torch.stack((at, at * 0)) if config.position == "rope-2d" else at)
        q, k = rotate(q, *tables), rotate(k, *tables)
    k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for one in (k, v))
    scores = q @ k.mT / config.head_dim**0.5
    if config.position == "alibi":
        distance = torch.arange(length) - torch.arange(length)[:, None]
        scores = scores + slopes(config.n_heads).chunk(ranks)[rank][:, None, None] * distance
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
    return linear(part, f"{path}.o_proj", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2), rank)


def shifted(part: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.lerp(F.pad(x, (0, 0, 1, 0))[:, :-1], x, part[name])


def time_mix(part: dict[str, Tensor], path: str, x: Tensor) -> Tensor:
    names = {"k": "key", "v": "value", "r": "receptance"}
    k, v, r = (linear(part, f"{path}.{n}_proj", shifted(part, f"{path}.time_mix_{m}", x)) for n, m in names.items())
    past = Sums.empty(len(x), k.shape[-1], x.device)
    y, _ = wkv_scan(k, v, part[f"{path}.time_decay"].exp(), part[f"{path}.time_first"], past)
    return linear(part, f"{path}.o_proj", r.sigmoid() * y)


def mlp(config: ModelConfig, part: dict[str, Tensor], path: str, x: Tensor, rank: int) -> Tensor:
    up = linear(part, f"{path}.up_proj", shifted(part, f"{path}.time_mix_key", x) if config.mlp == "channel-mix" else x)
    if config.mlp == "swiglu":
        wide = F.silu(linear(part, f"{path}.gate_proj", x)) * up
    else:
        wide = F.gelu(up, approximate="tanh") if config.mlp == "gelu" else up.relu().square()
    return linear(part, f"{path}.down_proj", wide, rank)


def split_logits(model: Decoder, tokens: Tensor, ranks: int) -> Tensor:
    """Logits from the ranks' parts: every sum over ranks is an all-reduce, the concatenation an all-gather."""
    config, parts, norms = model.config, shares(model, ranks), dict(model.named_modules())
    x, start = torch.zeros(*tokens.shape, config.dim), 0
    for part in parts:  # vocabulary-parallel: each rank looks up the ids that it has
        rows = part["model.embed_tokens.weight"]
        own = (tokens >= start) & (tokens < start + len(rows))
        x = x + rows[(tokens - start).clamp(0, len(rows) - 1)] * own[..., None]
        start += len(rows)
    if config.position == "learned-2d":
        names = [f"model.embed_positions.{name}.weight" for name in ("position", "block_position")]
        x = x + parts[0][names[0]][: tokens.shape[1]] + parts[0][names[1]][0]
    x = norms["model.embed_norm"](x) if config.embedding_norm else x
    for i in range(config.n_layers):
        path = f"model.layers.{i}"

        def mix(n: Tensor, path: str = f"{path}.self_attn") -> Tensor:
            if config.mixer == "wkv":
                return sum(time_mix(part, path, n) for part in parts)  # type: ignore[return-value]
            return sum(attention(model, part, path, n, r, ranks) for r, part in enumerate(parts))  # type: ignore[return-value]

        def feed(n: Tensor, path: str = f"{path}.mlp") -> Tensor:
            y: Tensor = sum(mlp(config, part, path, n, r) for r, part in enumerate(parts))  # type: ignore[assignment]
            if config.mlp != "channel-mix":
                return y
            return linear(parts[0], f"{path}.r_proj", shifted(parts[0], f"{path}.time_mix_receptance", n)).sigmoid() * y

        n, scale = norms[f"{path}.input_layernorm"](x), (2 * config.n_layers) ** 0.5
        if config.parallel_block:
            x = x + mix(n) + feed(n)
            continue
        x = (n * scale if config.residual == "norm" else x) + mix(n)
        n = norms[f"{path}.post_attention_layernorm"](x)
        x = (n * scale if config.residual == "norm" else x) + feed(n)
    x = norms["model.norm"](x) * config.logit_scale
    return torch.cat([x @ part["lm_head.weight"].T for part in parts], dim=-1)


@pytest.mark.parametrize("member", MEMBERS)
def test_a_split_by_the_table_computes_the_same(member: str) -> None:
    torch.manual_seed(0)
    model = Decoder(odd(member)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.normal_(0, 0.3) if tensor.dim() > 1 or name.endswith("bias") else tensor.uniform_(0.3, 1.2)
        tokens = torch.randint(0, 99, (2, 9))
        full = model(tokens)
        for ranks in (1, 3):
            torch.testing.assert_close(split_logits(model, tokens, ranks), full, atol=1e-4, rtol=1e-4)
    whole = sum(part.numel() for part in shares(model, 3)[0].values())
    alone = {name for name, row in model.config.parameters().items() if row.parallel == "none"}
    assert 3 * whole == model.config.num_params() + 2 * sum(model.state_dict()[name].numel() for name in alone)
    assert all(set(row.axes) & set(SPLIT) for name, row in model.config.parameters().items() if name not in alone)


def test_a_parameter_is_added_in_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the table is a shape, a count, a tensor of a folder, and a message about another shape."""
    row = Parameter("mlp.extra_proj.weight", "up", ("hidden_dim", "dim"), {"mlp": ("swiglu",)})
    before = odd("llama").num_params()
    monkeypatch.setattr(parameters, "BLOCK", (*parameters.BLOCK, row))
    config, name = odd("llama"), "model.layers.1.mlp.extra_proj.weight"
    assert config.tensors()[name] == (45, 21) and config.num_params() == before + 2 * 45 * 21
    tensors = {key: torch.randn(shape) for key, shape in config.tensors().items()}
    hf.write(tmp_path, config, tensors)
    assert torch.equal(open_model(tmp_path).tensors[name], tensors[name])
    hf.write(tmp_path, odd("llama"), tensors | {name: torch.randn(21, 45).T})
    assert name not in odd("bloom").tensors()
