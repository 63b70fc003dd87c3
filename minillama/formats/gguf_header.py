"""GGUF header, read with bounds: the claims of a forged one are checked against the file size.

Little-endian: "GGUF", version, counts; key/value pairs; tensor infos; padding; data
(ggml-org/ggml, docs/gguf.md). The `gguf` package dequantizes tensors, but hangs on a forged
length, so the header is read here.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from minillama.errors import InputError
from minillama.files import check_size, reading, regular
from minillama.formats.stored import Stored

T = TypeVar("T")
MAGIC = b"GGUF"
# value type -> struct letter; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KEY_BYTES, _TENSOR_BYTES = 13, 24  # minimum size of a pair and of an info
_MAX_RANK = 4
_CHUNK = 2**20
_KEYS, _ITEMS = 2**17, 2**22  # each is an object of Python, ten times as large as in the file
# ggml type -> name, values per block, bytes per block (ggml-org/ggml, src/ggml.c: type_traits)
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
}  # fmt: skip


@dataclass(frozen=True)
class GGUFHeader:
    """GGUF header: version, metadata (arrays of numbers as numpy arrays, of strings as lists), tensors by name."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Stored]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Metadata value of a key.

        Raises:
            InputError: it is missing and has no default, or is of another type. An integer is a float too.
        """
        value = self.metadata.get(key, default)
        if kind is int and isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one per layer
        if value is None:
            raise InputError("a key is missing", where=f"{self.path}, {key}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            found, expected = type(value).__name__, kind.__name__
            raise InputError("a key has another type", where=f"{self.path}, {key}", found=found, expected=expected)
        return value


def is_gguf(path: Path) -> bool:
    """Whether the file has the GGUF magic."""
    with open(path, "rb", opener=regular) as file:
        return file.read(4) == MAGIC


def read_header(path: Path) -> GGUFHeader:
    """Read everything but the data.

    Raises:
        InputError: not a GGUF file of version 2 or 3, cut short, or a count, length, type, shape or offset
            that the file cannot hold.
    """
    try:
        with reading(path), open(path, "rb", opener=regular) as file:
            return _Reader(file, path).header()
    except OverflowError as error:
        raise InputError("cannot read the file", where=path, found=error) from None


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.at, self.size = file, path, 0, os.fstat(file.fileno()).st_size
        self.data = bytearray()  # as far as it has been read

    def error(self, what: str, where: str = "", found: object = None, expected: object = None) -> InputError:
        location = f"{self.path}, {where}" if where else f"{self.path}, byte {self.at}"
        return InputError(what, where=location, found=found, expected=expected)

    def take(self, count: int, what: str) -> int:
        """Start of the next `count` bytes, which are in the file."""
        if count > self.size - self.at:
            raise self.error(f"the file is cut short, or its {what} is forged", found=f"{self.size} bytes")
        start = self.at
        self.at += count
        if self.at > len(self.data):
            self.data += self.file.read(max(_CHUNK, self.at - len(self.data)))
            if self.at > len(self.data):
                raise self.error("the file was changed while it was read", found=f"{len(self.data)} bytes")
        return start

    def number(self, letter: str, what: str) -> Any:
        return struct.unpack_from("<" + letter, self.data, self.take(struct.calcsize("<" + letter), what))[0]

    def count(self, each: int, what: str) -> int:
        """Number of items that take at least `each` bytes."""
        number: int = self.number("Q", what)
        if number * each > self.size - self.at:
            raise self.error(f"{what} is more than the file can hold", found=number)
        return number

    def string(self, what: str) -> str:
        length = self.count(1, f"length of {what}")
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8", "replace")

    def value(self, kind: int, key: str, is_inside: bool = False) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind != _ARRAY or is_inside:  # llama.cpp reads no arrays of arrays either
            raise self.error("unknown value type", key, found=kind)
        inner = self.number("I", key)
        if inner in _SCALARS:
            dtype = np.dtype(_SCALARS[inner]).newbyteorder("<")
            length = self.count(dtype.itemsize, f"length of {key}")
            return np.frombuffer(self.data, dtype, length, self.take(length * dtype.itemsize, key)).copy()
        length = self.count(8, f"length of {key}")
        check_size(length, _ITEMS, f"{self.path}, {key}", "strings")
        return [self.value(inner, key, is_inside=True) for _ in range(length)]

    def header(self) -> GGUFHeader:
        start = self.take(4, "magic")
        if self.data[start : self.at] != MAGIC:
            raise self.error("not a GGUF file", found=bytes(self.data[:4]), expected=MAGIC)
        version = self.number("I", "version")
        if version not in (2, 3):
            expected = "2 or 3, little-endian"
            raise self.error("this version of GGUF is not supported", "version", found=version, expected=expected)
        tensor_count = self.count(_TENSOR_BYTES, "the number of tensors")
        metadata: dict[str, Any] = {}
        keys = self.count(_KEY_BYTES, "the number of keys")
        check_size(max(keys, tensor_count), _KEYS, self.path, "keys or tensors")
        for _ in range(keys):
            key = self.string("key")
            if key in metadata:
                raise self.error("duplicate key", key)
            metadata[key] = self.value(self.number("I", key), key)
        infos = [self.info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self.error("invalid alignment", "general.alignment", found=alignment, expected="a multiple of 8")
        base = -(-self.at // alignment) * alignment
        tensors: dict[str, Stored] = {}
        for name, info in infos:
            if name in tensors:
                raise self.error("duplicate tensor", name)
            tensors[name] = info._replace(start=base + info.start)
            if info.start % alignment or base + info.start + info.size > self.size:
                found = f"{info.shape} of {info.dtype}, {info.size} bytes at {base + info.start} of {self.size}"
                raise self.error("the tensor does not lie in the file, or the file is cut short", name, found=found)
        end, places = base, sorted(tensors.items(), key=lambda item: item[1].start)
        for name, info in [*places, *[("the end of the file", Stored("", (), self.size))][: len(places)]]:
            # without gaps: a tensor whose type is forged takes fewer bytes than its place
            if info.start < end or info.start - end >= alignment:
                what = "two tensors overlap" if info.start < end else "there is a gap before this"
                raise self.error(what, name, found=f"byte {info.start}", expected=f"byte {end}, perhaps padded")
            end = info.start + info.size
        return GGUFHeader(self.path, version, metadata, tensors)

    def info(self) -> tuple[str, Stored]:
        """Tensor info; `start` is relative to the data."""
        name = self.string("tensor name")
        rank = self.number("I", name)
        if not 0 < rank <= _MAX_RANK:
            raise self.error("invalid number of dimensions", name, found=rank, expected=f"1 to {_MAX_RANK}")
        shape = tuple(self.number("Q", name) for _ in range(rank))[::-1]
        kind, offset = self.number("I", name), self.number("Q", name)
        if kind not in _TYPES:
            raise self.error("unknown tensor type", name, found=kind)
        dtype, block, width = _TYPES[kind]
        if shape[-1] % block or math.prod(shape) == 0:
            raise self.error("the shape does not fit the type", name, found=f"{shape} of {dtype}")
        return name, Stored(dtype, shape, offset, math.prod(shape) // block * width)
