"""GGUF files of llama.cpp, architecture `llama`: reading and writing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minillama.config import ModelConfig, RopeScaling
from minillama.config.parameters import V
from minillama.errors import InputError
from minillama.formats.gguf_blocks import INT4, q4_1_bytes, read_int4
from minillama.formats.gguf_header import GGUFHeader, read_header
from minillama.formats.layout import (
    Entry,
    check_tensors,
    check_writable,
    layout,
    lazy_tensors,
    to_half_split,
    to_interleaved,
)
from minillama.formats.model_file import LazyTensors, ModelFile
from minillama.formats.stored import Stored
from minillama.layers.int4 import Int4
from minillama.layers.rope import inverse_frequencies

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# ours -> key after `llama.`
KEYS = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_dim": "feed_forward_length",
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
REQUIRED = ("dim", "n_layers", "n_heads", "hidden_dim", "max_seq_len", "norm_eps")
ROPE_FREQS = "rope_freqs.weight"
DType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
DTYPES: dict[str, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3}  # -> general.file_type
_PLAIN = {"F32": (np.float32, torch.float32), "F16": (np.float16, torch.float16), "BF16": (np.int16, torch.bfloat16)}


def read(path: Path) -> ModelFile:
    """Open a file. Tensors are memory-mapped, and dequantized to float32 when they are read.

    Raises:
        InputError: not a GGUF file, a damaged or a forged one, another architecture, or tensors that do
            not match its metadata.
    """
    header = read_header(path)
    config = _config(header, path)
    table = layout(config, NAMES, interleaved=True)
    check_tensors(table, {name: info.shape for name, info in header.tensors.items()}, path, {ROPE_FREQS})
    packed = {
        name: entry for entry in table.values() for name in entry.ours if header.tensors[entry.name].dtype in INT4
    }

    def int4(name: str) -> Int4:
        numbers, heads = read_int4(path, header.tensors[packed[name].name]), packed[name].heads
        return Int4(*(to_half_split(part, heads) for part in numbers)) if heads else numbers

    tensors = lazy_tensors(config, table, lambda name: _tensor(path, header.tensors[name]))
    tokenizer = path if "tokenizer.ggml.model" in header.metadata else None
    ids = (header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    stops = frozenset(i for i in ids if isinstance(i, int))
    kind, quantized = f"GGUF version {header.version}", LazyTensors(packed, int4)
    return ModelFile(path, kind, config, tensors, header.tensors, tokenizer, header.metadata, stops, quantized)


def _config(header: GGUFHeader, path: Path) -> ModelConfig:
    kind = header.get("general.architecture", str)
    if kind != "llama":
        where = f"{path}, general.architecture"
        raise InputError("this architecture is not supported", where=where, found=kind, expected="llama")
    if header.get("split.count", int, 1) > 1:
        raise InputError("this is one shard of a split model", where=path, fix="merge it with llama-gguf-split --merge")
    if "token_embd.weight" not in header.tensors:
        raise InputError("the file has no model", where=path, expected="token_embd.weight", found="a vocabulary only")
    values: dict[str, Any] = {}
    for ours, theirs in KEYS.items():
        key, number = f"llama.{theirs}", float if ours in ("norm_eps", "rope_theta") else int
        if ours in REQUIRED or key in header.metadata:
            values[ours] = header.get(key, number)
    values.setdefault("rope_theta", 10000.0)
    values["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    # float32 in the file: 1e-5 comes back as 9.99999974e-06
    values["norm_eps"] = float(str(np.float32(values["norm_eps"])))
    values["tie_embeddings"] = "output.weight" not in header.tensors
    keys = {ours: f"llama.{theirs}" for ours, theirs in KEYS.items()}
    config = ModelConfig.from_keys(values, path, keys)
    scaling = _scaling(header, config, path)
    return ModelConfig.from_keys(values | {"rope_scaling": scaling}, path, keys) if scaling else config


def _scaling(header: GGUFHeader, config: ModelConfig, path: Path) -> dict[str, Any] | None:
    kind = header.get("llama.rope.scaling.type", str, "none")
    if kind == "linear":
        return {"kind": "linear", "factor": header.get("llama.rope.scaling.factor", float, 1.0)}
    if kind != "none":
        where = f"{path}, llama.rope.scaling.type"
        raise InputError("this rope scaling is not supported", where=where, found=kind, expected="none or linear")
    if ROPE_FREQS not in header.tensors:
        return None
    divisors = _tensor(path, header.tensors[ROPE_FREQS]).float().flatten()
    # The file has the divisors alone. Llama 3.1's bands are the only ones in use; they are tried.
    scaling = {"kind": "llama3", "factor": float(divisors.max()), "original_max_seq_len": 8192}
    mine = rope_divisors(config.changed({"rope_scaling": scaling}))
    if mine is None or divisors.shape != mine.shape or not torch.allclose(divisors, mine, rtol=1e-3):
        where = f"{path}, {ROPE_FREQS}"
        raise InputError("these rotary divisors are not Llama 3.1's", where=where, found=divisors.tolist()[:8])
    return scaling


def rope_divisors(config: ModelConfig) -> Tensor | None:
    """RoPE frequency divisors (E/2,) of llama3 scaling; None without it."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain = inverse_frequencies(config.head_dim, config.rope_theta)
    return plain / inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def _tensor(path: Path, info: Stored) -> Tensor:
    if info.dtype in _PLAIN:
        numbers, dtype = _PLAIN[info.dtype]
        return torch.from_numpy(np.memmap(path, numbers, "c", info.start, info.shape)).view(dtype)
    package, rows = _package(), info.shape[:-1]
    data = np.memmap(path, np.uint8, "r", info.start, (*rows, info.size // math.prod(rows)))
    try:
        return torch.from_numpy(package.dequantize(data, package.GGMLQuantizationType[info.dtype]))
    except NotImplementedError:
        found = info.dtype
        raise InputError("the gguf package cannot dequantize this type", where=path, found=found) from None


def _package() -> Any:
    try:
        import gguf
    except ImportError:
        fix = "pip install 'minillama[gguf]'"
        raise InputError("GGUF files need the gguf package, which is not installed", fix=fix) from None
    return gguf


def write(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    vocabulary: Mapping[str, Any],
    dtype: DType = "f16",
    name: str = "minillama",
    progress: Callable[[str], None] = lambda name: None,
    int4: Mapping[str, Int4] | None = None,
) -> None:
    """Write one file, one tensor in memory at a time.

    Norms stay in float32. A matrix whose rows are not a multiple of 32 is not quantized but kept in float16. With q4_1
    the embedding and the head are Q8_0.

    Args:
        path: of the file.
        config: the shape.
        tensors: by Hugging Face name.
        vocabulary: `tokenizer.*` keys.
        dtype: of the matrices.
        name: `general.name`.
        progress: called with each name.
        int4: quantized matrices for q4_1 by Hugging Face name; others are quantized by `Int4.of`.
    """
    check_writable(tensors, config, "GGUF, as it is written here,")
    gguf = _package()
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, config, vocabulary, dtype, name)
    divisors = rope_divisors(config)
    if divisors is not None:
        writer.add_tensor_info(ROPE_FREQS, divisors.shape, np.dtype(np.float32), divisors.nbytes)
    kinds = [(entry, _kind(gguf, entry, dtype)) for entry in layout(config, NAMES, interleaved=True).values()]
    for entry, kind in kinds:
        block, width = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(entry.shape) // block * width
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors.numpy())
    for entry, kind in kinds:
        writer.write_tensor_data(_data(gguf, entry, kind, tensors, int4 or {}))
        progress(entry.name)
    writer.close()


def _data(gguf: Any, entry: Entry, kind: Any, tensors: Mapping[str, Tensor], int4: Mapping[str, Int4]) -> Any:
    """A tensor's bytes or values."""
    (ours,) = entry.ours
    if kind == gguf.GGMLQuantizationType.Q4_1:
        numbers = int4.get(ours) or Int4.of(tensors[ours].detach().cpu())
        rows = (to_interleaved(part, entry.heads) for part in numbers) if entry.heads else numbers
        return q4_1_bytes(Int4(*rows))
    tensor = entry.pack(tensors).detach().cpu()
    if kind == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > 65504:
        found = f"{tensor.abs().max().item():g}"
        raise InputError("a value is too large for float16", where=ours, found=found, fix="choose bf16 or f32")
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)


def _write_metadata(writer: Any, config: ModelConfig, vocabulary: Mapping[str, Any], dtype: DType, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(DTYPES[dtype])
    if dtype.startswith("q"):
        writer.add_quantization_version(_package().GGML_QUANT_VERSION)
    theta = config.rope_theta
    if config.rope_scaling is not None and config.rope_scaling.kind == "ntk":
        theta = float(config.to_hf()["rope_theta"])
    for ours, theirs in KEYS.items():
        value = theta if ours == "rope_theta" else getattr(config, ours)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{theirs}", value)
    writer.add_uint32("llama.attention.value_length", config.head_dim)
    writer.add_uint32("llama.rope.dimension_count", config.head_dim)
    _write_scaling(writer, config.rope_scaling)
    for key, value in vocabulary.items():
        _add(writer, key, value)


def _kind(gguf: Any, entry: Entry, dtype: DType) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(entry.shape) == 1:
        return kinds.F32
    kind = kinds.Q8_0 if dtype == "q4_1" and V in entry.axes else kinds[dtype.upper()]
    return kinds.F16 if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _write_scaling(writer: Any, scaling: RopeScaling | None) -> None:
    if scaling is not None and scaling.kind == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", scaling.factor)


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)
