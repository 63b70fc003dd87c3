"""Cleaning pipeline: sources and steps of one TOML file, in the order written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

from minillama.config.loader import build, config_path, read_toml, to_dict
from minillama.data.cleaning import c4, duplicates, fineweb, gopher, minhash
from minillama.data.cleaning.document import Step
from minillama.data.cleaning.grouping import CorpusStep
from minillama.data.cleaning.inputs import Input
from minillama.errors import InputError
from minillama.files import digest

AnyStep = (
    gopher.GopherQuality
    | gopher.GopherRepetition
    | c4.C4
    | c4.MC4
    | fineweb.FineWeb
    | duplicates.ExactDuplicates
    | duplicates.DuplicateParagraphs
    | duplicates.HostLines
    | minhash.NearDuplicates
)
"""The steps by their field `name`: a step is added here and in its own file."""


class Stage(NamedTuple):
    """Steps between two that need all documents: `opening` is settled first, `closing` is collected for at the end."""

    opening: CorpusStep | None
    steps: tuple[Step, ...]
    closing: CorpusStep | None
    first: int  # number in the pipeline of the first of `all`

    @property
    def all(self) -> tuple[Step, ...]:
        """The opening step, if there is one, and the others."""
        return (self.opening, *self.steps) if self.opening else self.steps


@dataclass(frozen=True)
class Pipeline:
    """Cleaning pipeline.

    Args:
        name: name in reports and in the provenance of runs.
        sources: what is read; of duplicates, the source named first is kept.
        steps: steps in order.
    """

    name: str = "pipeline"
    sources: tuple[Input, ...] = ()
    steps: tuple[AnyStep, ...] = ()

    def __post_init__(self) -> None:
        tags = [source.label for source in self.sources]
        for i, step in enumerate(self.steps):
            if unknown := set(step.sources) - set(tags):
                what, where = "a step for a source that is not there", f"steps.{i}.sources"
                raise InputError(what, where=where, found=unknown.pop(), expected=", ".join(tags))

    @classmethod
    def load(cls, name: str) -> Pipeline:
        """Pipeline of a TOML file, or of a name in configs/data.

        Raises:
            InputError: file, line and field of what is wrong.
        """
        table, origin = read_toml(config_path("data", name))
        return build(cls, table, origin)

    def with_sources(self, words: tuple[str, ...]) -> Pipeline:
        """The pipeline on other sources."""
        return replace(self, sources=tuple(Input(word) for word in words))

    @property
    def stages(self) -> list[Stage]:
        """The steps, cut at those that need all documents."""
        return list(self._stages())

    def _stages(self) -> Iterator[Stage]:
        opening: CorpusStep | None = None
        first = 0
        for i, step in enumerate((*self.steps, None)):
            if step is None or isinstance(step, CorpusStep):
                start = first + (opening is not None)
                yield Stage(opening, self.steps[start:i], step, first)
                opening, first = step, i

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the steps and of the files that they read."""
        files = [digest(path) for step in self.steps for path in step.files() if path.is_file()]
        return sha256(json.dumps([to_dict(self)["steps"], files], sort_keys=True).encode()).hexdigest()
