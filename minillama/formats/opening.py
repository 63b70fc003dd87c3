"""Which adapter a path belongs to."""

from __future__ import annotations

import os
from pathlib import Path

from minillama.errors import InputError
from minillama.formats import gguf, hf, llama2c, meta
from minillama.formats.gguf_header import is_gguf
from minillama.formats.model_file import ModelFile
from minillama.paths import refuse_url

__all__ = ["open_model", "tokenizer_path"]

EXPECTED = "a Hugging Face or Meta folder, a GGUF file or a llama2.c .bin"


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
        raise InputError("no config.json in the model folder, and no params.json", where=place, expected=EXPECTED)
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


def tokenizer_path(path: str | os.PathLike[str]) -> Path:
    """The file or folder for `Tokenizer.load` that lies with a model.

    Raises:
        InputError: none does.
    """
    source = open_model(path)
    if source.tokenizer is None:
        raise InputError("no tokenizer lies with the model", where=path, fix="name one with --tokenizer FILE")
    return source.tokenizer
