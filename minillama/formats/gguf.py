"""GGUF files of llama.cpp, architecture `llama`: reading and writing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minillama.config import ModelConfig
from minillama.config.parameters import V
from minillama.errors import InputError
from minillama.formats import generation_config
from minillama.formats.gguf_header import GGUFHeader, read_header
from minillama.formats.layout import Entry, check_tensors, check_writable, layout, lazy_tensors
from minillama.formats.model_file import FLOATS, LazyTensors, ModelFile
from minillama.formats.stored import Stored
from minillama.layers.int4 import GROUP, LOW, Int4
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
KEYS = {
    "dim": "llama.embedding_length",
    "n_layers": "llama.block_count",
    "n_heads": "llama.attention.head_count",
    "n_kv_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.attention.key_length",
    "hidden_dim": "llama.feed_forward_length",
    "vocab_size": "llama.vocab_size",
    "max_seq_len": "llama.context_length",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
# keys that change what is computed, each with the value at which it changes nothing
NEUTRAL: dict[str, Any] = {
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "expert_count": 0,
    "attention.causal": True,
}
DEFAULTS = {"n_kv_heads": 0, "head_dim": 0, "vocab_size": 0, "rope_theta": 10000.0}  # of keys that a file may lack
ROPE_FREQS = "rope_freqs.weight"
INT4 = {"Q4_0": 1, "Q4_1": 2}  # type -> float16 values before the bytes of a block
DType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
DTYPES: dict[str, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3}  # -> general.file_type


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
    for name, info in header.tensors.items():
        if len(info.shape) == 1 and info.dtype not in FLOATS:
            found, expected = info.dtype, ", ".join(FLOATS)
            raise InputError("not a type of a norm", where=f"{path}, {name}", found=found, expected=expected)
    packed = {
        name: entry for entry in table.values() for name in entry.ours if header.tensors[entry.name].dtype in INT4
    }

    def int4(name: str) -> Int4:
        entry = packed[name]
        return Int4(*map(entry.half_split, _read_int4(path, header.tensors[entry.name])))

    tensors = lazy_tensors(config, table, lambda name: _tensor(path, header.tensors[name]))
    tokenizer = path if "tokenizer.ggml.model" in header.metadata else None
    kind, quantized, metadata = f"GGUF version {header.version}", LazyTensors(packed, int4), header.metadata
    stops, sampling = generation_config.gguf_stop_ids(metadata), generation_config.gguf_defaults(metadata)
    return ModelFile(path, kind, config, tensors, header.tensors, tokenizer, metadata, stops, quantized, sampling)


def _config(header: GGUFHeader, path: Path) -> ModelConfig:
    kind = header.get("general.architecture", str)
    if kind != "llama":
        where = f"{path}, general.architecture"
        raise InputError("this architecture is not supported", where=where, found=kind, expected="llama")
    if header.get("split.count", int, 1) > 1:
        raise InputError("this is one shard of a split model", where=path, fix="merge it with llama-gguf-split --merge")
    if "token_embd.weight" not in header.tensors:
        raise InputError("the file has no model", where=path, expected="token_embd.weight", found="a vocabulary only")
    values: dict[str, Any] = {
        ours: header.get(key, float if ours in ("norm_eps", "rope_theta") else int, DEFAULTS.get(ours))
        for ours, key in KEYS.items()
    }
    values["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    # float32 in the file: 1e-5 comes back as 9.99999974e-06
    values["norm_eps"] = float(str(np.float32(values["norm_eps"])))
    values["tie_embeddings"] = "output.weight" not in header.tensors
    config = ModelConfig.from_keys(values, path, KEYS)
    _refuse_others(header, config, path)
    scaling = _scaling(header, config, path)
    return ModelConfig.from_keys(values | {"rope_scaling": scaling}, path, KEYS) if scaling else config


def _refuse_others(header: GGUFHeader, config: ModelConfig, path: Path) -> None:
    """Refuse keys of another computation than LLaMA's."""
    widths = dict.fromkeys(("attention.value_length", "rope.dimension_count"), config.head_dim)
    window = header.metadata.get("llama.attention.sliding_window")
    wide = {"attention.sliding_window": window if type(window) is int and window >= config.max_seq_len else 0}
    for key, neutral in {**NEUTRAL, **widths, **wide}.items():
        found = header.metadata.get(f"llama.{key}", neutral)
        if isinstance(found, np.ndarray) or found != neutral:
            what, where = "this is not supported", f"{path}, llama.{key}"
            raise InputError(what, where=where, found=str(found)[:80], expected=neutral)


def _scaling(header: GGUFHeader, config: ModelConfig, path: Path) -> dict[str, Any] | None:
    old = header.get("llama.rope.scale_linear", float, 1.0)  # before November 2023
    factor = header.get("llama.rope.scaling.factor", float, old) or 1.0
    kind = header.get("llama.rope.scaling.type", str, "none" if factor == 1.0 else "linear")
    if kind == "linear":
        return {"kind": "linear", "factor": factor}
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
    data = np.memmap(path, np.uint8, "c", info.start, info.size)
    if info.dtype in FLOATS:
        return torch.from_numpy(data).view(FLOATS[info.dtype]).view(info.shape)
    package, rows = _package(), data.reshape(*info.shape[:-1], -1)
    try:
        return torch.from_numpy(package.dequantize(rows, package.GGMLQuantizationType[info.dtype]))
    except NotImplementedError:
        found = info.dtype
        raise InputError("the gguf package cannot dequantize this type", where=path, found=found) from None


def _read_int4(path: Path, info: Stored) -> Int4:
    """Int4 matrix of a tensor whose type is in `INT4`, exact in float32.

    Blocks of 32 inputs (ggml-org/ggml, src/ggml-common.h): Q4_0 is d (float16) and 16 bytes, w = d (b - 8); Q4_1 is d,
    m (float16) and 16 bytes, w = d b + m. Byte j has b of input j in its low half, that of input j + 16 in its high.
    """
    rows, inputs = info.shape
    shape = rows, inputs // GROUP, info.size // (rows * inputs // GROUP)
    blocks = torch.from_numpy(np.memmap(path, np.uint8, "c", info.start, shape))
    head = 2 * INT4[info.dtype]
    numbers = blocks[..., :head].contiguous().view(torch.float16).float()
    scale = numbers[..., 0].contiguous()
    offset = numbers[..., 1] - LOW * scale if info.dtype == "Q4_1" else torch.zeros_like(scale)
    return Int4(blocks[..., head:].flatten(-2).clone(), scale, offset)


def _q4_1_bytes(numbers: Int4) -> NDArray[np.uint8]:
    """Q4_1 blocks (O, I / 32 * 20); m = z - 8 s rounded to float16, exact for `storable` grids.

    Args:
        numbers: in groups of a multiple of 32; each block gets scale and zero point of its group.
    """
    times = numbers.group // GROUP
    scale, offset = (grid.repeat_interleave(times, dim=-1) for grid in (numbers.scale, numbers.offset))
    head = torch.stack((scale, offset + LOW * scale), dim=-1).half().view(torch.uint8)  # (O, I / 32, 4)
    blocks: Tensor = torch.cat((head, numbers.nibbles.unflatten(-1, (-1, 16))), dim=-1)
    return blocks.flatten(-2).numpy()


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
    int4: Mapping[str, Int4] | None = None,
) -> None:
    """Write one file, one tensor in memory at a time.

    Norms stay in float32. A matrix whose rows are not a multiple of 32 is not quantized but kept in float16. With q4_1
    the embedding and the head are Q8_0.

    Args:
        tensors: by Hugging Face name; each is read once.
        vocabulary: `tokenizer.*` keys.
        dtype: of the matrices.
        int4: quantized matrices for q4_1 by Hugging Face name; others are quantized by `Int4.of`.
    """
    check_writable(tensors, config, "GGUF, as it is written here,")
    gguf = _package()
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, config, vocabulary, dtype, name)
    entries, divisors = list(layout(config, NAMES, interleaved=True).values()), rope_divisors(config)
    if divisors is not None:
        shape = tuple(divisors.shape)
        entries.insert(0, Entry(ROPE_FREQS, shape, ("pairs",), {ROPE_FREQS: shape}))
    kinds = [_kind(gguf, entry, dtype) for entry in entries]
    for entry, kind in zip(entries, kinds, strict=True):
        block, width = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(entry.shape) // block * width
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, kind in zip(entries, kinds, strict=True):
        source = tensors if divisors is None or entry.name != ROPE_FREQS else {ROPE_FREQS: divisors}
        writer.write_tensor_data(_data(gguf, entry, kind, source, int4 or {}))
    writer.close()


def _data(gguf: Any, entry: Entry, kind: Any, tensors: Mapping[str, Tensor], int4: Mapping[str, Int4]) -> Any:
    """A tensor's bytes or values."""
    (ours,) = entry.ours
    if kind == gguf.GGMLQuantizationType.Q4_1:
        numbers = int4.get(ours) or Int4.of(tensors[ours].detach().cpu())
        return _q4_1_bytes(Int4(*map(entry.interleaved, numbers)))
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
    values = {key: getattr(config, ours) for ours, key in KEYS.items()}
    values["llama.rope.freq_base"] = config.to_hf()["rope_theta"]  # that of ntk scaling is larger
    values["llama.attention.value_length"] = values["llama.rope.dimension_count"] = config.head_dim
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        values["llama.rope.scaling.type"] = "linear"
        values["llama.rope.scaling.factor"] = config.rope_scaling.factor
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**values, **vocabulary}.items():
        adders.get(type(value), writer.add_array)(key, value)


def _kind(gguf: Any, entry: Entry, dtype: DType) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(entry.shape) == 1:
        return kinds.F32
    kind = kinds.Q8_0 if dtype == "q4_1" and V in entry.axes else kinds[dtype.upper()]
    return kinds.F16 if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind
