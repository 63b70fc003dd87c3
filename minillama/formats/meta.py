"""Meta checkpoint folder: params.json, consolidated.NN.pth (one per tensor-parallel rank), tokenizer.model."""

from __future__ import annotations

import json
import math
import pickle
import re
import stat
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minillama.config import ModelConfig, RopeScaling
from minillama.errors import InputError
from minillama.formats.layout import Entry, by_parameter, check_tensors, check_writable, layout
from minillama.formats.model_file import LazyTensors, ModelFile, Stored, optional

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
    numbers = [path.name.split(".")[1] for path in paths]
    if numbers != [f"{i:02}" for i in range(len(paths))]:
        raise InputError("a rank's file is missing", where=folder, found=", ".join(path.name for path in paths))
    ranks = [_load(path) for path in paths]
    _compare_ranks(paths, ranks)
    config = _config(folder, ranks)
    entries = by_parameter(layout(config, NAMES, interleaved=True))
    axes = _axes(config, entries, _embedding_axis(ranks, config.dim))
    shapes = {name: _whole_shape(ranks, name, axes.get(name)) for name in ranks[0]}
    ignored = {"rope.freqs", *([HEAD] if config.tie_embeddings else [])}
    check_tensors({entry.name: entry for entry in entries.values()}, shapes, folder, ignored)

    def tensor(ours: str) -> Tensor:
        entry = entries[ours]
        return entry.unpack(_whole(ranks, entry.name, axes[entry.name]), ours)

    kinds = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    stored = {
        f"{path.name}: {name}": Stored(kinds.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for path, rank in zip(paths, ranks, strict=True)
        for name, tensor in rank.items()
    }
    tensors, tokenizer = LazyTensors(entries, tensor), optional(folder / "tokenizer.model")
    return ModelFile(folder, f"Meta folder, {len(paths)} ranks", config, tensors, stored, tokenizer, {})


def _axes(config: ModelConfig, entries: Mapping[str, Entry], embedding_axis: int) -> dict[str, int | None]:
    """Axis of each tensor of a file that is split over the ranks."""
    axes = {entries[name].name: row.split_axis for name, row in config.parameters().items()}
    return axes | {EMBEDDING: embedding_axis}


def _embedding_axis(ranks: list[dict[str, Tensor]], dim: int) -> int:
    """Llama 3 splits the embedding by rows, as the head; Llama 1 and 2 by columns."""
    return 0 if ranks[0][EMBEDDING].shape[-1] == dim else 1


def _compare_ranks(paths: list[Path], ranks: list[dict[str, Tensor]]) -> None:
    for path, rank in zip(paths, ranks, strict=True):
        for name in set(rank) & set(ranks[0]):
            if rank[name].shape != ranks[0][name].shape:
                found, expected = tuple(rank[name].shape), tuple(ranks[0][name].shape)
                raise InputError("the ranks disagree", where=f"{path}, {name}", found=found, expected=expected)
        if set(rank) != set(ranks[0]):
            odd = sorted(set(rank) ^ set(ranks[0]))[:8]
            raise InputError("the ranks do not hold the same tensors", where=path, found=", ".join(odd))


def _load(path: Path) -> dict[str, Tensor]:
    _check_zip(path)
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < _SAFE_TORCH:
        raise InputError(
            "this torch reads pickles unsafely", found=torch.__version__, fix="install torch 2.10 or newer"
        )
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
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_sound(tensor):
            raise InputError("not a dense tensor with all values in the file", where=f"{path}, {str(name)[:80]}")
    return table


def _is_sound(tensor: Tensor) -> bool:
    """Whether a tensor is as Meta writes it: dense, with all values in the file (a stride of 0 repeats one)."""
    return (
        tensor.layout == torch.strided
        and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
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


def _whole_shape(ranks: list[dict[str, Tensor]], name: str, axis: int | None) -> tuple[int, ...]:
    shape = list(ranks[0][name].shape)
    if axis is not None and axis < len(shape):
        shape[axis] = sum(rank[name].shape[axis] for rank in ranks)
    return tuple(shape)


def _whole(ranks: list[dict[str, Tensor]], name: str, axis: int | None) -> Tensor:
    parts = [rank[name] for rank in ranks]
    return parts[0] if axis is None or len(parts) == 1 else torch.cat(parts, dim=axis)


def _config(folder: Path, ranks: list[dict[str, Tensor]]) -> ModelConfig:
    path = folder / PARAMS
    try:
        params = json.loads(path.read_text(encoding="utf-8"))
        dim, n_layers, n_heads = int(params["dim"]), int(params["n_layers"]), int(params["n_heads"])
        scaled = bool(params.get("use_scaled_rope"))
        theta, axis = float(params.get("rope_theta", 10000.0)), _embedding_axis(ranks, dim)
        values: dict[str, Any] = {
            "dim": dim,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": params.get("n_kv_heads") or n_heads,
            "hidden_dim": _whole_shape(ranks, "layers.0.feed_forward.w1.weight", 0)[0],
            "vocab_size": _whole_shape(ranks, EMBEDDING, axis)[0],
            "max_seq_len": _context(theta, scaled),
            "norm_eps": float(params.get("norm_eps", 1e-5)),
            "rope_theta": theta,
            "tie_embeddings": _is_tied(ranks, axis),
        }
        if scaled:
            values["rope_scaling"] = {
                "kind": "llama3",
                "factor": float(params.get("rope_scaling_factor") or 8.0),
                "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
            }
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        found = f"{type(error).__name__}: {error}"[:200]
        raise InputError("not a readable params.json", where=path, found=found) from None
    return ModelConfig.from_keys(values, path)


def _is_tied(ranks: list[dict[str, Tensor]], axis: int) -> bool:
    """Whether the head is absent or a copy of the embedding, which may be sharded by another axis."""
    if HEAD not in ranks[0]:
        return True
    if _whole_shape(ranks, HEAD, 0)[0] != _whole_shape(ranks, EMBEDDING, axis)[0]:
        return False
    first = ranks[0][HEAD][0, :1], ranks[0][EMBEDDING][0, :1]
    if not torch.equal(*first):  # so that both are read in full only where they may be equal
        return False
    return torch.equal(_whole(ranks, HEAD, 0), _whole(ranks, EMBEDDING, axis))


def _context(theta: float, scaled: bool) -> int:
    """Context length, absent from params.json: Llama 1 and 2 share their keys, Llama 3 and 3.1 differ."""
    if scaled:
        return 131072
    return 8192 if theta == 500000.0 else 2048


def write(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    ranks: int = 1,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write params.json and consolidated.NN.pth. A tied head is written twice, as Meta's code reads it.

    Args:
        folder: created if absent.
        config: the shape.
        tensors: by Hugging Face name.
        dtype: convert to this; as they are unless given.
        ranks: number of files, each with its shard of heads, widths and columns.
        progress: called with each name.

    Raises:
        InputError: params.json cannot express the shape, or the ranks do not divide it.
    """
    check_writable(tensors, config, "Meta's layout")
    if any(number % ranks for number in (config.n_heads, config.n_kv_heads, config.hidden_dim, config.vocab_size)):
        expected = "a number that divides heads, key/value heads, hidden_dim and vocab_size"
        raise InputError("the ranks do not divide the shape", where="ranks", found=ranks, expected=expected)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PARAMS).write_text(json.dumps(_params(config), indent=2) + "\n", encoding="utf-8")
    tables: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
    entries = by_parameter(layout(config, NAMES, interleaved=True))
    axes = _axes(config, entries, 1)
    for entry in entries.values():
        tensor = entry.pack(tensors).detach().to("cpu", dtype)
        axis = axes[entry.name]
        parts = [tensor] * ranks if axis is None else tensor.chunk(ranks, dim=axis)
        for table, part in zip(tables, parts, strict=True):
            table[entry.name] = part.contiguous().clone()  # its own storage: torch.save writes all of a shared one
        progress(entry.name)
    if config.tie_embeddings:
        for table, part in zip(
            tables, tensors["model.embed_tokens.weight"].detach().to("cpu", dtype).chunk(ranks), strict=True
        ):
            table["output.weight"] = part.contiguous().clone()
    for rank, table in enumerate(tables):
        torch.save(table, folder / f"consolidated.{rank:02}.pth")


def _params(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    faults = {
        "head_dim": config.head_dim * config.n_heads != config.dim and f"{config.head_dim}, which is not dim / n_heads",
        "rope_scaling": scaling is not None and not _is_meta_scaling(scaling) and scaling,
    }
    for field, found in faults.items():
        if found:
            raise InputError("Meta's params.json cannot express this", where=field, found=found)
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.norm_eps,
        "rope_theta": config.to_hf()["rope_theta"],
        **_width(config.dim, config.hidden_dim),
    }
    if scaling is not None and scaling.kind == "llama3":
        params |= {"use_scaled_rope": True, "rope_scaling_factor": scaling.factor}
        params |= {"rope_high_freq_factor": scaling.high_freq_factor}
    return params


def _is_meta_scaling(scaling: RopeScaling) -> bool:
    """Whether params.json has it: Llama 3.1's bands but for the upper one; `ntk` is a larger base, without a key."""
    return scaling.kind == "ntk" or (
        scaling.kind == "llama3" and scaling.low_freq_factor == 1 and scaling.original_max_seq_len == 8192
    )


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
