"""llama2.c binaries, legacy and version 1: a header of seven integers and float32 tensors in a fixed order.

karpathy/llama2.c, export.py: legacy_export, version1_export.
"""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.formats.model_file import LazyTensors, ModelFile, Stored, optional
from minillama.formats.rope_rows import rotary_heads, to_half_split

MAGIC = b"24ka"  # "ak42" as a little-endian integer
HEADER = struct.Struct("<7i")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
BOS = 1  # separates documents; llama2.c stops there (run.c, generate)
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def is_llama2c(path: Path) -> bool:
    """Whether the file is a llama2.c binary: the magic of version 1, or a legacy header of at least its size."""
    with path.open("rb") as file:
        start = file.read(HEADER.size)
    if start[:4] == MAGIC:
        return True
    try:
        return len(start) == HEADER.size and _legacy(path, start)[2] >= path.stat().st_size
    except InputError:
        return False


def read(path: Path) -> ModelFile:
    """Open a file. Tensors are memory-mapped.

    Raises:
        InputError: another version, a damaged header, or a file length that differs from the header's.
    """
    with path.open("rb") as file:
        start = file.read(256)
    config, layout, expected = _version1(path, start) if start[:4] == MAGIC else _legacy(path, start)
    size = path.stat().st_size
    if size != expected:
        what = "the file is cut short" if size < expected else "the file is longer than its header says"
        raise InputError(what, where=path, found=f"{size} bytes", expected=f"{expected} bytes")
    shapes = config.tensors()
    readers = {
        name: partial(_tensor, path, layout[name], shape, rotary_heads(config, name)) for name, shape in shapes.items()
    }
    stored = {name: Stored("F32", shape) for name, shape in shapes.items()}
    version = "version 1" if start[:4] == MAGIC else "legacy"
    tokenizer = optional(path.with_name("tokenizer.bin"))
    tensors = LazyTensors(readers)
    return ModelFile(path, f"llama2.c, {version}", config, tensors, stored, tokenizer, {}, frozenset({BOS}))


def _config(path: Path, header: bytes, tied: bool | None = None) -> ModelConfig:
    if len(header) < HEADER.size:
        raise InputError("the file is cut short in its header", where=path, found=f"{len(header)} bytes")
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = HEADER.unpack(header[: HEADER.size])
    values = {
        "dim": dim,
        "hidden_dim": hidden_dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "vocab_size": abs(vocab_size) if tied is None else vocab_size,
        "max_seq_len": max_seq_len,
        "norm_eps": 1e-5,
        "tie_embeddings": vocab_size > 0 if tied is None else tied,  # encoded in the sign by the legacy version
    }
    try:
        if min(hidden_dim, n_kv_heads) < 1:
            raise InputError("a width is not positive", where="header", found=f"{hidden_dim}, {n_kv_heads}")
        return ModelConfig.from_table(values)
    except InputError as error:
        what = f"not a llama2.c model: {error.what}"
        where = f"{path}, {error.where}"
        raise InputError(what, where=where, found=error.found, expected=error.expected) from None


def _legacy(path: Path, start: bytes) -> tuple[ModelConfig, dict[str, int], int]:
    config = _config(path, start)
    order = [EMBEDDING, *_each(config, NORMS[:1]), *_each(config, ATTENTION), *_each(config, NORMS[1:])]
    order += [*_each(config, MLP), NORM]
    layout, end = _layout(config, order, HEADER.size)
    end += 2 * 4 * config.max_seq_len * config.head_dim // 2  # tables of cosines and sines, which are not used
    if not config.tie_embeddings:
        more, end = _layout(config, [HEAD], end)
        layout |= more
    return config, layout, end


def _version1(path: Path, start: bytes) -> tuple[ModelConfig, dict[str, int], int]:
    if len(start) < 256:
        raise InputError("the file is cut short in its header", where=path, found=f"{len(start)} bytes")
    version = int.from_bytes(start[4:8], "little")
    if version != 1:
        expected = "1 (float32), or legacy"
        raise InputError("this version is not supported", where=f"{path}, version", found=version, expected=expected)
    config = _config(path, start[8:], tied=bool(start[8 + HEADER.size]))
    order = [*_each(config, NORMS[:1]), *_each(config, NORMS[1:]), NORM, EMBEDDING]
    order += [*_each(config, ATTENTION), *_each(config, MLP), *([] if config.tie_embeddings else [HEAD])]
    return config, *_layout(config, order, 256)


def _each(config: ModelConfig, parts: tuple[str, ...]) -> list[str]:
    return [f"model.layers.{i}.{part}.weight" for part in parts for i in range(config.n_layers)]


def _layout(config: ModelConfig, order: list[str], start: int) -> tuple[dict[str, int], int]:
    """First byte of each tensor, and the byte after the last."""
    shapes, layout = config.tensors(), {}
    for name in order:
        layout[name] = start
        start += 4 * torch.Size(shapes[name]).numel()
    return layout, start


def _tensor(path: Path, start: int, shape: tuple[int, ...], heads: int | None) -> Tensor:
    tensor = torch.from_numpy(np.memmap(path, np.float32, "c", start, shape))
    return to_half_split(tensor, heads) if heads else tensor
