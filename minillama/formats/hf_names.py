"""Hugging Face parameter names and layouts: LLaMA's, BLOOM's, RWKV's.

A layout is a table: name in the file -> its shape, and the parameters of ours that it consists of.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.errors import InputError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Tensor of a file.

    Attributes:
        shape: in the file.
        ours: its parameter; or query, key and value, interleaved by head, (H, 3, E, ...).
        heads: H, for a fused query, key and value.
    """

    shape: Shape
    ours: tuple[str, ...]
    heads: int = 0

    def pack(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensor of the file from ours."""
        if not self.heads:
            return tensors[self.ours[0]].reshape(self.shape)
        parts = [tensors[name] for name in self.ours]
        return torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).reshape(self.shape)

    def unpack(self, tensor: Tensor, name: str, shape: Shape) -> Tensor:
        """One of our tensors from the file's."""
        if not self.heads:
            return tensor.reshape(shape)
        return tensor.unflatten(0, (self.heads, 3, -1))[:, self.ours.index(name)].reshape(shape)


def layout(config: ModelConfig, kind: str) -> dict[str, Entry]:
    """Tensor layout of a folder.

    Args:
        config: the shape.
        kind: `model_type` of config.json: bloom, rwkv, or anything else for our own names.
    """
    shapes = config.tensors()
    if kind == "bloom":
        return _bloom(config, shapes)
    rename = _rwkv if kind == "rwkv" else str
    return {rename(name): Entry(_stored(rename(name), shape), (name,)) for name, shape in shapes.items()}


_BLOOM = [
    (r"model\.embed_tokens", "transformer.word_embeddings"),
    (r"model\.embed_norm", "transformer.word_embeddings_layernorm"),
    (r"model\.norm", "transformer.ln_f"),
    (r"model\.layers", "transformer.h"),
    (r"self_attn\.q_proj", "self_attention.query_key_value"),
    (r"self_attn\.o_proj", "self_attention.dense"),
    (r"mlp\.up_proj", "mlp.dense_h_to_4h"),
    (r"mlp\.down_proj", "mlp.dense_4h_to_h"),
]
_RWKV = [
    (r"model\.embed_tokens", "rwkv.embeddings"),
    (r"model\.embed_norm", "rwkv.blocks.0.pre_ln"),
    (r"model\.norm", "rwkv.ln_out"),
    (r"model\.layers", "rwkv.blocks"),
    (r"lm_head", "head"),
    (r"input_layernorm", "ln1"),
    (r"post_attention_layernorm", "ln2"),
    (r"self_attn\.k_proj", "attention.key"),
    (r"self_attn\.v_proj", "attention.value"),
    (r"self_attn\.o_proj", "attention.output"),
    (r"self_attn\.r_proj", "attention.receptance"),
    (r"self_attn", "attention"),
    (r"mlp\.up_proj", "feed_forward.key"),
    (r"mlp\.down_proj", "feed_forward.value"),
    (r"mlp\.r_proj", "feed_forward.receptance"),
    (r"mlp", "feed_forward"),
]


def _renamed(name: str, table: list[tuple[str, str]]) -> str:
    for pattern, theirs in table:
        name = re.sub(rf"(?<![\w]){pattern}(?![\w])", theirs, name)
    return name


def _rwkv(name: str) -> str:
    return _renamed(name, _RWKV)


def _stored(name: str, shape: Shape) -> Shape:
    """Shape in the file: transformers has RWKV's time mixes as (1, 1, D)."""
    return (1, 1, *shape) if name.startswith("rwkv.") and "time_mix" in name else shape


def _bloom(config: ModelConfig, shapes: Mapping[str, Shape]) -> dict[str, Entry]:
    """BLOOM's layout: fused query, key and value, interleaved by head."""
    table = {}
    for name, shape in shapes.items():
        if "k_proj" in name or "v_proj" in name:
            continue
        if "q_proj" in name:
            three = tuple(name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj"))
            table[_renamed(name, _BLOOM)] = Entry((3 * shape[0], *shape[1:]), three, config.n_heads)
        else:
            table[_renamed(name, _BLOOM)] = Entry(shape, (name,))
    return table


def refuse_relatives(config: ModelConfig, form: str) -> None:
    """Refuse a model other than LLaMA, for a format without it.

    Raises:
        InputError: a switch differs from LLaMA's; it is named.
    """
    for switch, found in config.switches().items():
        raise InputError(
            f"{form} has no such model", where=switch, found=found, expected="LLaMA's switches", fix="write it as hf"
        )


def refuse_unknown(tensors: Iterable[str], config: ModelConfig) -> None:
    """Refuse tensors without a name in the format, which would be lost silently.

    Raises:
        InputError: tensors that a model of this shape does not have.
    """
    unknown = sorted(set(tensors) - set(config.tensors()))
    if unknown:
        found = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        what, fix = "tensors that would not be written", "merge adapters and take off heads before saving the model"
        raise InputError(what, found=found, expected="the parameters of the configuration", fix=fix)
