"""Models of a cleaning: an n-gram language model and a quality classifier, trained from texts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minillama.commands.tables import print_pairs
from minillama.config.loader import check
from minillama.data.cleaning.classifier import LinearClassifier
from minillama.data.cleaning.perplexity import PieceLM
from minillama.data.skipped import Skipped
from minillama.data.sources import Source, documents
from minillama.errors import InputError
from minillama.tokenizer import Tokenizer


@dataclass(frozen=True)
class TrainNgramLM:
    """Train an n-gram language model (interpolated modified Kneser-Ney) over the pieces of a tokenizer."""

    input: tuple[str, ...]
    """Training text: files, folders, globs, JSONL, .gz, .zst, python-docs, python-code, hf:NAME."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Tokenizer file or folder."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Output folder; it must not exist."""
    order: int = field(default=5, metadata={"min": 2, "max": 9})
    """n of the longest n-grams."""
    min_count: int = field(default=1, metadata={"min": 1})
    """Leave out rarer n-grams, from order 3 on."""
    characters: int = field(default=200_000_000, metadata={"min": 1})
    """Text that is read at most; a token needs about 200 bytes of memory."""
    keep_case: tyro.conf.FlagCreatePairsOff[bool] = False
    """Keep case, accents and numbers, which CCNet's normalization takes away."""
    arpa: Path | None = None
    """ARPA file to write as well, .arpa or .arpa.gz, which KenLM reads."""

    def run(self) -> int:
        """Train and save."""
        check(self)
        if self.output.exists():
            raise InputError("the output folder exists already", where=self.output, fix="name another one")
        texts, tokenizer = _texts(self.input, self.characters), Tokenizer.load(self.tokenizer)
        made = PieceLM.train(texts, tokenizer, self.order, self.min_count, not self.keep_case)
        made.save(self.output)
        if self.arpa is not None:
            made.lm.write_arpa(self.arpa)
        print_pairs(f"{self.output}", {f"{n}-grams": f"{len(p):,}" for n, p in enumerate(made.lm.log10s, 1)})
        return 0


@dataclass(frozen=True)
class TrainClassifier:
    """Train a classifier of texts like these against texts like those: quality, or a sensitive topic."""

    like: tuple[str, ...]
    """Texts of the wanted kind: files, folders, globs, JSONL, python-docs, hf:NAME."""
    unlike: tuple[str, ...]
    """Texts of the other kind."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """Output file, .safetensors."""
    limit: int = field(default=300_000, metadata={"min": 10})
    """Documents of each kind that are read at most; as many of one as of the other are trained on."""
    bits: int = field(default=20, metadata={"min": 8, "max": 26})
    """Binary logarithm of the number of weights."""
    epochs: int = field(default=5, metadata={"min": 1})
    """Passes over the documents."""
    seed: int = field(default=0, metadata={"min": 0})
    """Random seed of the order and of the held-out fifth."""

    def run(self) -> int:
        """Train and save."""
        check(self)
        like, unlike = _texts(self.like), _texts(self.unlike)
        made = LinearClassifier.train(
            like, unlike, limit=self.limit, bits=self.bits, epochs=self.epochs, seed=self.seed
        )
        made.save(self.output)
        print_pairs(f"{self.output}, on held-out documents", dict(made.held_out))
        return 0


def _texts(names: tuple[str, ...], characters: int = sys.maxsize) -> Iterator[str]:
    """Texts of sources, up to a number of characters; those that cannot be read are counted."""
    report = Skipped()
    for text in (d.text for name in names for d in documents(Source(name), "skip", report)):
        yield text[:characters]
        characters -= len(text)
        if characters <= 0:
            break
    if report.total:
        print(report, file=sys.stderr)
