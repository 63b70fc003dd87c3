"""Opened model file: configuration, lazily read tensors, tokenizer path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.formats.stored import Stored
from minillama.layers.int4 import Int4

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
T = TypeVar("T")


class LazyTensors(Mapping[str, T]):
    """Lazy mapping: Hugging Face name -> tensor or quantized tensor, read from the disk at each access, not kept.

    Args:
        names: the names, in their order.
        read: the value of a name.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], T]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


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
