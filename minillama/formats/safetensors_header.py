"""Safetensors header, checked before anything is mapped or allocated.

A file is eight bytes of length, a JSON table of name -> dtype, shape, data_offsets, and the data. The
library reads it; this file gives clear errors, and bounds the cost of a forged one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.formats.model_file import Stored

LIMIT = 100_000_000  # as in the library
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_IMPOSTORS = {
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
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            for magic, (what, fix) in _IMPOSTORS.items():
                if start[8:9] != b"{" and start.lstrip().startswith(magic):
                    raise InputError(f"this is {what}", where=path, found=start[:40], fix=fix)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or 8 + length > size:
                if len(start) >= 8 and length > LIMIT:
                    raise _too_long(path, length)
                found = f"{size} bytes, a header of {length}" if len(start) >= 8 else f"{size} bytes"
                raise InputError("the file is cut short in its header", where=path, found=found)
            if length > LIMIT:
                raise _too_long(path, length)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise InputError("cannot read the file", where=path, found=error.strerror) from None
    try:
        table = json.loads(text, object_pairs_hook=_unique)
    except _Twice as error:
        raise InputError("the header names a tensor twice", where=path, found=str(error)) from None
    except (ValueError, RecursionError) as error:
        raise InputError("the header is not JSON", where=path, found=str(error)[:200]) from None
    if not isinstance(table, dict):
        raise InputError("the header is not a JSON object", where=path, found=type(table).__name__)
    table.pop("__metadata__", None)
    return _check(table, path, size - 8 - length)


class _Twice(Exception):
    """Duplicate key of a JSON object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return table


def _too_long(path: Path, length: int) -> InputError:
    what = "the header claims to be longer than any real one"
    return InputError(what, where=path, found=f"{length} bytes", expected=f"at most {LIMIT}")


def _check(table: dict[str, Any], path: Path, data_bytes: int) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in table.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**63 for n in (*shape, begin, end))
            sound = sound and isinstance(dtype, str)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise InputError("the header's entry is damaged", where=f"{path}, {name}", found=str(entry)[:200])
        width = _BYTES.get(dtype)
        if width is None:
            raise InputError("this dtype is not supported", where=f"{path}, {name}", found=dtype)
        if end - begin != math.prod(shape) * width:
            expected = f"{shape} of {dtype}, {math.prod(shape) * width} bytes"
            raise InputError("size and shape disagree", where=f"{path}, {name}", found=end - begin, expected=expected)
        stored[name] = Stored(dtype, shape)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            what = "two tensors overlap" if begin < at else "there is a gap before a tensor"
            raise InputError(what, where=f"{path}, {name}", found=f"byte {begin}", expected=f"byte {at}")
        at = end
    if at != data_bytes:
        what = "the file is cut short" if at > data_bytes else "there are bytes after the last tensor"
        raise InputError(what, where=path, found=f"{data_bytes} bytes of data", expected=f"{at}")
    return stored
