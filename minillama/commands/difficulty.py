"""Grades of conversations by difficulty, and buckets from easy to hard for the stages of a curriculum."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import tyro

from minillama.commands.data_synthetic import open_teacher
from minillama.config.loader import check
from minillama.data.conversations import Format, read_record
from minillama.data.reading import Record
from minillama.data.skipped import Skipped
from minillama.data.sources import OnError, Source, records, skipping
from minillama.errors import InputError
from minillama.files import cache_folder, json_lines, replace_folder
from minillama.inference.load import ModelArgs
from minillama.synthetic.wording import Language, wording
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.rendering import encode, truncated
from minillama.tokenizer.template import load_template

if TYPE_CHECKING:
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Difficulty(ModelArgs):
    """Grade conversations by a model's loss per answer token or by a teacher, and write them from easy to hard.

    Each record keeps its members and gets `difficulty`, in nats per token, or from 1 to 5. DIR/bucket-1.jsonl is the
    easiest; the stages of a run that takes them one after the other are printed.
    """

    model: str = ""
    """The model whose loss is the grade: a Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    teacher: Annotated[str, tyro.conf.arg(metavar="URL|MODEL")] = ""
    """In place of --model: an endpoint or model that is asked for a grade from 1 to 5; the mean over its digits."""
    teacher_model: str = ""
    """Model of the endpoint; the first it lists unless given."""
    language: Language = "en"
    """Language of the question to the teacher."""
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
        if bool(self.model) == bool(self.teacher):
            both = "both" if self.model else "none"
            raise InputError("one of --model and --teacher grades", where="command line", found=both)
        report, unit = Skipped(), "of 1 to 5" if self.teacher else "nats per answer token"
        graded = list(self._by_teacher(report) if self.teacher else self._by_loss(*self.load(), report))
        if len(graded) < self.buckets:
            found = f"{len(graded)}" + f"; {report}" * bool(report.total)
            raise InputError("fewer records than buckets", where=self.source, found=found, expected=self.buckets)
        parts = [[graded[i] for i in part] for part in buckets([grade for _, grade in graded], self.buckets)]
        replace_folder(self.output, lambda folder: _write(folder, parts))
        print(str(report) + "\n" * bool(str(report)), end="", file=sys.stderr)
        end = 0
        for number, part in enumerate(parts, 1):
            grades, end = [grade for _, grade in part], end - (-len(part) // self.batch_size)
            print(f"# {len(part):,} records, {min(grades):.3f} to {max(grades):.3f} {unit}")
            path = json.dumps(str(self.output / f"bucket-{number}.jsonl"))
            print(f"[[stages]]\nuntil_step = {end}\ndata = {{ sources = [{{ path = {path} }}] }}\n")
        return 0

    def _by_loss(self, model: Decoder, tokenizer: Tokenizer, report: Skipped) -> Iterator[tuple[Record, float]]:
        from minillama.evaluate.difficulty import answer_nats

        if model.config.objective != "lm":
            what = "difficulty is the loss of next-token prediction"
            raise InputError(what, where=self.model, found=f"a model for {model.config.objective}")
        template, context = load_template(self.template, tokenizer), min(self.context, model.config.max_seq_len)
        for record, found in self._read(report):
            with skipping(self.on_error, report, record.where, "no grade"):
                rendered = [encode(one, template, tokenizer) for one in found]
                pairs = [answer_nats(model, truncated(one, context + 1, tokenizer.bos_id)) for one in rendered]
                nats, weight = (sum(column) for column in zip(*pairs, strict=True))
                if not weight:
                    raise InputError("no trained token is within the context", where=record.where)
                yield record, nats / weight

    def _by_teacher(self, report: Skipped) -> Iterator[tuple[Record, float]]:
        from minillama.evaluate.difficulty import teacher_grades

        cache, read = cache_folder() / "teacher", list(self._read(report))
        teacher = open_teacher(self.teacher, self.dtype, self.device, model=self.teacher_model, cache=cache)
        conversations, question = [one for _, found in read for one in found], wording(self.language)["grade"]
        grades = iter(teacher_grades(teacher, conversations, question))
        for record, found in read:
            own = [next(grades) for _ in found]
            with skipping(self.on_error, report, record.where, "no grade"):
                given = [grade for grade in own if grade is not None]
                if len(given) < len(own):
                    fix = "take another teacher, or --on-error skip"
                    raise InputError("the teacher gave no grade", where=record.where, expected="1 to 5", fix=fix)
                yield record, mean(given)

    def _read(self, report: Skipped) -> Iterator[tuple[Record, list[Conversation]]]:
        for record in records(Source(self.source), self.on_error, report):
            with skipping(self.on_error, report, record.where, "no grade"):
                yield record, read_record(record, self.format, report)


def _write(folder: Path, parts: list[list[tuple[Record, float]]]) -> None:
    for number, part in enumerate(parts, 1):
        text = json_lines({**record.value, "difficulty": round(grade, 4)} for record, grade in part)
        (folder / f"bucket-{number}.jsonl").write_text(text, encoding="utf-8")
