"""Data sources: built-in names, files, folders, globs, JSONL, and the `datasets` library.

`documents(source)` yields documents in an order that depends on names alone. Only `hf:NAME` may use the network.
"""

from __future__ import annotations

import dataclasses
import glob
import platform
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal, TypeVar

from minillama.config.loader import nearest_path
from minillama.data.archives import plain_name
from minillama.data.builtin import BUILTIN, builtin_documents
from minillama.data.python_qa import PYTHON_QA, python_qa
from minillama.data.reading import (
    RECORDS,
    Document,
    Record,
    format_of,
    from_record,
    holds_records,
    read_file,
    read_records,
    text_field,
)
from minillama.data.skipped import BadText, Remark, Skipped
from minillama.data.tasks import TASKS, Task
from minillama.errors import InputError, optional_import
from minillama.files import check_size, parsing, read_json, reading

T = TypeVar("T")
OnError = Literal["stop", "skip"]

# Suffixes of text files in a folder. A file that is named, or matched by a glob, may have any suffix.
SUFFIXES = (".txt", ".text", ".md", ".rst", ".tex", ".py", *RECORDS)
DEPTH = 200  # of folders in folders
_HF = "hf:"
_NAMES = (*BUILTIN, PYTHON_QA, *TASKS)
CLEANED, UNFINISHED = "cleaned.json", ".cleaning"
"""In a folder of `minillama data clean`: the manifest of a finished one, the work of another."""


@dataclass(frozen=True)
class Source:
    """Data source. Exactly one of `name` and `path` is given.

    Raises:
        InputError: both or neither are given.
    """

    name: str = ""
    """python-docs, python-code, python-qa, arithmetic, sorting, spelling (also of a size, arithmetic:3), hf:NAME or
    hf:NAME:CONFIG of the Hugging Face hub, or what `path` can be."""
    path: str = ""
    """A text file (one document), a .json or .jsonl file (one per record), a folder of them, a glob; .gz, .zst
    and .bz2 as well."""
    field: str = ""
    """Text field of a record, or text column of a data set; data.field unless given."""
    weight: float = dataclasses.field(default=1.0, metadata={"above": 0})
    """Mixture weight: share of the training tokens, relative to the other sources."""

    def __post_init__(self) -> None:
        if bool(self.name) == bool(self.path):
            found = f"name = {self.name!r}, path = {self.path!r}"
            raise InputError("a source has either a name or a path", where="name", found=found)

    @property
    def label(self) -> str:
        """Name for messages."""
        return self.name or self.path


def documents(source: Source, on_error: OnError = "stop", report: Skipped | None = None) -> Iterator[Document]:
    """Nonempty documents of a source.

    Args:
        on_error: `stop` raises at the first text that is not UTF-8, holds a NUL, is not JSON, lacks the field
            or comes out of a damaged archive; `skip` skips the document (a file, or a line of JSONL).
        report: counts of skipped documents.

    Raises:
        InputError: bad text, with file and line; nothing of that name; a file that cannot be opened.
    """
    for document in valid(read_source(source), on_error, report):
        if document.text:
            yield document
        elif report is not None:
            report.note("empty documents")


def records(source: Source, on_error: OnError = "stop", report: Skipped | None = None) -> Iterator[Record]:
    """JSON objects of a source's .jsonl, .json and .ndjson files, or rows of a data set of the hub, in their order.

    The arguments are those of `documents`.

    Raises:
        InputError: as `documents`; a source of text, not records.
    """
    if source.name in BUILTIN:
        what = "this source gives texts, not records"
        raise InputError(what, where="data.sources", found=source.name, expected=".jsonl or .json files")
    task = Task.of(source.name)
    items = python_qa() if source.name == PYTHON_QA else task.records() if task is not None else _record_items(source)
    yield from valid(items, on_error, report)


def valid(
    items: Iterable[T | BadText | Remark], on_error: OnError = "stop", report: Skipped | None = None
) -> Iterator[T]:
    """The valid items; the error of an invalid one is raised, or counted in `report`, as remarks are."""
    for item in items:
        if isinstance(item, Remark):
            if report is not None:
                report.remark(item)
        elif isinstance(item, BadText):
            with skipping(on_error, report):
                raise item
        else:
            yield item


@contextmanager
def skipping(
    on_error: OnError, report: Skipped | None = None, where: object = None, reason: str = "not rendered"
) -> Iterator[None]:
    """A record that fails in the block, with an InputError, stops; or it is left out, and counted in `report`.

    Args:
        on_error: stop or skip.
        report: counts of skipped records.
        where: the record, for errors other than a BadText; their own place unless given.
        reason: for these as well.
    """
    try:
        yield
    except InputError as error:
        if on_error == "stop":
            raise
        if report is not None:
            report.add(error if isinstance(error, BadText) else BadText(reason, error.what, where=where or error.where))


def identity(source: Source) -> dict[str, Any]:
    """Cache key of a source, without reading its text: equal when nothing has changed.

    Files are identified by name as given, size and modification time; built-in sources by the Python version.

    Raises:
        InputError: nothing of that name.
    """
    known: dict[str, Any] = {"source": source.label, "field": source.field}
    if source.name in BUILTIN:
        return known | {"python": platform.python_version()}
    if source.name.startswith(_HF) and not Path(source.name.removeprefix(_HF)).is_dir():
        return known
    lines = []
    for path in find_files(source.label.removeprefix(_HF), ("",) if source.name.startswith(_HF) else SUFFIXES):
        with reading(path):
            status = path.stat()
        lines.append(f"{path.as_posix()} {status.st_size} {status.st_mtime_ns}")
    listing = "\n".join(lines).encode(errors="surrogateescape")  # a file name need not be UTF-8
    return known | {"files": len(lines), "listing": sha256(listing).hexdigest()}


def read_source(source: Source) -> Iterator[Document | BadText | Remark]:
    """Documents of a source, an error in place of each invalid one, and remarks."""
    if source.name == PYTHON_QA or Task.of(source.name) is not None:
        what, fix = "this source gives conversations, not texts", "add --data.template auto"
        raise InputError(what, where="data.sources", found=source.name, fix=fix)
    if source.name in BUILTIN:
        yield from builtin_documents(source.name)
    elif source.name.startswith(_HF):
        for row, where in _rows(source):
            source = dataclasses.replace(source, field=source.field or text_field(row))
            yield from_record(row, source.field, where)
    else:
        files = find_files(source.label)
        folder = yield from _account(source, files, SUFFIXES)
        for path in files:
            yield from read_file(path, source.field, folder)


def _account(source: Source, files: Sequence[Path], suffixes: tuple[str, ...]) -> Generator[Remark, None, Path | None]:
    """Remarks on the files of a folder that are read, and on each that is left out; the folder, if it is one."""
    folder = Path(expanduser(source.label))
    if not folder.is_dir() or (folder / CLEANED).is_file():
        return None
    counts = Counter(_kind(path) for path in files)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    yield Remark(f"{len(files)} file{'s' * (len(files) > 1)}: {kinds}", is_counted=False)
    for path in _walk(folder, frozenset(), ("",), with_hidden=True):
        is_hidden = path.name.startswith(".")
        if is_hidden or not _is_of(path, suffixes):
            yield Remark("hidden" if is_hidden else _kind(path), file=str(path.relative_to(folder)))
    return folder


def _kind(path: Path) -> str:
    return format_of(path) or "without suffix"


def _is_of(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file has one of the suffixes, perhaps with that of a compression behind."""
    return plain_name(path.name).lower().endswith(tuple(map(str.lower, suffixes)))


def _record_items(source: Source) -> Iterator[Record | BadText | Remark]:
    if source.name.startswith(_HF):
        yield from (Record(row, where) for row, where in _rows(source))
        return
    files = find_files(source.label, RECORDS)
    yield from _account(source, files, RECORDS)
    for path in files:
        if not holds_records(path):
            expected = f"a file ending in {' '.join(RECORDS)}, perhaps with .gz, .zst or .bz2 behind"
            raise InputError("this file holds no records", where=path, expected=expected)
        yield from read_records(path)


def cleaning_of(source: Source) -> dict[str, Any] | None:
    """Pipeline and fingerprint of the cleaning that made a source, its folder or shards of it; None: there was none."""
    if source.name in _NAMES or source.name.startswith(_HF) or Task.of(source.name) is not None:
        return None
    given = Path(expanduser(source.label))
    files = [given] if given.exists() else list(map(Path, glob.glob(str(given), recursive=True)))
    folders = {given} if given.is_dir() else {file.parent for file in files}
    if len(folders) != 1 or not (path := folders.pop() / CLEANED).is_file():
        return None
    with parsing(path):
        made = read_json(path)
        names = {path.parent / shard["file"] for shard in made["shards"]}
        is_made = given.is_dir() or names.issuperset(files)
        return {key: made[key] for key in ("pipeline", "fingerprint")} if is_made else None


def find_files(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Files of a path or a glob, sorted by name; at least one. A folder gives those with the suffixes."""
    path = Path(expanduser(name))
    if "://" in name:
        raise InputError("a URL instead of a path", found=name, fix="download it first")
    with reading(path, "this source"):  # no file can have some names, and what is there may be closed
        is_cleaned, is_unfinished = (path / CLEANED).is_file(), (path / UNFINISHED).is_dir()
    if is_cleaned:
        with parsing(path / CLEANED):
            names = [str(shard["file"]) for shard in read_json(path / CLEANED)["shards"]]
        if out := next((name for name in names if Path(name).name != name), None):
            raise InputError("a file outside the folder", where=path / CLEANED, found=out, expected="a plain name")
        return [path / name for name in names]
    if is_unfinished:
        raise InputError("this cleaning is not finished", where=path, fix="run minillama data clean again: it goes on")
    what = "this folder holds no text files"
    if path.is_dir():
        found = list(_walk(path, frozenset(), suffixes))
        expected = f"files ending in {' '.join(suffixes)}, perhaps with .gz, .zst or .bz2 behind"
    elif path.exists() or path.is_symlink():
        return [path]
    else:
        found = [match for match in map(Path, sorted(glob.glob(str(path), recursive=True))) if not match.is_dir()]
        what = "nothing matches this source" if glob.has_magic(name) else "no such file, folder or built-in source"
        expected = f"a path, a glob, {', '.join(_NAMES)}, or hf:NAME"
    if not found:
        close = get_close_matches(name, _NAMES, n=1)
        fix = f"did you mean {close[0]!r}?" if close else None if glob.has_magic(name) else nearest_path(path)
        raise InputError(what, where="data.sources", found=name, expected=expected, fix=fix)
    return found


def _walk(folder: Path, above: frozenset[Path], suffixes: tuple[str, ...], with_hidden: bool = False) -> Iterator[Path]:
    """Files below a folder with one of the suffixes. Links are followed, circular ones refused.

    Hidden files and folders are left out, or stand as they are, unopened.
    """
    real = folder.resolve()
    if real in above:
        raise InputError("this link is circular: it leads back to a parent folder", where=folder, fix="remove it")
    check_size(len(above), DEPTH, folder, "folders above it")
    with reading(folder, "this folder"):
        entries = sorted(folder.iterdir(), key=lambda path: path.name)
    for path in entries:
        if path.name.startswith("."):
            yield from [path] * with_hidden
        elif path.is_dir():
            yield from _walk(path, above | {real}, suffixes, with_hidden)
        elif _is_of(path, suffixes):
            yield path


def _rows(source: Source) -> Iterator[tuple[Any, str]]:
    """Streamed rows of split `train` of a data set of the hub, and where each is."""
    datasets = optional_import("datasets", source.name, "data")
    name, _, config = source.name.removeprefix(_HF).partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield row, f"{source.name}, row {number}"
    except Exception as error:  # the library and its dependencies raise anything
        found = f"{type(error).__name__}: {error}"
        raise InputError("the datasets library cannot read this", where=source.name, found=found) from error
