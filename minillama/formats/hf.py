"""Hugging Face model folders: config.json, generation_config.json, *.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minillama.config import ModelConfig
from minillama.errors import InputError

__all__ = ["read", "write", "write_generation_config"]

WEIGHTS = "model.safetensors"


def read(folder: Path, config: ModelConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) for every parameter of `config`, memory-mapped, in the file's order.

    Raises:
        InputError: no model.safetensors, a damaged one, or tensors that are not the configuration's.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError("no weights in the model folder", where=folder, expected=WEIGHTS)
    expected = config.tensors()
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            _compare(path, stored, set(expected), config)
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name not in expected:
                    continue
                tensor = file.get_tensor(name)
                if tuple(tensor.shape) != expected[name]:
                    raise InputError(
                        "a tensor has another shape than config.json says",
                        where=f"{path}, {name}",
                        found=tuple(tensor.shape),
                        expected=expected[name],
                    )
                yield name, tensor
    except SafetensorError as error:
        raise InputError("not a readable safetensors file", where=path, found=error) from error


def _compare(path: Path, stored: set[str], expected: set[str], config: ModelConfig) -> None:
    # transformers may store a tied head twice
    extra = stored - expected - ({"lm_head.weight"} if config.tie_embeddings else set())
    missing = expected - stored
    if missing or extra:
        raise InputError(
            "the tensors are not those that config.json asks for",
            where=path,
            found=f"{len(missing)} missing {sorted(missing)[:4]}, {len(extra)} unknown {sorted(extra)[:4]}",
        )


def write(folder: Path, config: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write config.json and model.safetensors. Names and shapes are those of `config.tensors()`."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config.to_hf(dtype))
    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})


def write_generation_config(folder: Path, *, bos_id: int | None, eos_id: int | None) -> None:
    """Write generation_config.json, which says how to start and when to stop."""
    values = {"bos_token_id": bos_id, "eos_token_id": eos_id, "do_sample": True}
    _write_json(folder / "generation_config.json", {k: v for k, v in values.items() if v is not None})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
