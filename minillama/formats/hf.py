"""Hugging Face model folders: config.json, generation_config.json, one or several safetensors files."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.files import read_json, replace_file, replace_text
from minillama.formats import generation_config
from minillama.formats.data_file import DataFile
from minillama.formats.layout import Entry, check_tensors, check_writable, is_same, layout, lazy_tensors, rename
from minillama.formats.model_file import ModelFile
from minillama.formats.peft_config import CONFIG as ADAPTER
from minillama.formats.peft_config import adapter_error
from minillama.formats.safetensors_file import save_file
from minillama.formats.safetensors_header import read_header, refuse_integers
from minillama.formats.stored import Stored

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# model_type -> parts of LLaMA's names -> those of transformers' other models
NAMES: Mapping[str, Mapping[str, str]] = {
    "phi3": {
        "self_attn.q_proj": "self_attn.qkv_proj",
        "self_attn.k_proj": "self_attn.qkv_proj",
        "self_attn.v_proj": "self_attn.qkv_proj",
        "mlp.gate_proj": "mlp.gate_up_proj",
        "mlp.up_proj": "mlp.gate_up_proj",
    },
    "bloom": {
        "model.embed_tokens": "transformer.word_embeddings",
        "model.embed_norm": "transformer.word_embeddings_layernorm",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "self_attn.q_proj": "self_attention.query_key_value",
        "self_attn.k_proj": "self_attention.query_key_value",
        "self_attn.v_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    "rwkv": {
        "model.embed_tokens": "rwkv.embeddings",
        "model.embed_norm": "rwkv.blocks.0.pre_ln",
        "model.norm": "rwkv.ln_out",
        "model.layers": "rwkv.blocks",
        "lm_head": "head",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
        "self_attn": "attention",
        "mlp": "feed_forward",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "output",
        "r_proj": "receptance",
        "up_proj": "key",
        "down_proj": "value",
    },
}


def read(folder: Path) -> ModelFile:
    """Open a model folder. Each tensor is read from its own shard.

    Raises:
        InputError: a file is missing, damaged or a pickle; an index that leads out of the folder; tensors
            that are not those of config.json.
    """
    config = ModelConfig.load(folder)
    try:
        return _read(folder, config)
    except InputError as error:
        quantized = read_json(folder / "config.json").get("quantization_config")
        if not quantized:
            raise
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        what, found = "weights quantized in this way are not read", f"{method or quantized}; {error.what}"
        fix = "give the model before its quantization, or a GGUF file of it"
        raise InputError(what, where=f"{folder / 'config.json'}, quantization_config", found=found, fix=fix) from None


def _read(folder: Path, config: ModelConfig) -> ModelFile:
    stored: dict[str, Stored] = {}
    shards: dict[str, DataFile] = {}
    for shard, listed in _shards(folder).items():
        data, header = DataFile.of(shard), read_header(shard)
        if listed is not None and set(header) != listed:
            odd = sorted(set(header) ^ listed)
            raise InputError(f"the shard does not hold what {INDEX} lists", where=shard, found=", ".join(odd[:12]))
        stored |= header
        shards |= dict.fromkeys(header, data)
    # old conversions stored the rotary frequencies
    ignored = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
    names = NAMES.get(config.to_hf()["model_type"], {})
    if not any(name.startswith("transformer.") for name in stored):  # BLOOM's first files lack the prefix
        names = {ours: theirs.removeprefix("transformer.") for ours, theirs in names.items()}
    head, embedding = (rename(name, names) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if config.tie_embeddings and head in stored and embedding in stored:  # transformers may store a tied head twice
        pair = {name: stored[name] for name in (head, embedding)}
        refuse_integers(pair, folder)
        if is_same(*(shards[name].floats(item) for name, item in pair.items())):
            ignored.add(head)
        else:
            config = replace(config, tie_embeddings=False)
            print(
                f"{folder}: config.json ties {head} to the embedding, but they differ; both are used", file=sys.stderr
            )
    table = layout(config, names)
    check_tensors(table, {name: item.shape for name, item in stored.items()}, folder, ignored)
    refuse_integers({name: stored[name] for name in table}, folder)
    tokenizer = folder if any((folder / name).exists() for name in TOKENIZERS) else None
    tensors = lazy_tensors(config, table, stored, lambda name, part: shards[name].floats(part))
    stops, sampling = generation_config.stop_ids(folder), generation_config.defaults(folder)
    return ModelFile(folder, "Hugging Face folder", config, tensors, stored, tokenizer, {}, stops, sampling=sampling)


def _shards(folder: Path) -> Mapping[Path, set[str] | None]:
    """Every weight file, with the tensors that the index lists for it."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():  # as transformers: an index beside it is of an earlier save
        return {folder / WEIGHTS: None}
    if not index.exists():
        pickles = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            what = "the weights are a pickle, which can run any code when it is opened"
            fix = "ask for safetensors, or convert it with transformers if you trust where it came from"
            raise InputError(what, where=pickles[0], expected=WEIGHTS, fix=fix)
        if (folder / ADAPTER).exists():
            raise adapter_error(folder)
        raise InputError("no weights in the model folder", where=folder, expected=f"{WEIGHTS} or {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError("not a readable index", where=index, found=weight_map, expected="a table weight_map")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+", shard) or shard in (".", ".."):
            what, where = "the index leads out of its folder", f"{index}, {name}"
            raise InputError(what, where=where, found=shard, expected="a plain file name")
        shards.setdefault(folder / shard, set()).add(name)
    files = {path for path in shards if os.path.isfile(path)}  # False for a name that no file can have, too
    odd = {"missing": shards.keys() - files, "extra": set(folder.glob("model-*-of-*.safetensors")) - files}
    names = {word: ", ".join(sorted(path.name for path in paths)) for word, paths in odd.items() if paths}
    found = "; ".join(f"{word}: {listed}" for word, listed in names.items())
    if found:
        raise InputError(f"the shards are not those of {INDEX}", where=folder, found=found)
    return shards


def write(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Write config.json and the weights, one shard in memory at a time.

    Args:
        tensors: by Hugging Face name; each is read once.
        dtype: convert to this; as they are unless given.
        max_shard_size: bytes a file at most, unless one tensor is larger.

    Raises:
        InputError: tensors that a model of this shape does not have, such as an adapter's.
    """
    check_writable(tensors, config)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = dtype or next(iter(tensors.values())).dtype
    values = config.to_hf(str(dtype).removeprefix("torch."))
    _write_json(folder / "config.json", values)
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in layout(config, NAMES.get(values["model_type"], {})).values():
        size = math.prod(entry.shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        part = {}
        for entry in shard:
            part[entry.name] = entry.pack(tensors).detach().to("cpu", dtype).contiguous()
            weight_map[entry.name] = file
        replace_file(folder / file, partial(save_file, part, metadata={"format": "pt"}))
    stale = {path.name for path in folder.glob("model*.safetensors")} - set(weight_map.values())
    for name in (*stale, INDEX):
        (folder / name).unlink(missing_ok=True)  # of an earlier save: readers would prefer it
    if len(shards) > 1:
        total = {"total_size": config.num_params() * dtype.itemsize}
        _write_json(folder / INDEX, {"metadata": total, "weight_map": weight_map})


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5000000, "500MB" or "5GB" (powers of 1000) or "1GiB" (of 1024).

    Raises:
        InputError: no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", str(size).strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        expected = "bytes as a number, or such as 500MB or 5GB"
        raise InputError("not a size", where="max_shard_size", found=size, expected=expected)
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=2) + "\n")
