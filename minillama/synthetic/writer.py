"""Resumable file of generated records: JSONL that grows by whole batches, and its provenance beside it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import minillama
from minillama.errors import InputError
from minillama.files import digest, json_lines, parsing, read_json, regular, replace_text

T = TypeVar("T")
CUT = "answers cut off, and kept"
"""Name of a count: answers of lines that end at max_new_tokens, or where the context or a filter ended them."""
Line = Mapping[str, Any]
Made = tuple[Sequence[Line], Mapping[str, int]]
"""Lines of a batch, and counts of what was left out, by the reason."""


class Generated:
    """Output file of a generation, which a stopped one continues.

    A batch is appended and synced, and then the provenance beside, FILE.provenance.json, is replaced, with the number
    of bytes and of units that are done. Whatever a killed process wrote behind them is cut off and made again, so that
    no line is lost or doubled. A second process that writes the same file is stopped at its next batch.

    Args:
        path: the file, .jsonl.
        about: what the lines depend on; a continued file must have the same. Paths in `inputs` are digested.
        inputs: files that are read.

    Attributes:
        done: units that are done.
        counts: of lines and of what was left out, by the reason.

    Raises:
        InputError: the file is there without its provenance, shorter than it says, or made otherwise.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], inputs: Sequence[Path] = ()) -> None:
        self.path, self.beside = path, path.with_name(f"{path.name}.provenance.json")
        files = {file.name: digest(file) for file in inputs if file.is_file()}
        self.about = json.loads(json.dumps({**about, "inputs": files}))
        self.done = self.bytes = 0
        self.counts: Counter[str] = Counter()
        self._begun = time.monotonic()
        if self.beside.exists():
            with self._open("ab") as file, parsing(self.beside):
                self._resume(file)
        elif path.exists() and path.stat().st_size:
            fix = "give another --output"
            raise InputError("the file exists, without a provenance file beside it", where=path, fix=fix)

    def _resume(self, file: IO[bytes]) -> None:
        size, state = os.fstat(file.fileno()).st_size, read_json(self.beside)
        other = [key for key, value in state["about"].items() if self.about.get(key) != value]
        if other:
            key, fix = min(other), "give another --output, or what the file was begun with"
            found, expected = self.about.get(key), state["about"].get(key)
            raise InputError(
                f"the file was begun with another {key}", where=self.path, found=found, expected=expected, fix=fix
            )
        if size < state["bytes"]:
            found, expected = f"{size:,} bytes", f"{state['bytes']:,} or more"
            raise InputError("the file has lost lines", where=self.path, found=found, expected=expected)
        file.truncate(state["bytes"])
        self.done, self.bytes, self.counts = state["done"], state["bytes"], Counter(state["counts"])

    def lines(self) -> Iterator[dict[str, Any]]:
        """Lines that are there."""
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file, parsing(self.path):
                yield from map(json.loads, file)

    def commit(self, lines: Sequence[Line], done: int, left_out: Mapping[str, int]) -> None:
        """Append the lines of a batch; from now on `done` units are done.

        Raises:
            InputError: the file cannot be written, or another process has written to it.
        """
        data = json_lines(lines).encode()
        with self._open("ab") as file:
            if (size := os.fstat(file.fileno()).st_size) != self.bytes:
                found, expected = f"{size:,} bytes", f"{self.bytes:,}"
                what, fix = "another process has written to the file", "let it end, then give the same command again"
                raise InputError(what, where=self.path, found=found, expected=expected, fix=fix)
            if not self.beside.exists():
                self._save()  # in front of the first line, which a killed process could leave alone otherwise
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self.done, self.bytes = done, self.bytes + len(data)
            self.counts.update({"lines": len(lines), **left_out})
            self._save()

    @contextmanager
    def _open(self, mode: str) -> Iterator[IO[bytes]]:
        try:
            with open(self.path, mode, opener=regular) as file:
                with suppress(ImportError, OSError):  # Windows, and file systems that have none
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX)  # between the lines and the provenance of another process
                yield file
        except OSError as error:
            raise InputError("cannot write", where=self.path, found=error.strerror) from error

    def _save(self) -> None:
        progress = {"done": self.done, "bytes": self.bytes, "counts": dict(self.counts)}
        state = {"about": self.about, "minillama": minillama.__version__, **progress}
        replace_text(self.beside, json.dumps(state, ensure_ascii=False, indent=1) + "\n")

    def each(self, units: Sequence[T], make: Callable[[Sequence[T], int], Made], batch: int) -> None:
        """Make the lines of units that are known beforehand, batch by batch.

        Args:
            units: in order.
            make: lines of some units, from the number of the first on; they depend on nothing else.
            batch: units at once.
        """
        before = self.done
        while self.done < len(units):
            part = units[self.done : self.done + batch]
            lines, left_out = make(part, self.done)
            self.commit(lines, self.done + len(part), left_out)
            self.say(self.done, len(units), before)

    def say(self, done: int, total: int, before: int) -> None:
        """Progress on standard error, with the time that is left at the mean speed since this process had `before`."""
        speed = (done - before) / max(1e-9, time.monotonic() - self._begun)
        left = round((total - done) / speed) if speed > 0 else None
        known = "time left not known yet" if left is None else f"{left // 60} min {left % 60} s left"
        rest = f", {known}" if done < total else ""
        print(f"{done:,} of {total:,}{rest}; {summary(self.counts)}", file=sys.stderr, flush=True)


def summary(counts: Mapping[str, int]) -> str:
    """Counts in one line, lines first and then what was left out, the most frequent reason first."""
    rest = sorted(((count, name) for name, count in counts.items() if name != "lines" and count), reverse=True)
    found = [f"{counts.get('lines', 0):,} lines", *(f"{count:,} {name}" for count, name in rest)]
    return ", ".join(found)
