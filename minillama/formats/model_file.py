"""Opened model file: configuration, lazily read tensors, tokenizer path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.layers.int4 import Int4

# axes of each parameter, in fields of ModelConfig
_AXES = {
    "embed_tokens": ("vocab_size", "dim"),
    "lm_head": ("vocab_size", "dim"),
    "q_proj": ("n_heads x head_dim", "dim"),
    "k_proj": ("n_kv_heads x head_dim", "dim"),
    "v_proj": ("n_kv_heads x head_dim", "dim"),
    "o_proj": ("dim", "n_heads x head_dim"),
    "gate_proj": ("hidden_dim", "dim"),
    "up_proj": ("hidden_dim", "dim"),
    "down_proj": ("dim", "hidden_dim"),
}


class Stored(NamedTuple):
    """Stored tensor: dtype as the format names it, and shape in torch's order."""

    dtype: str
    shape: tuple[int, ...]


T = TypeVar("T")


class LazyTensors(Mapping[str, T]):
    """Lazy mapping: Hugging Face name -> tensor or quantized tensor, read from the disk at each access, not kept.

    Args:
        readers: a function per name.
    """

    def __init__(self, readers: Mapping[str, Callable[[], T]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> T:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class ModelFile:
    """Model file or folder, opened but not loaded.

    Attributes:
        format: for users.
        config: the shape.
        tensors: under the Hugging Face names, half-split, in the order of `config.tensors()`.
        stored: dtype and shape of each tensor of the file, under its own name.
        tokenizer: the file or folder for `Tokenizer.load`, None where there is none.
        metadata: further metadata of the file, for `inspect`.
        stop_ids: stop tokens besides the tokenizer's own.
        int4: int4 matrices, where the file has Q4_0 or Q4_1; a subset of `tensors`.
        sampling: members of generation_config.json besides the stop tokens, such as `temperature`.
    """

    path: Path
    format: str
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    stored: Mapping[str, Stored]
    tokenizer: Path | None
    metadata: Mapping[str, object]
    stop_ids: frozenset[int] = frozenset()
    int4: Mapping[str, Int4] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def tokenizer_path(self) -> Path:
        """The file or folder for `Tokenizer.load`.

        Raises:
            InputError: the model has none.
        """
        if self.tokenizer is None:
            fix = "name one with --tokenizer FILE"
            raise InputError("the model has no tokenizer", where=self.path, fix=fix)
        return self.tokenizer

    def default_dtype(self, device: torch.device | str) -> torch.dtype:
        """Default compute dtype: that of the matrices if they have one in common.

        Quantized matrices become float32, and so does float16 on a CPU, which has no arithmetic for it.
        """
        kinds = {item.dtype for item in self.stored.values() if len(item.shape) > 1}
        if kinds == {"BF16"}:
            return torch.bfloat16
        return torch.float16 if kinds == {"F16"} and torch.device(device).type != "cpu" else torch.float32


def check_tensors(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: object,
    ignored: frozenset[str] = frozenset(),
) -> None:
    """Check of a file's tensors against the configuration, before any is read.

    Raises:
        InputError: missing or unknown names, all listed; or another shape, with the field it contradicts.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and name not in ignored]
    if missing or extra:
        parts = [("missing", missing), ("unknown", extra)]
        raise InputError(
            "the tensors are not those of the configuration",
            where=where,
            found="; ".join(f"{len(names)} {word}: {_listed(names)}" for word, names in parts if names),
            expected=f"{len(expected)} tensors",
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise InputError(
                "a tensor has another shape than in the configuration",
                where=f"{where}, {name}",
                found=found[name],
                expected=f"{shape}, which is {_axes(name)}",
            )


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _axes(name: str) -> str:
    return ", ".join(_AXES.get(name.removesuffix(".weight").rpartition(".")[2], ("dim",)))


def optional(path: Path) -> Path | None:
    """The path if it exists."""
    return path if path.exists() else None
