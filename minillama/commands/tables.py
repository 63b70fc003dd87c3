"""Tables on standard output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

NARROWEST = 64
"""Columns of a table at least: a terminal that has fewer breaks its lines, and no figure is cut."""


def plain(value: Any) -> str:
    """Value as text: floats to six digits, lists by words, of tables what is set."""
    if isinstance(value, list | tuple):
        return " ".join(map(plain, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(plain(one) for one in value.values() if one not in ("", 1.0))
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def bytes_text(number: float, digits: int = 4) -> str:
    """Bytes in the unit of 1 to 1023: `12.5 GiB`."""
    power = min(int(math.log2(number or 1)) // 10, 4)
    scaled = number / 1024**power
    value = f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.{digits}g}"
    return f"{value} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def count_text(number: float) -> str:
    """Number to four digits: `14.29 G`, from 10^18 on `5.777e21`."""
    power = max(0, min(int(math.log10(number or 1)) // 3, 5))
    scaled = f"{number / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}".strip()
    return scaled if number < 1e18 else f"{number:.4g}".replace("e+", "e")


def duration_text(seconds: float) -> str:
    """Duration in one unit: `16 s`, `12 minutes`, `5.2 hours`, `167 days`, `47 years`."""
    units = {"years": 365.25 * 86400, "days": 86400, "hours": 3600, "minutes": 60}
    unit, size = next(((unit, size) for unit, size in units.items() if seconds >= 2 * size), ("s", 1))
    value = seconds / size
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.2g} {unit}"


def print_pairs(title: str, pairs: Mapping[str, Any], width: int = 0) -> None:
    """Print a title, if there is one, and one line per name and value; nothing without any.

    Names are `width` wide at least. Control characters, of untrusted text, are escaped.
    """
    if pairs and title:
        print(title)
    width = max(width, *map(len, pairs), 0)
    for name, value in pairs.items():
        line = f"  {name:{width}}  {plain(value)}"
        print("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line))


def print_table(title: str, headers: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table and an empty line: the first column is headed by `title`, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(title, no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    console.width = max(console.width, NARROWEST)
    console.print(table, "", sep="\n")
