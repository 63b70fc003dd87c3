"""Which adapter a path belongs to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minillama.errors import InputError
from minillama.files import refuse_url
from minillama.formats import gguf, hf, llama2c, meta
from minillama.formats.gguf_header import is_gguf, read_header
from minillama.formats.model_file import ModelFile, Stored
from minillama.formats.safetensors_header import read_header as read_safetensors

__all__ = ["Contents", "contents", "open_model"]

EXPECTED = "a Hugging Face or Meta folder, a GGUF file or a llama2.c .bin"


@dataclass(frozen=True)
class Contents:
    """What a file or folder says of itself; `model` is None where it is no model that this decoder has."""

    format: str
    stored: Mapping[str, Stored]
    metadata: Mapping[str, object]
    model: ModelFile | None


def contents(path: str | os.PathLike[str]) -> Contents:
    """Look into a model, a part of one, or a GGUF file of any architecture or with a vocabulary only.

    Raises:
        InputError: what `open_model` says, or the header is damaged.
    """
    try:
        model = open_model(path)
    except InputError:
        place = Path(path)
        if place.is_file() and is_gguf(place):
            header = read_header(place)
            stored = {name: Stored(info.dtype, info.shape) for name, info in header.tensors.items()}
            return Contents(f"GGUF version {header.version}", stored, header.metadata, None)
        if place.is_file() and place.suffix == ".safetensors":
            return Contents("safetensors", read_safetensors(place), {}, None)
        raise
    return Contents(model.format, model.stored, model.metadata, model)


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Open a model in whatever format it is, without loading it.

    Raises:
        InputError: nothing there, a URL, or no format that is known; and what the adapter finds wrong.
    """
    refuse_url(path)
    place = Path(path)
    if place.is_dir():
        if (place / "config.json").exists():
            return hf.read(place)
        if (place / meta.PARAMS).exists():
            return meta.read(place)
        inner = place / "model" if (place / "model" / "config.json").exists() else None
        fix = f"give the model inside the run, {inner}" if inner else None
        raise InputError(
            "no config.json in the model folder, and no params.json", where=place, expected=EXPECTED, fix=fix
        )
    try:
        if not place.exists():
            raise InputError("no such model", where=place, expected=EXPECTED)
        if is_gguf(place):
            return gguf.read(place)
        if place.suffix == ".safetensors":
            raise InputError("this is one file of a model folder", where=place, fix=f"give the folder, {place.parent}")
        if llama2c.is_llama2c(place):
            return llama2c.read(place)
        if place.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise InputError(
                "this is no llama2.c model; a pickle is not opened, for it can run any code",
                where=place,
                expected=EXPECTED,
            )
    except OSError as error:
        raise InputError("cannot read the model", where=place, found=error.strerror) from None
    raise InputError("the format of this file is unknown", where=place, expected=EXPECTED)
