"""Parameter table: name, role and named axes of every parameter, under each switch of the configuration. No torch.

Names are Hugging Face's for LLaMA; what LLaMA lacks is named after its neighbors. (out, in) for linear layers. Shapes,
counts, initialization, fused layers, names and row orders of file formats, and tensor parallelism follow from it.

Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053, §3) splits heads, feed-forward width and vocabulary, not the
residual stream. A linear layer whose output axis is split is column-parallel, one whose input axis is split is
row-parallel: its outputs are summed over the ranks, and its bias is added once. With fewer key/value heads than ranks,
several ranks have the same head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from minillama.config.shape import Shape

Role = Literal[
    "embedding", "position", "norm", "query", "key", "value", "receptance", "attention output", "gate", "up", "down",
    "recurrence", "token shift", "bias", "head", "score",
]  # fmt: skip
Values = tuple[object, ...]
Condition = Mapping[str, Values]
ALWAYS: Condition = {}
V, D, E, F, HEADS, KV_HEADS = (
    "vocab_size",
    "dim",
    "head_dim",
    "hidden_dim",
    "n_heads x head_dim",
    "n_kv_heads x head_dim",
)
CHANNELS = "attention_hidden_size"  # D channels of RWKV's recurrence, as transformers calls them
POSITIONS = "max_seq_len + 1"
SPLIT = (V, F, HEADS, KV_HEADS, CHANNELS)


def split_axis(axes: Sequence[str]) -> int | None:
    """Axis that tensor parallelism splits; None: replicated."""
    return next((i for i, axis in enumerate(axes) if axis in SPLIT), None)


@dataclass(frozen=True)
class Parameter:
    """Row of the parameter table.

    Attributes:
        name: Hugging Face name; a block's within the block.
        role: function in the model.
        axes: names of the axes: fields of the configuration, or their product.
        when: field of the configuration -> values with which the parameter exists.
        fused: linear layer into which `Decoder.fuse` concatenates it.
    """

    name: str
    role: Role
    axes: tuple[str, ...]
    when: Condition = field(default_factory=dict)
    fused: str = ""

    def shape(self, config: Shape) -> tuple[int, ...]:
        """Sizes of the axes."""
        others = {CHANNELS: config.dim, POSITIONS: config.max_seq_len + 1, "1": 1}
        return tuple(
            others.get(axis) or math.prod(getattr(config, name) for name in axis.split(" x ")) for axis in self.axes
        )

    @property
    def split_axis(self) -> int | None:
        """Axis that tensor parallelism splits; None: replicated."""
        return split_axis(self.axes)

    @property
    def parallel(self) -> Literal["vocab", "column", "row", "none"]:
        """Kind of tensor parallelism."""
        if self.split_axis is None:
            return "none"
        return "vocab" if V in self.axes else "row" if self.split_axis else "column"


def _norm(name: str, when: Condition = ALWAYS) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", "norm", (D,), when)
    yield Parameter(f"{name}.bias", "bias", (D,), {**when, "norm": ("layer",)})


def _linear(
    name: str, role: Role, axes: tuple[str, str], when: Condition = ALWAYS, fused: str = "", bias: Values = ("all",)
) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", role, axes, when, fused)
    yield Parameter(f"{name}.bias", "bias", axes[:1], {**when, "bias": bias}, fused)


_ATTENTION: Condition = {"mixer": ("attention",)}
_WKV: Condition = {"mixer": ("wkv",)}
_QKV = ("qkv", "all")
FIRST = (
    Parameter("model.embed_tokens.weight", "embedding", (V, D)),
    Parameter("model.embed_positions.position.weight", "position", (POSITIONS, D), {"position": ("learned-2d",)}),
    Parameter("model.embed_positions.block_position.weight", "position", (POSITIONS, D), {"position": ("learned-2d",)}),
    *_norm("model.embed_norm", {"embedding_norm": (True,)}),
)
BLOCK = (
    *_norm("input_layernorm"),
    *_linear("self_attn.q_proj", "query", (HEADS, D), _ATTENTION, "qkv_proj", _QKV),
    *_linear("self_attn.k_proj", "key", (KV_HEADS, D), _ATTENTION, "qkv_proj", _QKV),
    *_linear("self_attn.v_proj", "value", (KV_HEADS, D), _ATTENTION, "qkv_proj", _QKV),
    *_linear("self_attn.o_proj", "attention output", (D, HEADS), _ATTENTION),
    Parameter("self_attn.q_norm.weight", "norm", (E,), {"qk_norm": (True,)}),
    Parameter("self_attn.k_norm.weight", "norm", (E,), {"qk_norm": (True,)}),
    Parameter("self_attn.time_decay", "recurrence", (CHANNELS,), _WKV),
    Parameter("self_attn.time_first", "recurrence", (CHANNELS,), _WKV),
    Parameter("self_attn.time_mix_key", "token shift", (D,), _WKV),
    Parameter("self_attn.time_mix_value", "token shift", (D,), _WKV),
    Parameter("self_attn.time_mix_receptance", "token shift", (D,), _WKV),
    *_linear("self_attn.k_proj", "key", (CHANNELS, D), _WKV),
    *_linear("self_attn.v_proj", "value", (CHANNELS, D), _WKV),
    *_linear("self_attn.r_proj", "receptance", (CHANNELS, D), _WKV),
    *_linear("self_attn.o_proj", "attention output", (D, CHANNELS), _WKV),
    *_norm("post_attention_layernorm", {"parallel_block": (False,)}),
    Parameter("mlp.time_mix_key", "token shift", (D,), _WKV),
    Parameter("mlp.time_mix_receptance", "token shift", (D,), _WKV),
    *_linear("mlp.gate_proj", "gate", (F, D), {"mlp": ("swiglu",)}, "gate_up_proj"),
    *_linear("mlp.up_proj", "up", (F, D), {"mlp": ("swiglu",)}, "gate_up_proj"),
    *_linear("mlp.up_proj", "up", (F, D), {"mlp": ("gelu", "channel-mix")}),
    *_linear("mlp.down_proj", "down", (D, F)),
    *_linear("mlp.r_proj", "receptance", (D, D), _WKV),
)
LAST = (
    *_norm("model.norm"),
    Parameter("lm_head.weight", "head", (V, D), {"tie_embeddings": (False,), "head": ("lm",)}),
    Parameter("score.weight", "score", ("1", D), {"head": ("score",)}),
)
# fused layer -> its parts, in the order of their rows
FUSED = {
    name: tuple(p.name.split(".")[-2] for p in BLOCK if p.fused == name and p.name.endswith("weight"))
    for name in ("qkv_proj", "gate_up_proj")
}


def _select(rows: tuple[Parameter, ...], config: Shape) -> dict[str, Parameter]:
    """Rows of a configuration, by name."""
    found = (row for row in rows if all(getattr(config, name) in values for name, values in row.when.items()))
    return {row.name: row for row in found}


def block(config: Shape) -> dict[str, Parameter]:
    """Parameters of one block, by name within it."""
    return _select(BLOCK, config)


def table(config: Shape) -> dict[str, Parameter]:
    """Parameters of a model by Hugging Face name, in its order."""
    rows = block(config)
    blocks = {f"model.layers.{i}.{name}": row for i in range(config.n_layers) for name, row in rows.items()}
    return _select(FIRST, config) | blocks | _select(LAST, config)
