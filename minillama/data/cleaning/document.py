"""Document in a cleaning pipeline, and the interface of its steps: measure, rewrite, compare with thresholds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from minillama.errors import InputError

Figures = Mapping[str, float | str]
"""What a step measured, by the measure's name."""


@dataclass
class Draft:
    """Document on its way through a pipeline.

    Args:
        text: the text, or the page's HTML before it is extracted.
        id: PART-INDEX, as it was read.
        source: tag of its source.
        where: file, and line or record.
        kind: `html` until a step extracts the text; empty for text.
        language: ISO 639 code, once a step has identified it.
        fields: the other fields of its record.
        measured: figures by step.
    """

    text: str
    id: str = ""
    source: str = ""
    where: str = ""
    url: str = ""
    kind: str = ""
    language: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Figures] = field(default_factory=dict)

    @property
    def index(self) -> int:
        """Number within its part."""
        return int(self.id.rpartition("-")[2])

    def to_json(self) -> bytes:
        """Line of JSONL, without the empty fields."""
        table = {name: value for name, value in vars(self).items() if value or name == "text"}
        return dumps(table)

    @classmethod
    def from_json(cls, line: bytes) -> Draft:
        """Document of a line that `to_json` made."""
        return cls(**json.loads(line))


def dumps(table: Mapping[str, Any]) -> bytes:
    """Line of JSONL; a lone surrogate, which UTF-8 cannot say, becomes a question mark."""
    return json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode(errors="replace") + b"\n"


class Removal(NamedTuple):
    """Reason for the removal of a document: a measure, its value, and the threshold that it crossed."""

    reason: str
    value: float | str = ""
    limit: float | str = ""


@dataclass(frozen=True)
class Step:
    """Step of a pipeline.

    `measure` is the step: it gives figures and may rewrite the text. A field `min_X` or `max_X` is a threshold of the
    figure `X`; the first that is crossed, in the order of the fields, removes the document.

    Args:
        title: name in figures and reports, where a pipeline has a step twice.
        languages: only documents of these languages; empty: all.
        sources: only documents of the sources with these tags; empty: all.
    """

    made_by: ClassVar[str | None] = None
    """How the file `path` is made, for messages."""

    name: str = ""
    title: str = ""
    languages: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Name of its figures."""
        return self.title or self.name

    @cached_property
    def limits(self) -> tuple[tuple[str, float, bool], ...]:
        """Thresholds: measure, value, whether it is the lower one."""
        bounds = [f.name for f in fields(self) if f.name.startswith(("min_", "max_"))]
        return tuple((name[4:], getattr(self, name), name.startswith("min_")) for name in bounds)

    def concerns(self, draft: Draft) -> bool:
        """Whether the step is for this document."""
        is_source = not self.sources or draft.source in self.sources
        return is_source and (not self.languages or draft.language in self.languages)

    def measure(self, draft: Draft) -> Figures:
        """Figures of a document, whose text it may rewrite."""
        raise NotImplementedError

    def __call__(self, draft: Draft) -> Removal | None:
        """Measure a document and compare."""
        return self.judge(draft, self.measure(draft))

    def judge(self, draft: Draft, figures: Figures) -> Removal | None:
        """Note the figures and compare them with the thresholds."""
        draft.measured[self.key] = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in figures.items()}
        for measure, limit, is_low in self.limits:
            value = figures.get(measure)
            if isinstance(value, int | float) and (value < limit if is_low else value > limit):
                return Removal(measure, round(value, 6), limit)
        return None

    def files(self) -> Sequence[Path]:
        """Files that the step reads: they are part of the pipeline's fingerprint."""
        return [
            Path(value) for f in fields(self) if f.name in ("path", "tokenizer") and (value := getattr(self, f.name))
        ]

    def check_files(self, where: str) -> None:
        """Refuse a step without its files, before a document is read.

        Raises:
            InputError: its path is not set, or is not there.
        """
        if getattr(self, "path", None) == "":
            raise InputError(f"{self.name} needs a file", where=f"{where}.path", expected="a path", fix=self.made_by)
        for path in self.files():
            if not path.exists():
                fix = self.made_by if path == Path(getattr(self, "path", "")) else None
                raise InputError(f"a file of {self.name} is not there", where=where, found=path, fix=fix)
