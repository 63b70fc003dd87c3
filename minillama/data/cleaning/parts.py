"""Files of a cleaning's parts: documents as compressed JSONL, tables as JSON; complete or absent."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minillama.data.cleaning.document import Draft, Removal, dumps
from minillama.errors import InputError, optional_import
from minillama.files import replace_file

_LEVEL = 3


@contextmanager
def write_part(path: Path) -> Iterator[BinaryIO]:
    """Open a zstd file that has its name only once it is complete.

    Raises:
        InputError: the system refuses, for instance because the disk is full.
    """
    zstandard = optional_import("zstandard", "cleaning", "data")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            with zstandard.ZstdCompressor(_LEVEL).stream_writer(file, closefd=False) as stream:
                yield stream
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError("cannot write", where=path, found=error.strerror or error) from error
        raise


def read_part(path: Path) -> Iterator[Draft]:
    """Documents of a file."""
    zstandard = optional_import("zstandard", "cleaning", "data")
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
        for line in io.BufferedReader(stream, 2**20):
            yield Draft.from_json(line)


def removed_line(draft: Draft, step: str, removal: Removal) -> bytes:
    """Line of a removed document: what removed it, then the document."""
    reason = {"step": step, "reason": removal.reason, "value": removal.value, "limit": removal.limit}
    return dumps({"removed": {k: v for k, v in reason.items() if v != ""}} | json.loads(draft.to_json()))


def join(path: Path, pieces: Sequence[Path]) -> None:
    """One zstd file of several: their frames, one behind the other."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for piece in pieces:
                with piece.open("rb") as other:
                    shutil.copyfileobj(other, file)

    replace_file(path, write)


def write_table(path: Path, table: Any) -> None:
    """Write JSON atomically."""
    replace_file(path, lambda file: file.write_bytes(dumps(table)))


def read_table(path: Path) -> Any:
    """JSON of a file."""
    return json.loads(path.read_bytes())
