"""Safetensors header, checked before anything is allocated.

A file is eight bytes of length, a JSON table of name -> dtype, shape, data_offsets, and the data.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.files import LARGEST, check_size, reading, regular
from minillama.formats.stored import Stored

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_OTHERS = {
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "run git lfs pull"),
    b"<": ("a web page, not a safetensors file", "download the file again, from its raw address"),
    b"PK\x03\x04": ("a zip archive (a PyTorch pickle), not a safetensors file", "convert it where it came from"),
    b"\x80\x02": ("a pickle, not a safetensors file", "convert it where it came from"),
    b"GGUF": ("a GGUF file, not a safetensors file", "give it the suffix .gguf and its path as the model"),
}


def read_header(path: Path) -> dict[str, Stored]:
    """Read the header: name -> dtype and shape of every tensor.

    Raises:
        InputError: not a safetensors file, with the type that it is; cut short; a header that is too long, not
            JSON, names a tensor twice, or whose tensors overlap, leave gaps or do not fit their shapes.
    """
    table, start, total = _table(path)
    table.pop("__metadata__", None)
    tensors = {name: _tensor(entry, f"{path}, {name}") for name, entry in table.items()}
    at = 0  # in the data
    for begin, size, name in sorted((tensor.start, tensor.size, name) for name, tensor in tensors.items()):
        if begin != at:
            what = "two tensors overlap" if begin < at else "there is a gap before a tensor"
            raise InputError(what, where=f"{path}, {name}", found=f"byte {begin}", expected=f"byte {at}")
        at = begin + size
    data = total - start
    if at != data:
        what = "the file is cut short" if at > data else "there are bytes after the last tensor"
        raise InputError(what, where=path, found=f"{data} bytes of data", expected=f"{at}")
    return {name: tensor._replace(start=start + tensor.start) for name, tensor in tensors.items()}


def read_metadata(path: Path) -> dict[str, Any]:
    """Free text by name in the header, if there is any.

    Raises:
        InputError: the header is no JSON object.
    """
    metadata = _table(path)[0].get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _table(path: Path) -> tuple[dict[str, Any], int, int]:
    """Table of the header, first byte of the data, bytes of the file."""
    with reading(path), open(path, "rb", opener=regular) as file:
        total = os.fstat(file.fileno()).st_size
        length = _header_length(path, file.read(64), total)
        file.seek(8)
        text = file.read(length)
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except InputError as error:
        raise error.at(path) from None
    except (ValueError, RecursionError) as error:
        raise InputError("the header is not JSON", where=path, found=str(error)[:200]) from None
    if not isinstance(table, dict):
        raise InputError("the header is not a JSON object", where=path, found=type(table).__name__)
    return table, 8 + length, total


def refuse_integers(stored: Mapping[str, Stored], path: Path) -> None:
    """Refuse integers in place of a model's parameters, which need scales that this file does not say how to apply.

    Raises:
        InputError: the first tensor of such a type.
    """
    for name, tensor in stored.items():
        if not re.fullmatch("B?F(16|32|64)", tensor.dtype):
            expected = "F64, F32, F16 or BF16"
            raise InputError("not a type of weights", where=f"{path}, {name}", found=tensor.dtype, expected=expected)


def _header_length(path: Path, start: bytes, size: int) -> int:
    for magic, (what, fix) in _OTHERS.items():
        if start[8:9] != b"{" and start.lstrip().startswith(magic):
            raise InputError(f"this is {what}", where=path, found=start[:40], fix=fix)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or 8 + length > size:
        found = f"{size} bytes, a header of {length}" if len(start) >= 8 else f"{size} bytes"
        raise InputError("the file is damaged, or cut short in its header", where=path, found=found)
    check_size(length, LARGEST, path, "bytes of header")
    return length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise InputError("the header names a tensor twice", found=name)
    return table


def _tensor(entry: Any, where: str) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid or not isinstance(dtype, str):
        raise InputError("the header's entry is damaged", where=where, found=str(entry)[:200])
    if dtype not in _BYTES:
        raise InputError("this dtype is not supported", where=where, found=dtype)
    size = math.prod(shape) * _BYTES[dtype]
    if end - begin != size:
        expected = f"{shape} of {dtype}, {size} bytes"
        raise InputError("size and shape disagree", where=where, found=end - begin, expected=expected)
    return Stored(dtype, shape, begin, size)
