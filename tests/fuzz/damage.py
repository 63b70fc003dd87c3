"""Seeded mutations of files: of bytes, of numbers in a header, of JSON values, of lines, of what an archive holds."""

from __future__ import annotations

import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

import torch

INTEGERS = (0, 1, 2, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"\0",
    b"\xff\xfe",
    b"\n",
    b"\r\n",
    b'"',
    b"{",
    b"[" * 40,
    b"\xe2\x80\xa8",
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"<s>",
)


PICKLED = {
    b"X\x03\0\0\0cpu": (b"X\x04\0\0\0meta", b"X\x04\0\0\0cuda", b"X\x03\0\0\0xpu"),
    b"FloatStorage": (b"BoolStorage", b"HalfStorage", b"DoubleStorage", b"ComplexFloatStorage"),
    b"_rebuild_tensor_v2": (b"_rebuild_parameter", b"_rebuild_sparse_tensor", b"_rebuild_meta_tensor_no_storage"),
}


PATHS = ("x" * 10_000, "é" * 3000, "a/" * 3000, "a\0b", "a\nb", "", "..", "/dev/null", "/dev/zero", "~nobody/x", "~?/x")


def odd_value(rng: random.Random) -> Any:
    """A JSON value that is hardly the one expected."""
    deep: Any = 0
    for _ in range(rng.choice((3, 60, 600))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    numbers = (0, 1, -1, 3, 2**31, 2**63, 10**22, 0.5, 1e-300, 1e308, float("nan"), float("inf"), -0.0)
    texts = (
        "",
        "x",
        "a\nb",
        "\x1b[2J",
        "\ud800",
        "<s>\udfff",
        "\u2028",
        "../x",
        "/etc/hostname",
        "float32",
        "<s>",
        "DEEP",
        "é" * 3000,
    )
    others = (None, True, False, [], {}, [1, 2], ["a", None], {"a": 1}, deep)
    return rng.choice(rng.choice((numbers, texts, others)))


def of_json(rng: random.Random, data: bytes) -> bytes:
    """One to three values replaced, removed, doubled, renamed or swapped."""
    value = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            del holder[key]
        elif how == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "x", str(key) + "s", "\x1b[1m"))] = holder.pop(key)
        elif how == 2:
            other, name = rng.choice(places)
            if name in other if isinstance(other, dict) else name < len(other):
                holder[key] = json.loads(json.dumps(other[name]))
        elif how == 3 and isinstance(holder, list):
            holder.insert(key, json.loads(json.dumps(holder[key])))
        else:
            holder[key] = odd_value(rng)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    text = text.replace(b'"DEEP"', b"[" * 5000 + b"]" * 5000)
    return of_bytes(rng, text) if rng.random() < 0.1 else text


def _places(value: Any) -> Any:
    """Every member of a JSON value: its holder and its key."""
    left = [value]
    while left:
        holder = left.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                left.append(holder[key])


def of_bytes(rng: random.Random, data: bytes, reach: int = 4096) -> bytes:
    """One to four changes of bytes, most of them among the first `reach`."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not damaged:
            break
        far = rng.random() < 0.2
        at = rng.randrange(len(damaged) if far else min(reach, len(damaged)))
        how, length = rng.randrange(8), rng.randint(1, 16)
        if how == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            damaged[at : at + length] = rng.randbytes(length)
        elif how == 2:
            del damaged[at : at + length]
        elif how == 3:
            damaged[at:at] = damaged[at : at + rng.choice((length, 200))]
        elif how == 4:
            del damaged[at:]
        elif how == 5:
            damaged[at : at + 4] = struct.pack("<I", rng.choice(INTEGERS) % 2**32)
        elif how == 6:
            damaged[at : at + 8] = struct.pack("<Q", rng.choice(INTEGERS))
        else:
            damaged[at : at + rng.choice((0, 1))] = rng.choice(WORDS)
    return bytes(damaged)


def of_numbers(rng: random.Random, data: bytes, places: Sequence[tuple[int, int]]) -> bytes:
    """One or two of the numbers at known places, (offset, bytes) each, replaced."""
    damaged = bytearray(data)
    for _ in range(rng.randint(1, 2)):
        at, size = rng.choice(places)
        whole, small = struct.pack("<Q", rng.choice(INTEGERS)), struct.pack("<Q", rng.randrange(41))
        floats = struct.pack("<f", rng.choice((0.0, -1.0, 1e-38, 1e38, float("inf"), float("nan")))) * 2
        damaged[at : at + size] = rng.choice((whole, small, floats, rng.randbytes(8)))[:size]
    return bytes(damaged)


def of_types(rng: random.Random, data: bytes, places: Sequence[tuple[int, int]]) -> bytes:
    """GGUF: the declared type of a tensor replaced by another."""
    at, size = rng.choice(places)
    return data[:at] + struct.pack("<I", rng.randrange(41)) + data[at + size :]


def of_dtypes(rng: random.Random, data: bytes) -> bytes:
    """safetensors: the declared type of a tensor replaced by another."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    name = rng.choice([name for name in header if name != "__metadata__"])
    header[name]["dtype"] = rng.choice(
        ("I32", "U32", "I64", "F64", "BF16", "F16", "I8", "U8", "BOOL", "F8_E4M3", "C64")
    )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + int.from_bytes(data[:8], "little") :]


def of_pickle(rng: random.Random, data: bytes) -> bytes:
    """Meta's .pth: words of the pickle in the archive replaced, or its bytes."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith(".pkl"))
    word = rng.choice([*PICKLED, b""])
    found = [match.start() for match in re.finditer(re.escape(word), members[name])] if word else []
    if found:
        at = rng.choice(found)
        members[name] = members[name][:at] + rng.choice(PICKLED[word]) + members[name][at + len(word) :]
    else:
        members[name] = of_bytes(rng, members[name], len(members[name]))
    with zipfile.ZipFile(made := io.BytesIO(), "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return made.getvalue()


def of_tensors(rng: random.Random, data: bytes) -> bytes:
    """Meta's .pth: a tensor replaced by one of another kind, or by something else."""
    tensors = torch.load(io.BytesIO(data), weights_only=True)
    name = rng.choice([*tensors])
    own = tensors[name]
    tensors[name] = rng.choice(
        (
            own.to("meta"),
            own.to_sparse(),
            own.to(torch.complex64),
            own.to(rng.choice((torch.int32, torch.bool, torch.float64, torch.float8_e4m3fn))),
            own.T,
            own[:0],
            own.flatten()[0],
            torch.quantize_per_tensor(own, 0.1, 0, torch.qint8),
            own.flatten()[:1].expand(own.shape),
            {name: own},
            None,
        )
    )
    torch.save(tensors, made := io.BytesIO())
    return made.getvalue()


def of_gguf(rng: random.Random, data: bytes, places: Sequence[tuple[int, int]]) -> bytes:
    """Bytes, numbers of the header, or an array of empty arrays that take twenty times as much memory."""
    if rng.random() < 0.01:
        count = struct.unpack("<Q", data[16:24])[0] + 1
        arrays = struct.pack("<Q1sIIQ", 1, b"x", 9, 9, 4_000_000) + struct.pack("<IQ", 0, 0) * 4_000_000
        return data[:16] + struct.pack("<Q", count) + arrays + data[24:]
    return of_bytes(rng, data) if rng.random() < 0.5 else of_numbers(rng, data, places)


def of_lines(rng: random.Random, data: bytes) -> bytes:
    """Lines removed, doubled, swapped, or damaged: as JSON, as KEY = VALUE, or as bytes."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 3)):
        at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
        how = rng.randrange(7)
        if how == 0 and len(lines) > 1:
            del lines[at]
        elif how == 1:
            lines.insert(other, lines[at])
        elif how == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif how == 3 or not lines[at]:
            lines[at] = of_bytes(rng, lines[at])
        elif lines[at].startswith(b"{"):
            lines[at] = of_json_or_bytes(rng, lines[at])
        elif b"=" in lines[at]:
            lines[at] = lines[at].split(b"=")[0] + b"= " + _toml(odd_value(rng))
        else:
            lines[at] = of_bytes(rng, lines[at])
    return b"\n".join(lines)


def of_paths(rng: random.Random, data: bytes) -> bytes:
    """TOML: a path replaced by one that no file has, or that no file should have."""
    found = rng.choice([*re.finditer(rb'"[^"]*"', data)])
    return data[: found.start()] + _toml(rng.choice(PATHS)) + data[found.end() :]


def of_json_or_bytes(rng: random.Random, data: bytes) -> bytes:
    """As JSON where it still is."""
    try:
        return of_json(rng, data)
    except (ValueError, RecursionError, AttributeError, TypeError):
        return of_bytes(rng, data)


def _toml(value: Any) -> bytes:
    text = "nan" if value != value else json.dumps(value)
    return text.replace("null", '"null"').replace(": ", " = ").encode("utf-8", "surrogatepass")
