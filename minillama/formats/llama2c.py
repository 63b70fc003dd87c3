"""llama2.c binaries, legacy and version 1: a header of seven integers and float32 tensors in a fixed order.

karpathy/llama2.c, export.py: legacy_export, version1_export.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.files import reading, regular
from minillama.formats.data_file import DataFile
from minillama.formats.layout import layout, lazy_tensors
from minillama.formats.model_file import ModelFile
from minillama.formats.stored import Stored

MAGIC = b"24ka"  # "ak42" as a little-endian integer
HEADER = struct.Struct("<7i")
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.down_proj", "mlp.up_proj")
EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
# orders of the tensors, those of a block from all blocks in turn
LEGACY = (EMBEDDING, "input_layernorm", *ATTENTION, "post_attention_layernorm", *MLP, NORM)
VERSION_1 = ("input_layernorm", "post_attention_layernorm", NORM, EMBEDDING, *ATTENTION, *MLP, HEAD)
BOS = 1  # separates documents; llama2.c stops there (run.c, generate)


def is_llama2c(path: Path) -> bool:
    """Whether the file is a llama2.c binary: the magic of version 1, or a legacy header of at least its size."""
    with open(path, "rb", opener=regular) as file:
        start = file.read(HEADER.size)
    if start[:4] == MAGIC:
        return True
    try:
        return len(start) == HEADER.size and _header(path, start)[2] >= path.stat().st_size
    except InputError:
        return False


def read(path: Path) -> ModelFile:
    """Open a file.

    Raises:
        InputError: another version, a damaged header, or a file length that differs from the header's.
    """
    data = DataFile.of(path)
    with reading(path), open(path, "rb", opener=regular) as file:
        start = file.read(256)
    config, stored, expected = _header(path, start)
    size = path.stat().st_size
    if size != expected:
        what = "the file is cut short" if size < expected else "the file is longer than its header says"
        raise InputError(what, where=path, found=f"{size} bytes", expected=f"{expected} bytes")
    table = layout(config, {}, interleaved=True)
    tensors = lazy_tensors(config, table, stored, lambda name, part: data.floats(part))
    kind = "llama2.c, version 1" if start[:4] == MAGIC else "llama2.c, legacy"
    tokenizer = path.with_name("tokenizer.bin")
    found = tokenizer if tokenizer.exists() else None
    return ModelFile(path, kind, config, tensors, stored, found, {}, frozenset({BOS}))


def _config(path: Path, header: bytes, tied: bool | None = None) -> ModelConfig:
    if len(header) < HEADER.size:
        raise InputError("the file is cut short in its header", where=path, found=f"{len(header)} bytes")
    names = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    values: dict[str, Any] = dict(zip(names, HEADER.unpack(header[: HEADER.size]), strict=True))
    if min(values["hidden_dim"], values["n_kv_heads"]) < 1:
        found = f"{values['hidden_dim']}, {values['n_kv_heads']}"
        raise InputError("a width is not positive", where=f"{path}, header", found=found)
    if tied is None:  # encoded in the sign by the legacy version
        tied = values["vocab_size"] > 0
        values["vocab_size"] = abs(values["vocab_size"])
    return ModelConfig.from_keys(values | {"norm_eps": 1e-5, "tie_embeddings": tied}, path)


def _header(path: Path, start: bytes) -> tuple[ModelConfig, dict[str, Stored], int]:
    """Configuration, tensors, size of the file."""
    if start[:4] != MAGIC:
        config = _config(path, start)
        tensors, end = _tensors(config, LEGACY, HEADER.size)
        end += 2 * 4 * config.max_seq_len * config.head_dim // 2  # tables of cosines and sines, which are not used
        head, end = _tensors(config, (HEAD,), end)
        return config, tensors | head, end
    if len(start) < 256:
        raise InputError("the file is cut short in its header", where=path, found=f"{len(start)} bytes")
    version = int.from_bytes(start[4:8], "little")
    if version != 1:
        expected = "1 (float32), or legacy"
        raise InputError("this version is not supported", where=f"{path}, version", found=version, expected=expected)
    config = _config(path, start[8:], tied=bool(start[8 + HEADER.size]))
    return config, *_tensors(config, VERSION_1, 256)


def _tensors(config: ModelConfig, order: tuple[str, ...], end: int) -> tuple[dict[str, Stored], int]:
    """Tensors one after the other, and the byte after the last."""
    shapes, stored = config.tensors(), dict[str, Stored]()
    layers = {name: re.sub(r"^model\.layers\.\d+\.|\.weight$", "", name) for name in shapes}
    for name in sorted((name for name in shapes if layers[name] in order), key=lambda name: order.index(layers[name])):
        stored[name] = Stored("F32", shapes[name], end, 4 * math.prod(shapes[name]))
        end += stored[name].size
    return stored, end
