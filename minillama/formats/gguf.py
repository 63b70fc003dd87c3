"""GGUF files of llama.cpp, architecture `llama`: reading and writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minillama.config import ModelConfig, RopeScaling
from minillama.errors import InputError
from minillama.formats import generation_config
from minillama.formats.gguf_blocks import INT4, q4_1_bytes, read_int4
from minillama.formats.gguf_header import GGUFHeader, TensorInfo, read_header
from minillama.formats.hf_names import refuse_relatives, refuse_unknown
from minillama.formats.model_file import LazyTensors, ModelFile, Stored, check_tensors
from minillama.formats.rope_rows import rotary_heads, to_half_split, to_interleaved
from minillama.layers.int4 import Int4
from minillama.layers.rope import inverse_frequencies

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
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


def name_in_file(name: str) -> str:
    """GGUF name of a parameter: `model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`."""
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER[rest.removesuffix('.weight')]}.weight"


def read(path: Path) -> ModelFile:
    """Open a file. Tensors are memory-mapped, and dequantized to float32 when they are read.

    Raises:
        InputError: not a GGUF file, a damaged or a forged one, another architecture, or tensors that do
            not match its metadata.
    """
    header = read_header(path)
    config = _config(header, path)
    names = {name: name_in_file(name) for name in config.tensors()}
    back = {theirs: ours for ours, theirs in names.items()}
    found = {back.get(name, name): info.shape for name, info in header.tensors.items()}
    check_tensors(config.tensors(), found, path, frozenset({ROPE_FREQS}))
    tensors = LazyTensors(
        {
            ours: partial(_tensor, path, header.tensors[theirs], rotary_heads(config, ours))
            for ours, theirs in names.items()
        }
    )
    int4 = LazyTensors(
        {
            ours: partial(_int4, path, header.tensors[theirs], rotary_heads(config, ours))
            for ours, theirs in names.items()
            if header.tensors[theirs].dtype in INT4
        }
    )
    stored = {name: Stored(info.dtype, info.shape) for name, info in header.tensors.items()}
    tokenizer = path if "tokenizer.ggml.model" in header.metadata else None
    metadata, name = header.metadata, f"GGUF version {header.version}"
    stops, sampling = generation_config.gguf_stop_ids(metadata), generation_config.gguf_defaults(metadata)
    return ModelFile(path, name, config, tensors, stored, tokenizer, metadata, stops, int4, sampling)


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
    try:
        base = ModelConfig.from_table(values)
        scaling = _scaling(header, base, path)
        return base.changed({"rope_scaling": scaling}) if scaling else base
    except InputError as error:
        if error.where is not None and str(path) in str(error.where):
            raise
        where = f"{path}, llama.{KEYS.get(str(error.where), str(error.where))}"
        raise error.at(where) from None


def _scaling(header: GGUFHeader, config: ModelConfig, path: Path) -> dict[str, Any] | None:
    kind = header.get("llama.rope.scaling.type", str, "none")
    if kind == "linear":
        return {"kind": "linear", "factor": header.get("llama.rope.scaling.factor", float, 1.0)}
    if kind != "none":
        where = f"{path}, llama.rope.scaling.type"
        raise InputError("this rope scaling is not supported", where=where, found=kind, expected="none or linear")
    if ROPE_FREQS not in header.tensors:
        return None
    divisors = _tensor(path, header.tensors[ROPE_FREQS], None).float().flatten()
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


def _tensor(path: Path, info: TensorInfo, heads: int | None) -> Tensor:
    if info.dtype in _PLAIN:
        numbers, dtype = _PLAIN[info.dtype]
        data = np.memmap(path, numbers, "c", info.start, info.shape)
        tensor = torch.from_numpy(data).view(dtype)
    else:
        quants, kind = _package(), _package().GGMLQuantizationType[info.dtype]
        data = np.memmap(
            path, np.uint8, "r", info.start, (*info.shape[:-1], info.size // int(np.prod(info.shape[:-1])))
        )
        try:
            tensor = torch.from_numpy(quants.dequantize(data, kind))
        except NotImplementedError:
            found = info.dtype
            raise InputError("the gguf package cannot dequantize this type", where=path, found=found) from None
    return to_half_split(tensor, heads) if heads else tensor


def _int4(path: Path, info: TensorInfo, heads: int | None) -> Int4:
    numbers = read_int4(path, info)
    return Int4(*(to_half_split(tensor, heads) for tensor in numbers)) if heads else numbers


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
    refuse_relatives(config, "GGUF, as it is written here,")
    refuse_unknown(tensors, config)
    gguf = _package()
    writer = gguf.GGUFWriter(path, "llama")
    _write_metadata(writer, config, vocabulary, dtype, name)
    kinds = {ours: _kind(gguf, ours, shape, dtype) for ours, shape in config.tensors().items()}
    divisors = rope_divisors(config)
    if divisors is not None:
        writer.add_tensor_info(ROPE_FREQS, divisors.shape, np.dtype(np.float32), divisors.nbytes)
    for ours, shape in config.tensors().items():
        block, width = gguf.GGML_QUANT_SIZES[kinds[ours]]
        size = torch.Size(shape).numel() // block * width
        writer.add_tensor_info(name_in_file(ours), shape, np.dtype(np.float32), size, kinds[ours])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors is not None:
        writer.write_tensor_data(divisors.numpy())
    for ours, kind in kinds.items():
        heads = rotary_heads(config, ours)
        if kind == gguf.GGMLQuantizationType.Q4_1:
            numbers = (int4 or {}).get(ours) or Int4.of(tensors[ours].detach().cpu())
            writer.write_tensor_data(q4_1_bytes(_interleaved(numbers, heads)))
        else:
            writer.write_tensor_data(_data(gguf, ours, tensors[ours].detach().cpu(), kind, heads))
        progress(ours)
    writer.close()


def _interleaved(numbers: Int4, heads: int | None) -> Int4:
    return Int4(*(to_interleaved(tensor, heads) for tensor in numbers)) if heads else numbers


def _data(gguf: Any, ours: str, tensor: Tensor, kind: Any, heads: int | None) -> Any:
    if kind == gguf.GGMLQuantizationType.F16 and tensor.abs().max() > 65504:
        found = f"{tensor.abs().max().item():g}"
        raise InputError("a value is too large for float16", where=ours, found=found, fix="choose bf16 or f32")
    tensor = to_interleaved(tensor, heads) if heads else tensor
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


def _kind(gguf: Any, ours: str, shape: tuple[int, ...], dtype: DType) -> Any:
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    kind = kinds.Q8_0 if dtype == "q4_1" and ours in TOP else kinds[dtype.upper()]
    return kinds.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _write_scaling(writer: Any, scaling: RopeScaling | None) -> None:
    if scaling is not None and scaling.kind == "linear":
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", scaling.factor)


def _add(writer: Any, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)
