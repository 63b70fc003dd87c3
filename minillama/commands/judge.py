"""Comparison of the answers of two models by a judge."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minillama.commands.progress import Progress
from minillama.commands.tables import print_table
from minillama.files import append_lines, complete_records, json_lines, replace_text, stamp
from minillama.inference.load import DType, ModelArgs, Quantize

if TYPE_CHECKING:
    from minillama.evaluate.judge import Ask, Question, Verdict


@dataclass(frozen=True)
class Judge:
    """Ask a judge whose answers are better, in both orders; a win counts if both verdicts agree."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A model with its own tokenizer, an adapter merged into it; or a .jsonl file of answers (question_id,
    choices[0].turns)."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other one."""
    judge: str
    """Model that judges, by its chat template; or the URL of an OpenAI-compatible endpoint, up to /v1. It is sent the
    questions and answers, and OPENAI_API_KEY if that is set."""
    judge_name: str = ""
    """Model of the endpoint; the first that it lists unless given."""
    questions: Path | None = None
    """.jsonl file in the form of Vicuna (text), MT-bench (turns) or Ziya (task, kind, question, reference); 30 of the
    last form, in English and Chinese, unless given."""
    mode: Literal["pairwise", "single"] = "pairwise"
    """pairwise: which of the two is better; single: ratings from 1 to 10, of each alone."""
    output: Path = Path("judged")
    """Folder of answers, verdicts, figures and the HTML report; what it has of the same models and questions is not
    asked for again."""
    max_new_tokens: int = field(default=512, metadata={"min": 1})
    """New tokens of an answer at most."""
    judge_tokens: int = field(default=512, metadata={"min": 1})
    """New tokens of a verdict at most."""
    template: str = ""
    """Chat template of A and B instead of their own."""
    limit: int = field(default=0, metadata={"min": 0})
    """The first so many questions; 0: all."""
    dtype: DType = "auto"
    """Weight dtype, see generate."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    quantize: Quantize = "auto"
    """Weight quantization, see generate."""

    def run(self) -> int:
        """Compare."""
        from minillama.evaluate import judge, judge_report

        questions = judge.read_questions(self.questions or judge.QUESTIONS)[: self.limit or None]
        names = [f"{side}: {_name(path)}" for side, path in zip("AB", (self.a, self.b), strict=True)]
        files = [self._answers(side, path, questions) for side, path in zip("AB", (self.a, self.b), strict=True)]
        ours, theirs = (judge.read_answers(file, questions) for file in files)
        if self.mode == "pairwise":
            verdicts = self._verdicts(judge.pairwise_prompts(questions, ours, theirs))
            table = judge_report.pairwise(questions, ours, theirs, judge_report.values_of(verdicts))
        else:
            prompts = judge.single_prompts(questions, ours, "a") | judge.single_prompts(questions, theirs, "b")
            verdicts = self._verdicts(prompts)
            table = judge_report.single(questions, judge_report.values_of(verdicts))
        lengths = (sum(len(text) for turns in own for text in turns) / len(questions) for own in (ours, theirs))
        shown = (
            f"{name} with {length:.0f} characters per question" for name, length in zip(names, lengths, strict=True)
        )
        table.notes.append("; ".join(shown))
        for name, file in zip(names, files, strict=True):
            reasons = judge.read_reasons(file, questions)
            for reason, what in CUT.items():
                table.notes.extend([f"{name}: {reasons[reason]} answers {what}"] * (reasons[reason] > 0))
        print_table(table.headers[0], table.headers[1:], table.rows)
        print("\n".join(table.notes))
        settings = {"a": self.a, "b": self.b, "judge": self.judge, "mode": self.mode, "questions": len(questions)}
        value = settings | {"results": table.figures, "notes": table.notes}
        texts = {key.rpartition("/")[0]: verdict.text for key, verdict in verdicts.items()}
        for ending, text in (
            (".json", json.dumps(value, indent=2, ensure_ascii=False) + "\n"),
            (".html", judge_report.page(names, table, questions, (ours, theirs), texts)),
        ):
            print(f"written: {replace_text(self.output / (self.mode + ending), text)}", file=sys.stderr)
        return 0

    def _load(self, path: str, template: str = "") -> Ask:
        from minillama.inference.remote import Local

        model = ModelArgs(path, None, self.dtype, self.device).load(self.quantize, compiles=True)
        return Local(*model, path, template)

    def _judge(self) -> Ask:
        from minillama.inference.remote import Remote

        if "://" in self.judge:
            return Remote(self.judge, self.judge_name, options=("--judge", "--judge-name"))
        return self._load(self.judge)

    def _answers(self, side: str, path: str, questions: Sequence[Question]) -> Path:
        """File of a side's answers."""
        from minillama.evaluate import judge

        if path.endswith(".jsonl"):
            return Path(path)
        told = json.dumps([stamp([Path(path)]), str(Path(path).resolve()), [asdict(one) for one in questions]])
        told += json.dumps([self.max_new_tokens, self.template, self.dtype, self.quantize])
        file = self.output / f"answers-{side}-{_name(path)}-{sha256(told.encode()).hexdigest()[:8]}.jsonl"
        if file.exists():
            return file
        print(f"{path}: answering {len(questions)} questions", file=sys.stderr)
        found = judge.answer(self._load(path, self.template), questions, self.max_new_tokens)
        lines = [
            {
                "question_id": one.id,
                "choices": [{"index": 0, "turns": [a.text for a in own], "reasons": [a.reason for a in own]}],
            }
            for one, own in zip(questions, found, strict=True)
        ]
        return replace_text(file, json_lines(lines))

    def _verdicts(self, prompts: Mapping[str, Any]) -> dict[str, Verdict]:
        from minillama.evaluate.judge import Verdict, ask_verdicts, verdict_of

        name = re.sub(r"[^\w.-]+", "-", f"{_name(self.judge)} {self.judge_name}".strip())
        judge = self.judge if "://" in self.judge else str(Path(self.judge).resolve())
        made = "" if "://" in self.judge else stamp([Path(judge)])
        told = json.dumps([judge, self.judge_name, self.judge_tokens, self.dtype, self.quantize, made])
        path = self.output / f"verdicts-{name}-{sha256(told.encode()).hexdigest()[:8]}.jsonl"
        given = complete_records(path, lambda value: Verdict(**value), "this line is not a verdict")
        known = {one.key: one for one in given}
        left = {key: prompt for key, prompt in prompts.items() if key not in known}
        if left:
            self.output.mkdir(parents=True, exist_ok=True)
            ask = self._judge()
            with Progress("verdicts", len(left)) as progress:
                for verdict in ask_verdicts(ask, left, self.judge_tokens, self.mode):
                    append_lines(path, [verdict._asdict()])
                    known[verdict.key] = verdict
                    progress.advance(1)
        return {key: known[key]._replace(value=verdict_of(known[key].text, self.mode)) for key in prompts}


CUT = {
    "length": "were cut at the most new tokens, and judged so",
    "context": "are empty or cut, as the conversation did not fit the model's context, and judged so",
}
"""Finish reasons of answers that are not complete, as notes have them."""


def _name(path: str) -> str:
    return Path(path).resolve().name.removesuffix(".jsonl")
