"""Grades of conversations by difficulty, and buckets from easy to hard for the stages of a curriculum."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minillama.config.loader import check
from minillama.data.conversations import Format, read_record
from minillama.data.reading import Record, Skipped
from minillama.data.sources import OnError, Source, records, skipping
from minillama.errors import InputError
from minillama.files import json_lines, replace_folder
from minillama.inference.load import ModelArgs
from minillama.tokenizer.rendering import encode, truncated
from minillama.tokenizer.template import load_template

if TYPE_CHECKING:
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Difficulty(ModelArgs):
    """Grade conversations by a model's loss per answer token, and write them in buckets from easy to hard.

    Each record keeps its members and gets `difficulty`, in nats per token. DIR/bucket-1.jsonl is the easiest; the
    stages of a run that takes them one after the other are printed.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Conversations, as of `data show`."""
    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """New folder."""
    buckets: int = field(default=3, metadata={"min": 1})
    """Number of buckets, of equal numbers of records."""
    template: str = ""
    """Chat template; the model's own unless given."""
    format: Format = "auto"
    """Format of the records; auto: as their fields say."""
    context: int = field(default=512, metadata={"min": 2})
    """Truncate to so many tokens, as training does."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Conversations per step of the printed stages, which are one epoch each."""
    on_error: OnError = "stop"
    """On a record that cannot be read or has no trained token: stop, or count it and continue."""

    def run(self) -> int:
        """Grade."""
        from minillama.evaluate.difficulty import buckets

        check(self)
        if self.output.exists():
            raise InputError("the folder exists", where=self.output, fix="give another --output")
        report, model_and_tokenizer = Skipped(), self.load()
        graded = list(self._graded(*model_and_tokenizer, report))
        if len(graded) < self.buckets:
            found = f"{len(graded)}; {report}" if report.total else len(graded)
            raise InputError("fewer records than buckets", where=self.source, found=found, expected=self.buckets)
        parts = [[graded[i] for i in part] for part in buckets([grade for _, grade in graded], self.buckets)]
        replace_folder(self.output, lambda folder: _write(folder, parts))
        print(str(report) + "\n" * bool(str(report)), end="", file=sys.stderr)
        end = 0
        for number, part in enumerate(parts, 1):
            grades, end = [grade for _, grade in part], end - (-len(part) // self.batch_size)
            print(f"# {len(part):,} records, {min(grades):.3f} to {max(grades):.3f} nats per answer token")
            path = json.dumps(str(self.output / f"bucket-{number}.jsonl"))
            print(f"[[stages]]\nuntil_step = {end}\ndata = {{ sources = [{{ path = {path} }}] }}\n")
        return 0

    def _graded(self, model: Decoder, tokenizer: Tokenizer, report: Skipped) -> Iterator[tuple[Record, float]]:
        from minillama.evaluate.difficulty import answer_nats

        if model.config.objective != "lm":
            what = "difficulty is the loss of next-token prediction"
            raise InputError(what, where=self.model, found=f"a model for {model.config.objective}")
        template, context = load_template(self.template, tokenizer), min(self.context, model.config.max_seq_len)
        for record in records(Source(self.source), self.on_error, report):
            with skipping(self.on_error, report, record.where, "no grade"):
                rendered = [encode(found, template, tokenizer) for found in read_record(record, self.format, report)]
                pairs = [answer_nats(model, truncated(one, context + 1, tokenizer.bos_id)) for one in rendered]
                nats, weight = map(sum, zip(*pairs, strict=True))
                if not weight:
                    raise InputError("no trained token is within the context", where=record.where)
                yield record, nats / weight


def _write(folder: Path, parts: list[list[tuple[Record, float]]]) -> None:
    for number, part in enumerate(parts, 1):
        text = json_lines({**record.value, "difficulty": round(grade, 4)} for record, grade in part)
        (folder / f"bucket-{number}.jsonl").write_text(text, encoding="utf-8")
