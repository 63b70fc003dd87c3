"""Defaults of generation that come with a model: tokens that end a text, and sampling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minillama.errors import InputError
from minillama.files import read_json, replace_text

FILE = "generation_config.json"
STOP_IDS = "minillama.stop_token_ids"
"""GGUF key of stop tokens for which llama.cpp has neither a key nor a name."""

# member of generation_config.json -> key of GGUF
_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def stop_ids(folder: Path) -> frozenset[int]:
    """Tokens that end a text: `eos_token_id`, one or a list, of generation_config.json or else of config.json."""
    for name in (FILE, "config.json"):
        ids = _members(folder / name).get("eos_token_id")
        found = frozenset(i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int)
        if found:
            return found
    return frozenset()


def defaults(folder: Path) -> dict[str, Any]:
    """The members of generation_config.json besides the tokens that end a text, such as `temperature`."""
    return {key: value for key, value in _members(folder / FILE).items() if key != "eos_token_id"}


def gguf_stop_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """Tokens that end a text, by the keys of a GGUF file."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    more = metadata.get(STOP_IDS)
    ids += more.tolist() if isinstance(more, np.ndarray) else []
    return frozenset(i for i in ids if type(i) is int)


def gguf_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling defaults of a GGUF file, as members of generation_config.json."""
    found = {ours: metadata[key] for ours, key in _SAMPLING.items() if isinstance(metadata.get(key), int | float)}
    # float32 in the file: 0.6 comes back as 0.60000002
    plain = {ours: float(str(np.float32(value))) if type(value) is float else value for ours, value in found.items()}
    return {"do_sample": True, **plain} if plain else {}


def gguf_keys(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a GGUF file for sampling defaults; others than its own have none."""
    return {key: sampling[ours] for ours, key in _SAMPLING.items() if isinstance(sampling.get(ours), int | float)}


def write(folder: Path, *, bos_id: int | None, eos_ids: Iterable[int], sampling: Mapping[str, Any]) -> None:
    """Write generation_config.json, which says how to start and when to stop, and the same into config.json.

    Args:
        folder: of the model.
        bos_id: the token that a text starts with; None: none.
        eos_ids: the tokens that end one, the tokenizer's own first.
        sampling: further members, as `defaults` returns them; without any, texts are sampled.
    """
    stops = list(dict.fromkeys(eos_ids))
    ids = {"bos_token_id": bos_id, "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None)}
    config = folder / "config.json"
    if config.exists():
        _write(config, _members(config) | ids)
    known = {key: value for key, value in ids.items() if value is not None}
    _write(folder / FILE, {**(sampling or {"do_sample": True}), **known})


def _members(path: Path) -> dict[str, Any]:
    """The members of a JSON object; none of a file that is not there or holds none."""
    try:
        return read_json(path)
    except InputError:
        return {}


def _write(path: Path, values: Mapping[str, Any]) -> None:
    replace_text(path, json.dumps(values, indent=2) + "\n")
