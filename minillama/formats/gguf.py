"""GGUF files of llama.cpp, architecture `llama` and its nearest relatives: reading and writing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minillama.config import ModelConfig
from minillama.config.hf import with_lacking
from minillama.config.parameters import V
from minillama.errors import InputError
from minillama.formats import generation_config
from minillama.formats.data_file import DataFile
from minillama.formats.gguf_header import GGUFHeader, read_header
from minillama.formats.layout import Entry, check_tensors, check_writable, layout, lazy_tensors
from minillama.formats.model_file import FLOATS, LazyTensors, ModelFile
from minillama.formats.stored import Stored
from minillama.layers.int4 import GROUP, LOW, Int4
from minillama.layers.long_rope import gain
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
KEYS = {  # behind the architecture and a dot
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
    "rotary_dim": "rope.dimension_count",
    "sliding_window": "attention.sliding_window",
}
# of keys that a file may lack
DEFAULTS = {
    "n_kv_heads": 0,
    "head_dim": 0,
    "vocab_size": 0,
    "rope_theta": 10000.0,
    "rotary_dim": 0,
    "sliding_window": 0,
}


@dataclass(frozen=True)
class Architecture:
    """Architecture of llama.cpp.

    Attributes:
        fields: of ModelConfig, which its files do not hold.
        interleaved: whether it rotates neighboring rows.
        names: of its tensors, where they are not LLaMA's.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES = {
    "llama": Architecture(interleaved=True),
    "qwen2": Architecture({"bias": "qkv"}),
    "qwen3": Architecture(
        {"qk_norm": True}, names={"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    ),
    "phi3": Architecture(
        names=dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "attn_qkv")
        | dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "ffn_up")
    ),
    "smollm3": Architecture({"nope_interval": 4}, interleaved=True),  # src/models/smollm3.cpp: every fourth
}
# keys that change what is computed, each with the value at which it changes nothing
NEUTRAL: dict[str, Any] = {
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.causal": True,
}
ROPE_FREQS = "rope_freqs.weight"
LONG_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
INT4 = {"Q4_0": 1, "Q4_1": 2}  # type -> float16 values before the bytes of a block
DType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
DTYPES: dict[str, int] = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3}  # -> general.file_type


def read(path: Path) -> ModelFile:
    """Open a file. Tensors are dequantized to float32 when they are read.

    Raises:
        InputError: not a GGUF file, a damaged or a forged one, another architecture, or tensors that do
            not match its metadata.
    """
    data, header = DataFile.of(path), read_header(path)
    config = _config(header, data)
    table = _layout(config, header.get("general.architecture", str))
    known = {ROPE_FREQS, *LONG_FACTORS.values()}
    check_tensors(table, {name: info.shape for name, info in header.tensors.items()}, path, known)
    for name, info in header.tensors.items():
        if len(info.shape) == 1 and info.dtype not in FLOATS:
            found, expected = info.dtype, ", ".join(FLOATS)
            raise InputError("not a type of a norm", where=f"{path}, {name}", found=found, expected=expected)
    packed = {
        name: entry for entry in table.values() for name in entry.ours if header.tensors[entry.name].dtype in INT4
    }

    def int4(name: str) -> Int4:
        entry = packed[name]
        part = header.tensors[entry.name].rows(*entry.span(name))
        return Int4(*map(entry.half_split, _read_int4(data, part)))

    tensors = lazy_tensors(config, table, header.tensors, lambda name, part: _tensor(data, part))
    tokenizer = path if "tokenizer.ggml.model" in header.metadata else None
    kind, quantized, metadata = f"GGUF version {header.version}", LazyTensors(packed, int4), header.metadata
    stops, sampling = generation_config.gguf_stop_ids(metadata), generation_config.gguf_defaults(metadata)
    return ModelFile(path, kind, config, tensors, header.tensors, tokenizer, metadata, stops, quantized, sampling)


def _layout(config: ModelConfig, architecture: str) -> dict[str, Entry]:
    kind = ARCHITECTURES[architecture]
    return layout(config, {**NAMES, **kind.names}, kind.interleaved)


def _config(header: GGUFHeader, data: DataFile) -> ModelConfig:
    path, kind = data.path, header.get("general.architecture", str)
    if kind not in ARCHITECTURES or header.get(f"{kind}.expert_count", int, 0):
        what, where = "this architecture is not supported", f"{path}, general.architecture"
        # as the keys of config.json that tell of them
        told = {"num_experts": f"{kind}.expert_count", "state_size": f"{kind}.ssm.state_size"}
        found = with_lacking(kind, {name: header.get(key, int, 0) for name, key in told.items()})
        fix = "run it with llama.cpp"
        raise InputError(what, where=where, found=found, expected=", ".join(ARCHITECTURES), fix=fix)
    if header.get("split.count", int, 1) > 1:
        raise InputError("this is one shard of a split model", where=path, fix="merge it with llama-gguf-split --merge")
    if "token_embd.weight" not in header.tensors:
        raise InputError("the file has no model", where=path, expected="token_embd.weight", found="a vocabulary only")
    keys = {ours: f"{kind}.{key}" for ours, key in KEYS.items()}
    values: dict[str, Any] = {
        ours: header.get(key, float if ours in ("norm_eps", "rope_theta") else int, DEFAULTS.get(ours))
        for ours, key in keys.items()
    }
    values["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    values["norm_eps"] = _shortest(np.float32(values["norm_eps"]))
    values["tie_embeddings"] = "output.weight" not in header.tensors
    config = ModelConfig.from_keys({**values, **ARCHITECTURES[kind].fields}, path, keys)
    if config.rotary_dim == config.head_dim:
        config = replace(config, rotary_dim=0)
    scaling = _scaling(header, config, data, kind)
    config = config.changed({"rope_scaling": scaling}) if scaling else config
    factor = np.float32(gain(config)) if scaling and scaling["kind"] == "longrope" else 1.0
    known = {"attention.value_length": config.head_dim, "rope.scaling.attn_factor": factor}
    _refuse_others(header, NEUTRAL | known, path, kind)
    if config.rotary_dim and ARCHITECTURES[kind].interleaved:
        what, where = "rope of a part of the heads is not supported", f"{path}, {keys['rotary_dim']}"
        raise InputError(what, where=where, found=config.rotary_dim, expected=config.head_dim)
    return config.named(kind)


def _refuse_others(header: GGUFHeader, known: Mapping[str, Any], path: Path, architecture: str) -> None:
    """Refuse keys of another computation."""
    for key, neutral in known.items():
        found = header.metadata.get(f"{architecture}.{key}", neutral)
        if isinstance(found, np.ndarray) or found != neutral:
            where = f"{path}, {architecture}.{key}"
            raise InputError("this is not supported", where=where, found=str(found)[:80], expected=neutral)


def _shortest(value: np.float32) -> float:
    """Shortest decimal of a number that is float32 in the file: 1e-5, not 9.99999974e-06."""
    return float(str(value))


def architecture(config: ModelConfig) -> str:
    """Architecture of llama.cpp for a shape, "" where there is none."""
    kind = config.to_hf()["model_type"].replace("mistral", "llama")
    fields = ARCHITECTURES[kind].fields if kind in ARCHITECTURES else {"vocab_size": 0}
    is_scaled = kind != "llama" and config.rope_scaling is not None and config.rope_scaling.kind == "llama3"
    is_other = is_scaled or config.head != "lm"
    return "" if is_other or any(getattr(config, name) != value for name, value in fields.items()) else kind


def _scaling(header: GGUFHeader, config: ModelConfig, data: DataFile, architecture: str) -> dict[str, Any] | None:
    old = header.get(f"{architecture}.rope.scale_linear", float, 1.0)  # before November 2023
    factor = header.get(f"{architecture}.rope.scaling.factor", float, old) or 1.0
    kind = header.get(f"{architecture}.rope.scaling.type", str, "none" if factor == 1.0 else "linear")
    if LONG_FACTORS["long_factor"] in header.tensors:
        tensors = {ours: _tensor(data, header.tensors[name]).float() for ours, name in LONG_FACTORS.items()}
        factors = {ours: [_shortest(value) for value in tensor.numpy()] for ours, tensor in tensors.items()}
        original = header.get(f"{architecture}.rope.scaling.original_context_length", int)
        return {"kind": "longrope", "original_max_seq_len": original, **factors}
    if kind == "linear":
        return {"kind": "linear", "factor": factor}
    if kind != "none":
        where = f"{data.path}, {architecture}.rope.scaling.type"
        raise InputError("this rope scaling is not supported", where=where, found=kind, expected="none or linear")
    if ROPE_FREQS not in header.tensors:
        return None
    divisors = _tensor(data, header.tensors[ROPE_FREQS]).float().flatten()
    # The file has the divisors, and perhaps their context. Llama 3.1's bands are the only ones in use; they are tried.
    original = header.get(f"{architecture}.rope.scaling.original_context_length", int, 8192)
    scaling = {"kind": "llama3", "factor": float(divisors.max()), "original_max_seq_len": original}
    mine = rope_divisors(config.changed({"rope_scaling": scaling}))
    if mine is None or divisors.shape != mine.shape or not torch.allclose(divisors, mine, rtol=1e-3):
        where = f"{data.path}, {ROPE_FREQS}"
        raise InputError("these rotary divisors are not Llama 3.1's", where=where, found=divisors.tolist()[:8])
    return scaling


def _rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """Divisors of the rotary frequencies, by tensor name."""
    if config.rope_scaling is not None and config.is_longrope:
        return {name: torch.tensor(getattr(config.rope_scaling, ours)) for ours, name in LONG_FACTORS.items()}
    divisors = rope_divisors(config)
    return {} if divisors is None else {ROPE_FREQS: divisors}


def rope_divisors(config: ModelConfig) -> Tensor | None:
    """RoPE frequency divisors (E/2,) of llama3 scaling; None without it."""
    if config.rope_scaling is None or config.rope_scaling.kind != "llama3":
        return None
    plain = inverse_frequencies(config.head_dim, config.rope_theta)
    return plain / inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)


def _tensor(data: DataFile, info: Stored) -> Tensor:
    if info.dtype in FLOATS:
        return data.floats(info)
    package, rows = _package(), data.read(info).numpy().reshape(*info.shape[:-1], -1)
    try:
        return torch.from_numpy(package.dequantize(rows, package.GGMLQuantizationType[info.dtype]))
    except NotImplementedError:
        found = info.dtype
        raise InputError("the gguf package cannot dequantize this type", where=data.path, found=found) from None


def _read_int4(data: DataFile, info: Stored) -> Int4:
    """Int4 matrix of a tensor whose type is in `INT4`, exact in float32.

    Blocks of 32 inputs (ggml-org/ggml, src/ggml-common.h): Q4_0 is d (float16) and 16 bytes, w = d (b - 8); Q4_1 is d,
    m (float16) and 16 bytes, w = d b + m. Byte j has b of input j in its low half, that of input j + 16 in its high.
    """
    rows, inputs = info.shape
    shape = rows, inputs // GROUP, info.size // (rows * inputs // GROUP)
    blocks = data.read(info).view(shape)
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
    kind = architecture(config)
    check_writable({*tensors, *(int4 or {})}, config, "" if kind else "GGUF, as it is written here,")
    gguf = _package()
    writer = gguf.GGUFWriter(path, kind)
    _write_metadata(writer, config, vocabulary, dtype, name)
    factors = _rope_factors(config)
    entries = [Entry(name, tuple(t.shape), ("pairs",), {name: tuple(t.shape)}) for name, t in factors.items()]
    entries += _layout(config, kind).values()
    kinds = [_kind(gguf, entry, dtype) for entry in entries]
    for entry, kind in zip(entries, kinds, strict=True):
        block, width = gguf.GGML_QUANT_SIZES[kind]
        size = math.prod(entry.shape) // block * width
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry, kind in zip(entries, kinds, strict=True):
        source = factors if entry.name in factors else tensors
        writer.write_tensor_data(_data(gguf, entry, kind, source, int4 or {}))
    writer.close()


def _data(gguf: Any, entry: Entry, kind: Any, tensors: Mapping[str, Tensor], int4: Mapping[str, Int4]) -> Any:
    """A tensor's bytes or values."""
    if kind == gguf.GGMLQuantizationType.Q4_1:
        numbers = Int4.stacked(int4.get(ours) or Int4.of(tensors[ours].detach().cpu()) for ours in entry.ours)
        return _q4_1_bytes(Int4(*map(entry.interleaved, numbers)))
    tensor = entry.pack(tensors).detach().cpu()
    if kind == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > 65504:
        found = f"{tensor.abs().max().item():g}"
        raise InputError(
            "a value is too large for float16", where=next(iter(entry.ours)), found=found, fix="choose bf16 or f32"
        )
    return gguf.quants.quantize(tensor.float().contiguous().numpy(), kind)


def _write_metadata(writer: Any, config: ModelConfig, vocabulary: Mapping[str, Any], dtype: DType, name: str) -> None:
    writer.add_name(name)
    writer.add_file_type(DTYPES[dtype])
    if dtype.startswith("q"):
        writer.add_quantization_version(_package().GGML_QUANT_VERSION)
    values = {key: getattr(config, ours) for ours, key in KEYS.items()} | {"attention.value_length": config.head_dim}
    values |= {KEYS["rope_theta"]: config.to_hf()["rope_theta"]}  # that of ntk scaling is larger
    values |= {KEYS["rotary_dim"]: config.rotary_width}
    if not config.sliding_window:
        del values[KEYS["sliding_window"]]
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if scaling is not None and scaling.kind in ("longrope", "llama3"):
        values |= {"rope.scaling.original_context_length": scaling.original_max_seq_len}
    if scaling is not None and scaling.kind == "longrope":
        values |= {"rope.scaling.attn_factor": gain(config)}
    values = {f"{architecture(config)}.{key}": value for key, value in values.items()}
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in {**values, **vocabulary}.items():
        adders.get(type(value), writer.add_array)(key, value)


def _kind(gguf: Any, entry: Entry, dtype: DType) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(entry.shape) == 1:
        return kinds.F32
    kind = kinds.Q8_0 if dtype == "q4_1" and V in entry.axes else kinds[dtype.upper()]
    return kinds.F16 if entry.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind
