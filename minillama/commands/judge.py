"""Comparison of the answers of two models by a judge."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minillama.commands.progress import Progress
from minillama.commands.tables import print_table
from minillama.errors import InputError
from minillama.files import complete_lines, replace_file
from minillama.inference.load import ModelArgs, Quantize

if TYPE_CHECKING:
    from minillama.evaluate.judge import Ask, Question, Tally, Verdict


@dataclass(frozen=True)
class Judge:
    """Ask a judge whose answers are better, in both orders; a win counts if both verdicts agree."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """A model, or a .jsonl file of its answers (question_id, choices[0].turns)."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """The other one."""
    judge: str
    """Model that judges, by its chat template."""
    questions: Path | None = None
    """.jsonl file in the form of Vicuna (text), MT-bench (turns) or Ziya (task, kind, question, reference); 30 of the
    last form, in English and Chinese, unless given."""
    mode: Literal["pairwise", "single"] = "pairwise"
    """pairwise: which of the two is better; single: ratings from 1 to 10, of each alone."""
    output: Path = Path("judged")
    """Folder of answers, verdicts, figures and the HTML report; verdicts that it has are not asked for again."""
    max_new_tokens: int = field(default=512, metadata={"min": 1})
    """New tokens of an answer at most."""
    judge_tokens: int = field(default=512, metadata={"min": 1})
    """New tokens of a verdict at most."""
    template: str = ""
    """Chat template of A and B instead of their own."""
    limit: int = field(default=0, metadata={"min": 0})
    """The first so many questions; 0: all."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weight dtype, see generate."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    quantize: Quantize = "auto"
    """Weight quantization, see generate."""

    def run(self) -> int:
        """Compare."""
        from minillama.evaluate import judge

        if "://" in self.judge:
            what, expected = "a judge behind a URL is not supported yet", "a local model"
            raise InputError(what, where="--judge", found=self.judge, expected=expected)
        questions = judge.read_questions(self.questions or judge.QUESTIONS)[: self.limit or None]
        names = [self._name(path) for path in (self.a, self.b)]
        names = names if names[0] != names[1] else [f"{name} ({side})" for name, side in zip(names, "AB", strict=True)]
        answers = [self._answers(path, name, questions) for path, name in zip((self.a, self.b), names, strict=True)]
        if self.mode == "pairwise":
            prompts, pattern = judge.pairwise_prompts(questions, *answers), judge.PAIRWISE
        else:
            pairs = zip(answers, ("a", "b"), strict=True)
            prompts = {k: v for own, side in pairs for k, v in judge.single_prompts(questions, own, side).items()}
            pattern = judge.SINGLE
        verdicts = self._verdicts(prompts, pattern)
        tables, notes, values = (
            _pairwise(judge.summarize(questions, *answers, verdicts))
            if self.mode == "pairwise"
            else _single(questions, verdicts)
        )
        lengths = [sum(len(text) for turns in own for text in turns) / len(questions) for own in answers]
        notes.append(
            f"characters per question: A {lengths[0]:.0f}, B {lengths[1]:.0f}; A is {names[0]}, B is {names[1]}"
        )
        self._write(names, tables, notes, values, questions, answers, verdicts)
        return 0

    def _name(self, path: str) -> str:
        return Path(path).resolve().name.removesuffix(".jsonl")

    def _load(self, path: str, template: str = "") -> Ask:
        from minillama.evaluate.judge import LocalModel

        model, tokenizer = ModelArgs(path, None, self.dtype, self.device).load(self.quantize, compiles=True)
        return LocalModel(model, tokenizer, template)

    def _answers(self, path: str, name: str, questions: Sequence[Question]) -> list[list[str]]:
        from minillama.evaluate import judge

        if path.endswith(".jsonl"):
            return judge.read_answers(Path(path), questions)
        print(f"{name}: answering {len(questions)} questions", file=sys.stderr)
        found = judge.answer(self._load(path, self.template), questions, self.max_new_tokens)
        lines = [
            json.dumps(
                {"question_id": one.id, "model_id": name, "choices": [{"index": 0, "turns": own}]}, ensure_ascii=False
            )
            for one, own in zip(questions, found, strict=True)
        ]
        to = self.output / f"answers-{name}.jsonl"
        replace_file(to, lambda file: file.write_text("\n".join(lines) + "\n", encoding="utf-8"))
        return found

    def _verdicts(self, prompts: Mapping[str, Any], pattern: str) -> dict[str, Verdict]:
        from minillama.evaluate.judge import Verdict, ask_verdicts

        path = self.output / f"verdicts-{self._name(self.judge)}.jsonl"
        lines = [Verdict(**json.loads(line)) for line in complete_lines(path)]
        known, found = {one.key: one for one in lines}, dict[str, Verdict]()
        if prompts.keys() <= known.keys():
            return {key: known[key] for key in prompts}
        ask, progress = self._load(self.judge), Progress("verdicts", len(prompts))
        self.output.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for verdict in ask_verdicts(ask, prompts, known, self.judge_tokens, pattern):
                found[verdict.key] = verdict
                progress.advance(1)
                if verdict.key not in known:
                    file.write(json.dumps(verdict._asdict(), ensure_ascii=False) + "\n")
                    file.flush()
        progress.stop()
        return found

    def _write(
        self, names: Any, tables: Any, notes: Any, values: Any, questions: Any, answers: Any, verdicts: Any
    ) -> None:
        from minillama.evaluate.judge_page import page

        for headers, rows in tables:
            print_table(headers[0], headers[1:], rows)
        print("\n".join(notes))
        settings = {"a": self.a, "b": self.b, "judge": self.judge, "mode": self.mode, "questions": len(questions)}
        text = json.dumps(settings | {"results": values, "notes": notes}, indent=2, ensure_ascii=False) + "\n"
        html = page(tuple(names), tables, notes, questions, tuple(answers), verdicts)
        for path, content in ((f"{self.mode}.json", text), (f"{self.mode}.html", html)):
            to = replace_file(
                self.output / path, lambda file, content=content: file.write_text(content, encoding="utf-8")
            )
            print(f"written: {to}", file=sys.stderr)


def _pairwise(tallies: Mapping[str, Tally]) -> tuple[list[Any], list[str], dict[str, Any]]:
    headers = [
        "category",
        "A wins",
        "B wins",
        "ties",
        "disagree",
        "errors",
        "A's win rate [95 %]",
        "first shown",
        "longer",
    ]
    rows = [
        [
            name,
            *map(str, (one.wins, one.losses, one.ties, one.disagreements, one.errors)),
            _percent(*one.rate),
            _percent(*one.first[:3]),
            _percent(*one.longer[:3]),
        ]
        for name, one in tallies.items()
    ]
    notes = [
        "win rate: wins and half of ties and disagreements, without errors; first shown, longer: share of the verdicts "
        "that favor the answer shown first, and the longer one"
    ]
    whole = tallies["all"]
    for (share, low, high, n), name in ((whole.first, "the answer shown first"), (whole.longer, "the longer answer")):
        if low > 0.5 or high < 0.5:
            way = "for" if low > 0.5 else "against"
            notes.append(
                f"the judge is biased {way} {name}: {share:.0%} of {n} verdicts, 95 % interval {low:.0%} to {high:.0%}"
            )
    if whole.errors:
        notes.append(f"{whole.errors} turns have no verdict, and count neither as a win nor as a tie")
    return [(headers, rows)], notes, {name: one._asdict() for name, one in tallies.items()}


def _percent(share: float, low: float, high: float) -> str:
    return f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _single(
    questions: Sequence[Question], verdicts: Mapping[str, Verdict]
) -> tuple[list[Any], list[str], dict[str, Any]]:
    from minillama.evaluate.judge import CLOSE, rating

    found = {key.rsplit("/", 1)[0]: verdict.value for key, verdict in verdicts.items()}
    groups: dict[str, list[tuple[str | None, str | None]]] = {}
    for question in questions:
        for turn in range(len(question.turns)):
            pair = found.get(f"{question.id}/{turn}/a"), found.get(f"{question.id}/{turn}/b")
            for name in (question.category, "all"):
                groups.setdefault(name, []).append(pair)
    groups["all"] = groups.pop("all")
    rows, values = [], {}
    for name, pairs in groups.items():
        cells, entry = [name, str(len(pairs))], {}
        for side, own in zip("ab", zip(*pairs, strict=True), strict=True):
            mean, errors = rating(own)
            cells += [f"{mean.mean:.2f} ±{mean.error:.2f}" if mean else "-", str(errors)]
            entry[side] = {
                "rating": mean.mean if mean else None,
                "stderr": mean.error if mean else None,
                "errors": errors,
            }
        gaps = [float(a) - float(b) for a, b in pairs if a is not None and b is not None]
        wins = [sum(gap > CLOSE for gap in gaps), sum(gap < -CLOSE for gap in gaps)]
        rows.append([*cells, *map(str, wins), str(len(gaps) - sum(wins))])
        values[name] = entry | {"a_higher": wins[0], "b_higher": wins[1], "ties": len(gaps) - sum(wins)}
    headers = [
        "category",
        "turns",
        "A's rating",
        "no rating",
        "B's rating",
        "no rating",
        "A higher",
        "B higher",
        "ties",
    ]
    return [(headers, rows)], ["ratings from 1 to 10 ± standard error; a difference up to 0.1 is a tie"], values
