"""Cleaning pipeline: sources and steps of one TOML file, in the order written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import NamedTuple

from minillama.config.loader import build, config_path, read_toml, to_dict
from minillama.data.cleaning.c4 import C4, MC4
from minillama.data.cleaning.chinese import Chinese
from minillama.data.cleaning.classifier import Classifier
from minillama.data.cleaning.code import Code
from minillama.data.cleaning.document import Step
from minillama.data.cleaning.duplicates import DuplicateParagraphs, ExactDuplicates, HostLines
from minillama.data.cleaning.extraction import Extract
from minillama.data.cleaning.fineweb import FineWeb
from minillama.data.cleaning.gopher import GopherQuality, GopherRepetition
from minillama.data.cleaning.grouping import CorpusStep
from minillama.data.cleaning.inputs import CommandLineInput, Input
from minillama.data.cleaning.language import Language
from minillama.data.cleaning.latex import Latex
from minillama.data.cleaning.minhash import NearDuplicates
from minillama.data.cleaning.model_score import ModelScore
from minillama.data.cleaning.overlap import Overlap
from minillama.data.cleaning.perplexity import Buckets, Perplexity
from minillama.data.cleaning.personal import PersonalData
from minillama.data.cleaning.repair import Repair, SimplifiedChinese
from minillama.data.cleaning.stackexchange import StackExchange
from minillama.data.cleaning.topics import SensitiveWords
from minillama.errors import InputError
from minillama.files import digest

_Pages = Extract | Repair | SimplifiedChinese | Language | PersonalData | SensitiveWords
_Rules = C4 | MC4 | Chinese | Code | FineWeb | GopherQuality | GopherRepetition | Latex | StackExchange
_Scores = Classifier | ModelScore | Perplexity
_Corpus = Buckets | DuplicateParagraphs | ExactDuplicates | HostLines | NearDuplicates | Overlap
AnyStep = _Pages | _Rules | _Scores | _Corpus
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
        tags, identified = [source.label for source in self.sources], False
        for i, step in enumerate(self.steps):
            if unknown := set(step.sources) - set(tags):
                what, where = "a step for a source that is not there", f"steps.{i}.sources"
                raise InputError(what, where=where, found=unknown.pop(), expected=", ".join(tags))
            if step.languages and not identified:
                what, fix = (
                    "a step for some languages, which no step before identifies",
                    'put name = "language" before it',
                )
                raise InputError(what, where=f"steps.{i}.languages", found=", ".join(step.languages), fix=fix)
            identified |= isinstance(step, Language)

    @classmethod
    def load(cls, name: str) -> Pipeline:
        """Pipeline of a TOML file, or of a name in configs/data.

        Raises:
            InputError: file, line and field of what is wrong.
        """
        table, origin = read_toml(config_path("data", name))
        return build(cls, table, origin)

    def with_sources(self, words: tuple[str, ...]) -> Pipeline:
        """The pipeline on other sources, read as its first one: the same field, the same files of folders."""
        first = self.sources[0] if self.sources else Input("")
        sources = (CommandLineInput(word, field=first.field, suffixes=first.suffixes) for word in words)
        return replace(self, sources=tuple(sources))

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
        paths = [path for step in self.steps for path in step.files()]
        files = [digest(file) for path in paths for file in sorted([path, *path.rglob("*")]) if file.is_file()]
        return sha256(json.dumps([to_dict(self)["steps"], files], sort_keys=True).encode()).hexdigest()
