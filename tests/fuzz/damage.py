"""Seeded mutations of files: of bytes, of JSON values, of lines."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

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


def odd_value(rng: random.Random) -> Any:
    """A JSON value that is hardly the one expected."""
    deep: Any = 0
    for _ in range(rng.choice((3, 60, 600))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    numbers = (0, 1, -1, 3, 2**31, 2**63, 10**22, 0.5, 1e-300, 1e308, float("nan"), float("inf"), -0.0)
    texts = ("", "x", "a\nb", "\x1b[2J", "\ud800", "\u2028", "../x", "/etc/hostname", "float32", "<s>", "é" * 3000)
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


def of_json_or_bytes(rng: random.Random, data: bytes) -> bytes:
    """As JSON where it still is."""
    try:
        return of_json(rng, data)
    except (ValueError, RecursionError, AttributeError, TypeError):
        return of_bytes(rng, data)


def _toml(value: Any) -> bytes:
    text = "nan" if value != value else json.dumps(value)
    return text.replace("null", '"null"').replace(": ", " = ").encode("utf-8", "surrogatepass")
