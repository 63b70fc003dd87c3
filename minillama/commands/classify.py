"""Cloze classification: one JSON line per record, in order; accuracy on standard error where labels are known."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minillama.config.loader import check
from minillama.data.reading import Record
from minillama.data.skipped import BadText
from minillama.data.sources import Source, records
from minillama.errors import InputError
from minillama.evaluate.question import Question
from minillama.inference.load import ModelArgs


@dataclass(frozen=True)
class Args(ModelArgs):
    """Command-line arguments."""

    model: str
    """Folder of a model trained for infilling, best after --objective.name cloze."""
    question: Annotated[Question, tyro.conf.arg(name="")] = field(default_factory=Question)
    text: tuple[str, ...] = ()
    """One or more records, each given by its field `text`."""
    records: Path | None = None
    """A .jsonl file of records."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Records per forward pass."""


def run(args: Args) -> int:
    """Print label and label probabilities of each record."""
    check(args)
    if not args.question.pattern:
        raise InputError("there is no question", where="--pattern", fix="give --pattern and --verbalizers; see --help")
    asked = _records(args)
    from minillama.evaluate.cloze import Cloze

    model, tokenizer = args.load()
    cloze, labels = Cloze(args.question, tokenizer, model.config.max_seq_len), args.question.labels
    known: Counter[str] = Counter()
    right = 0
    try:
        layouts = [cloze.layouts(record) for record in asked]
        truths = [labels[cloze.label(r)] if args.question.label in r.value else None for r in asked]
    except BadText as error:  # its fix is that of a training run
        raise InputError(error.what, where=error.where, found=error.found, expected=error.expected) from None
    for truth, scores in zip(truths, cloze.log_probabilities(model, layouts, args.batch_size), strict=True):
        label = labels[scores.index(max(scores))]
        probabilities = {name: round(math.exp(score), 6) for name, score in zip(labels, scores, strict=True)}
        print(json.dumps({"label": label, "probabilities": probabilities}, ensure_ascii=False), flush=True)
        if truth is not None:
            known[truth] += 1
            right += label == truth
    if count := known.total():
        majority, most = known.most_common(1)[0]
        print(
            f"accuracy {right / count:.4f} of {count} records with a label; always {majority!r}: {most / count:.4f}",
            file=sys.stderr,
        )
    elif args.records is not None:
        print(f"no record has a field {args.question.label!r}, so there is no accuracy; see --label", file=sys.stderr)
    return 0


def _records(args: Args) -> list[Record]:
    if bool(args.text) == (args.records is not None):
        raise InputError("give either --text or --records", where="command line")
    if args.records is None:
        return [Record({"text": text}, f"text {i}") for i, text in enumerate(args.text, 1)]
    found = list(records(Source(path=str(args.records))))
    if not found:
        raise InputError("the file holds no record", where=args.records)
    return found
