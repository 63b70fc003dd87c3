"""Meta checkpoint folder: params.json, consolidated.NN.pth (one per tensor-parallel rank), tokenizer.model."""

from __future__ import annotations

import json
import math
import pickle
import re
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.config import ModelConfig, RopeScaling
from minillama.config.parameters import split_axis
from minillama.errors import InputError
from minillama.files import read_json
from minillama.formats import generation_config
from minillama.formats.data_file import DataFile
from minillama.formats.layout import check_tensors, check_writable, is_same, layout, lazy_tensors
from minillama.formats.model_file import FLOATS, ModelFile
from minillama.formats.stored import Stored

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
PARAMS = "params.json"
LLAMA_3_2 = ((2048, 16), (3072, 28))  # 1B and 3B, whose rope factor params.json leaves out
_SAFE_TORCH = (2, 10)  # CVE-2025-32434, CVE-2026-24747


def read(folder: Path) -> ModelFile:
    """Open a folder of one or several ranks.

    The .pth files are pickles: they are read by torch's restricted unpickler, which builds tensors alone.

    Raises:
        InputError: a file is missing or damaged, a .pth holds anything but tensors, or the shapes disagree.
    """
    paths = sorted(folder.glob("consolidated.*.pth"))
    if not paths:
        raise InputError("no weights in the model folder", where=folder, expected="consolidated.00.pth")
    if paths != [folder / f"consolidated.{i:02}.pth" for i in range(len(paths))]:
        raise InputError("a rank's file is missing", where=folder, found=", ".join(path.name for path in paths))
    files, ranks = [DataFile.of(path) for path in paths], [_load(path) for path in paths]
    _compare_ranks(paths, ranks)
    config = _config(folder, ranks)
    table = layout(config, NAMES, interleaved=True)
    axes = {name: split_axis(entry.axes) for name, entry in table.items()}
    axes[EMBEDDING] = _embedding_axis(ranks, config.dim)
    shapes = {
        name: tuple(n * len(ranks) if i == axes.get(name) else n for i, n in enumerate(tensor.shape))
        for name, tensor in ranks[0].items()
    }
    check_tensors(table, shapes, folder, {"rope.freqs", *([HEAD] if config.tie_embeddings else [])})
    kinds = {dtype: name for name, dtype in FLOATS.items()}
    stored = {
        f"{path.name}: {name}": Stored(kinds[tensor.dtype], tuple(tensor.shape))
        for path, rank in zip(paths, ranks, strict=True)
        for name, tensor in rank.items()
    }
    whole = {name: Stored("", shape) for name, shape in shapes.items()}

    def tensor(name: str, _: Stored) -> Tensor:
        for file in files:
            file.check()  # torch maps the files
        return _whole(ranks, name, axes[name]).clone()

    tensors = lazy_tensors(config, table, whole, tensor)
    tokenizer, kind = folder / "tokenizer.model", f"Meta folder, {len(paths)} ranks"
    # not Meta's: written beside by `convert`
    stops, sampling = generation_config.stop_ids(folder), generation_config.defaults(folder)
    own = tokenizer if tokenizer.exists() else None
    return ModelFile(folder, kind, config, tensors, stored, own, {}, stops, sampling=sampling)


def _embedding_axis(ranks: list[dict[str, Tensor]], dim: int) -> int:
    """Llama 3 splits the embedding by rows, as the head; Llama 1 and 2 by columns."""
    return 0 if ranks[0][EMBEDDING].shape[-1] == dim else 1


def _compare_ranks(paths: list[Path], ranks: list[dict[str, Tensor]]) -> None:
    first = {name: tuple(tensor.shape) for name, tensor in ranks[0].items()}
    for path, rank in zip(paths, ranks, strict=True):
        shapes = {name: tuple(tensor.shape) for name, tensor in rank.items()}
        odd = sorted(name for name in first | shapes if first.get(name) != shapes.get(name))
        if odd:
            found, expected = (f"{table.get(odd[0], 'no tensor')}" for table in (shapes, first))
            raise InputError("the ranks disagree", where=f"{path}, {odd[0]}", found=found, expected=expected)


def _load(path: Path) -> dict[str, Tensor]:
    _check_zip(path)
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        what, fix = "this torch reads pickles unsafely", "install torch 2.10 or newer"
        raise InputError(what, found=torch.__version__, fix=fix)
    try:
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = str(error).strip().splitlines()[0][:200]
        raise InputError("the file holds more than tensors, and was not opened", where=path, found=found) from None
    except Exception as error:  # a damaged archive raises exceptions of any type
        found = f"{type(error).__name__}: {str(error).strip()[:200]}"
        raise InputError("not a readable .pth file", where=path, found=found) from None
    if not isinstance(table, dict):
        raise InputError("the file is not a table of tensors", where=path)
    for name, tensor in table.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise InputError("not a dense tensor with all values in the file", where=f"{path}, {str(name)[:80]}")
    return table


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is as Meta writes it: dense, with all values in the file (a stride of 0 repeats one)."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"  # and not "meta", which has no values
        and tensor.dtype in FLOATS.values()
        and tensor.dim() in (1, 2)
        and tensor.is_contiguous()
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def _check_zip(path: Path) -> None:
    """Check of the zip archive that a .pth is: nothing is unpacked, and a forged one is not passed to torch."""
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise InputError("not a .pth file, or cut short", where=path, found=error, expected="a zip archive") from None
    for entry in entries:
        where, parts = f"{path}, {entry.filename}", re.split(r"[\\/]", entry.filename)
        if ".." in parts or entry.filename.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", entry.filename):
            raise InputError("an entry of the archive leads out of it", where=where)
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise InputError("an entry of the archive is a link", where=where)
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size:
            found = f"{entry.compress_size} bytes that become {entry.file_size}"
            raise InputError("an entry of the archive is compressed, which torch never does", where=where, found=found)


def _whole(ranks: list[dict[str, Tensor]], name: str, axis: int | None) -> Tensor:
    parts = [rank[name] for rank in ranks]
    return parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)


def _config(folder: Path, ranks: list[dict[str, Tensor]]) -> ModelConfig:
    path = folder / PARAMS
    params = read_json(path)
    try:
        dim, n_layers, n_heads = int(params["dim"]), int(params["n_layers"]), int(params["n_heads"])
        scaled = bool(params.get("use_scaled_rope"))
        theta, axis = float(params.get("rope_theta", 10000.0)), _embedding_axis(ranks, dim)
        values: dict[str, Any] = {
            "dim": dim,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": params.get("n_kv_heads") or n_heads,
            "hidden_dim": len(ranks) * ranks[0]["layers.0.feed_forward.w1.weight"].shape[0],
            "vocab_size": ranks[0][EMBEDDING].shape[0] * (len(ranks) if axis == 0 else 1),
            # absent from params.json: Llama 1 and 2 share their keys, Llama 3 and 3.1 differ
            "max_seq_len": 131072 if scaled else 8192 if theta == 500000.0 else 2048,
            "norm_eps": float(params.get("norm_eps", 1e-5)),
            "rope_theta": theta,
            "tie_embeddings": _is_tied(ranks, axis),
        }
        if scaled:
            values["rope_scaling"] = {
                "kind": "llama3",
                "factor": float(params.get("rope_scaling_factor") or (32.0 if (dim, n_layers) in LLAMA_3_2 else 8.0)),
                "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
            }
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise InputError("not a readable params.json", where=path, found=found) from None
    return ModelConfig.from_keys(values, path)


def _is_tied(ranks: list[dict[str, Tensor]], axis: int) -> bool:
    """Whether the head is absent or a copy of the embedding, which may be sharded by another axis."""
    if HEAD not in ranks[0]:
        return True
    # the first value, so that both are read in full only where they may be equal
    first = torch.equal(ranks[0][HEAD][0, :1], ranks[0][EMBEDDING][0, :1])
    return first and is_same(_whole(ranks, HEAD, 0), _whole(ranks, EMBEDDING, axis))


def write(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    ranks: int = 1,
) -> None:
    """Write params.json and consolidated.NN.pth. A tied head is written twice, as Meta's code reads it.

    Args:
        tensors: by Hugging Face name; each is read once.
        dtype: convert to this; as they are unless given.
        ranks: number of files, each with its shard of heads, widths and columns.

    Raises:
        InputError: params.json cannot express the shape, or the ranks do not divide it.
    """
    check_writable(tensors, config, "Meta's layout")
    if any(number % ranks for number in (config.n_heads, config.n_kv_heads, config.hidden_dim, config.vocab_size)):
        expected = "a number that divides heads, key/value heads, hidden_dim and vocab_size"
        raise InputError("the ranks do not divide the shape", where="ranks", found=ranks, expected=expected)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PARAMS).write_text(json.dumps(_params(config), indent=2) + "\n", encoding="utf-8")
    table = layout(config, NAMES, interleaved=True)
    files: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    heads: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    for name, entry in table.items():
        tensor = entry.pack(tensors).detach().to("cpu", dtype)
        _split(files, name, tensor, 1 if name == EMBEDDING else split_axis(entry.axes))
        if name == EMBEDDING and config.tie_embeddings:
            _split(heads, HEAD, tensor, 0)
    for rank, (file, head) in enumerate(zip(files, heads, strict=True)):
        with open(folder / f"consolidated.{rank:02}.pth", "wb") as stream:  # whose errors are the system's
            torch.save(file | head, stream)


def _split(files: list[dict[str, Tensor]], name: str, tensor: Tensor, axis: int | None) -> None:
    parts = [tensor] * len(files) if axis is None else tensor.chunk(len(files), dim=axis)
    for file, part in zip(files, parts, strict=True):
        file[name] = part.contiguous().clone()  # its own storage: torch.save writes all of a shared one


def _params(config: ModelConfig) -> dict[str, Any]:
    what, scaling = "Meta's params.json cannot express this", config.rope_scaling
    if config.head_dim * config.n_heads != config.dim:
        raise InputError(what, where="head_dim", found=f"{config.head_dim}, which is not dim / n_heads")
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps")
    params = {key: getattr(config, key) for key in keys} | {"rope_theta": config.to_hf()["rope_theta"]}
    params |= _width(config.dim, config.hidden_dim)
    if scaling is None or scaling.kind == "ntk":  # ntk is a larger base
        return params
    if scaling != RopeScaling("llama3", scaling.factor, high_freq_factor=scaling.high_freq_factor):
        raise InputError(what, where="rope_scaling", found=scaling)
    params |= {"use_scaled_rope": True, "rope_scaling_factor": scaling.factor}
    return params | {"rope_high_freq_factor": scaling.high_freq_factor}


def _width(dim: int, hidden_dim: int) -> dict[str, Any]:
    """Keys multiple_of and ffn_dim_multiplier, by which Meta's rule gives exactly this feed-forward width.

    The rule: int(8 dim / 3), times the multiplier, rounded up to a multiple (llama/model.py, FeedForward).
    """
    base = int(8 * dim / 3)
    multiple = math.gcd(hidden_dim, 256)
    if multiple * -(-base // multiple) == hidden_dim:
        return {"multiple_of": multiple}
    # the midpoint of the widths that round up to this one
    return {"multiple_of": multiple, "ffn_dim_multiplier": (hidden_dim - multiple // 2 + 0.5) / base}
