"""Format detection: the adapter of a path."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minillama.config.loader import nearest_path
from minillama.errors import InputError
from minillama.files import model_folder, refuse_remote
from minillama.formats import gguf, hf, llama2c, meta
from minillama.formats.gguf_header import is_gguf, read_header
from minillama.formats.model_file import ModelFile
from minillama.formats.peft_config import CONFIG as ADAPTER
from minillama.formats.peft_config import adapter_error
from minillama.formats.safetensors_header import read_header as read_safetensors
from minillama.formats.stored import Stored

EXPECTED = "a Hugging Face or Meta folder, a GGUF file or a llama2.c .bin"


@dataclass(frozen=True)
class Contents:
    """Contents of a file or folder; `model` is None where the decoder does not support it."""

    format: str
    stored: Mapping[str, Stored]
    metadata: Mapping[str, object]
    model: ModelFile | None


def contents(path: str | os.PathLike[str]) -> Contents:
    """Contents of a model, of a shard, or of a GGUF file of any architecture or with a vocabulary only.

    Raises:
        InputError: as `open_model` raises, or the header is damaged.
    """
    try:
        model = open_model(path)
        return Contents(model.format, model.stored, model.metadata, model)
    except InputError:
        path = Path(path)
        if path.is_file() and is_gguf(path):
            header = read_header(path)
            return Contents(f"GGUF version {header.version}", header.tensors, header.metadata, None)
        if path.is_file() and path.suffix == ".safetensors":
            return Contents("safetensors", read_safetensors(path), {}, None)
        raise


def open_model(path: str | os.PathLike[str]) -> ModelFile:
    """Open a model of any format, without loading it.

    Raises:
        InputError: no such path, a URL, or an unknown format; and the errors of the adapter.
    """
    refuse_remote(path)
    path = model_folder(Path(path))
    if path.is_dir():
        if (path / "config.json").exists():
            return hf.read(path)
        if (path / meta.PARAMS).exists():
            return meta.read(path)
        if (path / ADAPTER).exists():
            raise adapter_error(path)
        what = "no config.json in the model folder, and no params.json"
        fix = "give the folder that they are in; a model of the hub is complete after hf download NAME --local-dir DIR"
        raise InputError(what, where=path, expected=EXPECTED, fix=fix)
    try:
        if not path.exists():
            raise InputError("no such model", where=path, expected=EXPECTED, fix=nearest_path(path))
        if is_gguf(path):
            return gguf.read(path)
        if path.suffix == ".safetensors":
            raise InputError("this is one file of a model folder", where=path, fix=f"give the folder, {path.parent}")
        if llama2c.is_llama2c(path):
            return llama2c.read(path)
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            what = "this is not a llama2.c model; a pickle is not opened, as it can run any code"
            raise InputError(what, where=path, expected=EXPECTED)
    except OSError as error:
        raise InputError("cannot read the model", where=path, found=error.strerror) from None
    raise InputError("the format of this file is unknown", where=path, expected=EXPECTED)
