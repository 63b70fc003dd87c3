"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def plain(value: Any) -> str:
    """Value as text: floats to six digits, lists by words."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
    Console(highlight=False, markup=False).print(table, "", sep="\n")
