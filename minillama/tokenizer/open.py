"""Tokenizer file formats: detection, and the reader of each."""

from __future__ import annotations

from pathlib import Path

from minillama.errors import InputError
from minillama.files import model_folder, reading, refuse_remote, regular
from minillama.tokenizer import gguf, hf_json, llama2c, sentencepiece, tiktoken
from minillama.tokenizer.spec import FIX, Parts

NAMES = ("tokenizer.json", "tokenizer.model", "tokenizer.bin")


def read(path: str | Path) -> Parts:
    """Read a vocabulary file of any format, or the one that a folder holds.

    Raises:
        InputError: no such file, a URL, or an unknown format; and as the readers.
    """
    refuse_remote(path)
    file = model_folder(Path(path))
    if file.is_dir():
        file = next((file / name for name in NAMES if (file / name).exists()), file / NAMES[0])
    with reading(file, "the tokenizer", FIX), open(file, "rb", opener=regular) as stream:
        start = stream.read(4096)
    try:
        if start[:4] == b"GGUF":
            return gguf.read(file)
        if file.suffix == ".bin":
            parts = llama2c.read(file)
        elif tiktoken.is_tiktoken(start):
            parts = tiktoken.read(file)
        elif file.suffix == ".model" or sentencepiece.is_sentencepiece(start):
            parts = sentencepiece.read(file)
        else:
            return hf_json.read(file)
        return hf_json.with_settings(parts, file.parent)
    except InputError as error:
        if error.where is not None:
            raise
        raise error.at(file) from None
