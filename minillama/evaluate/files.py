"""Files of an evaluation set in its published forms: JSONL with label files, CSV, TSV, Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillama.data.archives import PACKED, open_file, plain_name
from minillama.data.reading import read_records
from minillama.data.sources import valid
from minillama.errors import InputError, optional_import
from minillama.files import parsing, read_text, reading

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".txt")  # in the order in which they are preferred
NAMES = {"val": "validation", "valid": "validation"}
SPLITS = ("train", "validation", "dev", "test")


class Row(NamedTuple):
    """Record as its file has it, and file and line."""

    value: dict[str, Any]
    where: str


def suffix(path: Path) -> str:
    """Format of a file, by its name."""
    return (path.with_suffix("") if path.suffix in PACKED else path).suffix.lower()


def find(folders: Sequence[Path], wanted: str = "", unwanted: str = "") -> dict[str, list[Path]]:
    """Data files by split, those of one format.

    Args:
        folders: where to look, at any depth; a split is a word of a file's path in it.
        wanted: pattern that a path must match.
        unwanted: pattern that it must not.

    Raises:
        InputError: two files of one format whose names mean the same, as val.jsonl and validation.jsonl.
    """
    found: dict[str, list[Path]] = {}
    for folder in _distinct(folders):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder.parent).as_posix().lower()
            if suffix(path) not in SUFFIXES or not re.search(wanted, name) or (unwanted and re.search(unwanted, name)):
                continue
            words = re.split(r"[^a-z]+", path.relative_to(folder).as_posix().lower())
            splits = [split for word in words if (split := NAMES.get(word, word)) in SPLITS]
            if splits:
                found.setdefault(splits[-1], []).append(path)
    return {split: _one_format(paths) for split, paths in found.items()}


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Folders without those that are the same under another name, as in another case."""
    found: list[Path] = []
    for folder in folders:
        if not any(folder.samefile(other) for other in found):
            found.append(folder)
    return found


def _one_format(paths: Sequence[Path]) -> list[Path]:
    best = min(map(suffix, paths), key=SUFFIXES.index)
    same = [path for path in paths if suffix(path) == best]
    whole = [path for path in same if path.parent.name == "all"]  # Hugging Face has it beside the subjects
    chosen = whole or same
    _refuse_twice(chosen)
    return chosen


def _refuse_twice(paths: Sequence[Path]) -> None:
    known: dict[str, Path] = {}
    for path in paths:
        name = path.with_name(plain_name(path.name)).as_posix().lower()
        first = known.setdefault(re.sub("[a-z]+", lambda word: NAMES.get(word[0], word[0]), name), path)
        if first is not path:
            what, found = "two files of the same part, which would be read twice", f"{first} and {path}"
            raise InputError(what, where=path.parent, found=found, fix="leave one of them there")


def read(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Records of a file.

    Args:
        path: the file. The labels of `NAME.jsonl` may lie in `NAME-labels.lst` beside it, line by line.
        columns: names for those of a CSV file without a header; none if it has one.

    Raises:
        InputError: a file that is damaged or does not agree with its labels.
    """
    rows = list(_rows(path, columns))
    stem = path.name.removesuffix(path.suffix if path.suffix in PACKED else "")
    labels = path.with_name(Path(stem).stem + "-labels.lst")
    if suffix(path) in (".jsonl", ".json") and labels.exists() and not (rows and "answer" in rows[0].value):
        found = read_text(labels).split()
        if len(found) != len(rows):
            raise InputError("labels and records differ in number", where=labels, found=len(found), expected=len(rows))
        rows = [Row(row.value | {"label": label}, row.where) for row, label in zip(rows, found, strict=True)]
    yield from rows


def _rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    kind = suffix(path)
    if kind in (".jsonl", ".json"):
        yield from (Row(record.value, record.where) for record in valid(read_records(path)))
        return
    with reading(path), parsing(path):
        if kind == ".parquet":
            table = optional_import("pyarrow.parquet", "a .parquet file", "data").read_table(path)
            yield from (Row(row, f"{path}, row {i}") for i, row in enumerate(table.to_pylist(), 1))
        elif kind == ".txt":
            yield from _six_lines(path)
        else:
            with _opened(path) as file:
                tsv = kind == ".tsv"
                rows = csv.reader(file, delimiter=",\t"[tsv], quoting=csv.QUOTE_NONE if tsv else csv.QUOTE_MINIMAL)
                names = columns or next(rows, [])
                yield from (Row(dict(zip(names, row, strict=False)), f"{path}:{rows.line_num}") for row in rows)


def _opened(path: Path) -> io.TextIOWrapper:
    return io.TextIOWrapper(open_file(path), encoding="utf-8-sig", newline="")


def _six_lines(path: Path) -> Iterator[Row]:
    """HellaSwag as text: context, label, four endings, a line each."""
    with _opened(path) as file:
        lines = [line.rstrip("\r\n") for line in file]
    if len(lines) % 6:
        raise InputError("not six lines per record", where=path, found=f"{len(lines)} lines")
    for start in range(0, len(lines), 6):
        query, label, *endings = lines[start : start + 6]
        yield Row({"query": query, "choices": endings, "gold": label}, f"{path}:{start + 1}")
