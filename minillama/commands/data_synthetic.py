"""Data that models write: self-instruct, constitutional feedback, chains of hindsight, ghost attention."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minillama.commands.tables import print_pairs, print_table
from minillama.config.loader import check
from minillama.data.conversations import read_record
from minillama.data.prompts import answered
from minillama.data.sources import Source, identity, records
from minillama.errors import InputError
from minillama.files import cache_folder, model_folder, refuse_remote, stamp
from minillama.inference.load import DType, ModelArgs, Quantize
from minillama.inference.sampling import Sampling
from minillama.synthetic.hindsight import FORMS, Form, chains, edits, turns
from minillama.synthetic.wording import Language, read_principles, wording, wording_digest
from minillama.synthetic.writer import Generated, Made, summary

if TYPE_CHECKING:
    from minillama.inference.remote import Teacher

_SAMPLES = 5
_WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")


@dataclass(frozen=True, kw_only=True)
class _Output:
    output: Annotated[Path, tyro.conf.arg(metavar="FILE.jsonl")]
    """The file; one that a stopped command left is continued. FILE.jsonl.provenance.json is beside it."""
    language: Language = "en"
    """Language of the prompts."""
    seed: int = 1
    """Random seed."""

    def _out(self, inputs: Sequence[str], about: Mapping[str, Any]) -> Generated:
        """Output file, which depends on the inputs, what it is about and the arguments named there."""
        check(self)
        told = {
            "command": type(self).__name__,
            "seed": self.seed,
            "language": self.language,
            "wording": wording_digest(self.language),
        }
        told |= about
        others = [identity(Source(name)) for name in inputs if not Path(name).is_file()]
        told |= {"sources": others} if others else {}
        return Generated(self.output, told, [Path(name) for name in inputs])

    def _show(self, out: Generated) -> None:
        """Counts on standard error, and samples on standard output."""
        print(f"{out.path}: {summary(out.counts)}", file=sys.stderr)
        for number, line in enumerate(islice(out.lines(), _SAMPLES), 1):
            texts = {key: value if isinstance(value, str) else _short(value) for key, value in line.items()}
            if len(texts.get("messages", "")) > 200:  # what is asked and answered stands at the end
                texts["messages"] = f"…{texts['messages'][-200:]}"
            print_pairs(f"line {number}", {key: text[:201].replace("\n", "↵") for key, text in texts.items()})


@dataclass(frozen=True, kw_only=True)
class _Asking(_Output):
    teacher: Annotated[str, tyro.conf.arg(metavar="URL|MODEL")]
    """An OpenAI-compatible endpoint, http://..., its key in OPENAI_API_KEY; or a model as of `minillama generate`."""
    teacher_model: str = ""
    """Model of the endpoint; the first it lists unless given."""
    concurrency: int = field(default=4, metadata={"min": 1})
    """Requests to the endpoint at once, and units that are asked about in one batch; a local model decodes as many
    answers at once, but 16 at least."""
    max_requests: int = field(default=0, metadata={"min": 0})
    """Budget of requests to the endpoint, 0: none. When it is spent, what was done stays, and can be continued."""
    max_tokens: int = field(default=0, metadata={"min": 0})
    """Budget of tokens, of prompts and answers."""
    cache: Path | None = None
    """Folder of the endpoint's replies, which are not asked for twice; of the user's cache folder unless given."""
    temperature: float = field(default=1.0, metadata={"min": 0})
    """Sampling temperature."""
    max_new_tokens: int = field(default=512, metadata={"min": 1})
    """Tokens per reply at most."""
    dtype: DType = "auto"
    """Weight dtype of a local model."""
    quantize: Quantize = "auto"
    """int8 or int4 weights of a local model; auto as in generate."""
    device: str = "auto"
    """Device of a local model."""
    template: Annotated[str, tyro.conf.arg(metavar="NAME|FILE.jinja")] = ""
    """Chat template of a local model instead of its own; all prompts are then questions."""

    def _sampling(self) -> Sampling:
        return Sampling(self.temperature, seed=self.seed)

    def _about(self, teacher: Teacher, **more: object) -> dict[str, Any]:
        local = {} if "url" in teacher.about else {"quantize": self.quantize}
        settings = {**local, "temperature": self.temperature, "tokens": self.max_new_tokens}
        return {"teacher": dict(teacher.about), **settings, **more}

    def _open(self) -> Teacher:
        """Teacher."""
        check(self)
        return open_teacher(
            self.teacher,
            dtype=self.dtype,
            device=self.device,
            template=self.template,
            quantize=self.quantize,
            model=self.teacher_model,
            concurrency=self.concurrency,
            max_requests=self.max_requests,
            max_tokens=self.max_tokens,
            cache=self.cache or cache_folder() / "teacher",
        )


def open_teacher(
    name: str,
    dtype: DType = "auto",
    device: str = "auto",
    template: str = "",
    quantize: Quantize = "none",
    **remote: Any,
) -> Teacher:
    """Teacher of a URL, with the arguments of `Remote`, or of a local model, in place of a run the model that it has.

    Provenance has a local model's dtype, and its weights' files by name, size and time: others make other data.

    Raises:
        InputError: a template for an endpoint, which has its own; and as both.
    """
    from minillama.inference.remote import ROWS, Local, Remote

    if name.startswith(("http://", "https://")):
        if template:
            raise InputError("an endpoint has a chat template of its own", where="--template", fix="leave it out")
        return Remote(name, **remote)
    rows = max(ROWS, remote.get("concurrency", ROWS))
    refuse_remote(name)
    path = model_folder(Path(name))
    model, tokenizer = ModelArgs(str(path), dtype=dtype, device=device).load(quantize, compiles=True)
    teacher = Local(model, tokenizer, str(path), template, rows)
    weights = [file for file in sorted(path.iterdir()) if file.suffix in _WEIGHTS] if path.is_dir() else [path]
    teacher.about = {**teacher.about, "dtype": str(model.dtype).removeprefix("torch."), "files": stamp(weights)}
    return teacher


@dataclass(frozen=True, kw_only=True)
class SelfInstruct(_Asking):
    """Write new instructions with inputs and outputs, from seed tasks, by a teacher (self-instruct, Alpaca)."""

    seeds: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Seed tasks: Self-Instruct's, or records of another format of conversations."""
    count: int = field(default=100, metadata={"min": 1})
    """New instructions; more may be asked for later."""
    method: Literal["alpaca", "steps"] = "alpaca"
    """alpaca: lists of 20 tasks. steps: instructions, whether they classify, instances."""
    requests: int = field(default=4, metadata={"min": 1})
    """Requests per round, whose replies are filtered before the next."""
    listed: int = field(default=20, metadata={"min": 2})
    """Tasks per list, the shown seed tasks among them."""
    max_new_tokens: int = field(default=2048, metadata={"min": 1})
    """Tokens per reply at most."""
    similarity: float = field(default=0.7, metadata={"min": 0, "max": 1})
    """ROUGE-L with a seed or new instruction, above which one is left out."""
    chat: bool = False
    """Ask through the teacher's chat template; otherwise it continues a text."""

    def run(self) -> int:
        """Write."""
        from minillama.synthetic import self_instruct

        seeds, teacher = self_instruct.read_seeds(self.seeds), self._open()
        settings = {key: getattr(self, key) for key in ("method", "requests", "listed", "similarity", "chat")}
        out = self._out([self.seeds], self._about(teacher, **settings))
        options = {**settings, "language": self.language, "max_new_tokens": self.max_new_tokens}
        self_instruct.SelfInstruct(teacher, seeds, self.count, self._sampling(), **options).write(out)
        self._show(out)
        pairs = self_instruct.verbs_and_nouns([line["instruction"] for line in out.lines()])
        rows = [(f"{verb} {noun}", f"{count:,}") for (verb, noun), count in pairs.most_common(20)]
        print_table(f"{len(pairs):,} pairs of verb and noun", ["instructions"], rows)
        return 0


@dataclass(frozen=True, kw_only=True)
class Constitutional(_Asking):
    """Write answers that a model revised by principles, for `train.py sft`; then preferences, for `train.py reward`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """revise: questions, that is records with a prompt, or conversations, whose last answer is written anew. compare:
    what revise wrote, whose first and last answer are compared, or questions, to which two answers are written."""
    step: Literal["revise", "compare"] = "revise"
    """revise: answer, critique and revision. compare: preference pairs, as the teacher judges in both orders."""
    principles: Annotated[str, tyro.conf.arg(metavar="en|zh|FILE.toml")] = ""
    """Principles: the package's, of the language unless given, or a file of [[principles]]."""
    rounds: int = field(default=2, metadata={"min": 1})
    """Critiques and revisions per answer."""
    certain: float = field(default=0.5, metadata={"min": 0.5, "max": 1})
    """Least probability of the chosen answer."""
    limit: int = field(default=0, metadata={"min": 0})
    """Number of records; 0: all."""

    def run(self) -> int:
        """Write."""
        from minillama.synthetic.constitutional import Constitutional as Task

        principles, teacher = read_principles(self.principles or self.language), self._open()
        settings: dict[str, Any] = {"rounds": self.rounds, "certain": self.certain}
        about = self._about(teacher, step=self.step, principles=principles, **settings)
        out, judge = self._out([self.source], about), wording(self.language)["judge"]
        task = Task(teacher, principles, judge, self._sampling(), max_new_tokens=self.max_new_tokens, **settings)
        found = []
        for record in islice(records(Source(self.source)), self.limit or None):
            talk, first = turns(read_record(answered(record))[0]), record.value.get("answer")
            own = [first, talk[-1]["content"]] if isinstance(first, str) and "rounds" in record.value else []
            found.append((talk[:-1], own))
        if self.step == "revise":
            out.each([question for question, _ in found], task.revise, self.concurrency)
        else:
            out.each(found, task.compare, self.concurrency)
        self._show(out)
        return 0


@dataclass(frozen=True, kw_only=True)
class Hindsight(_Output):
    """Write conversations for `train.py sft` from answers that people ranked (COHFT) or corrected (HFFT)."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """chain: preferences, or `answers`, best first or with `scores`. edits: conversations with a `correction`, perhaps
    `feedback`."""
    kind: Literal["chain", "edits", "edit-pairs"] = "chain"
    """chain: answers behind words that rank them. edits: the correction as the answer. edit-pairs: preferences."""
    forms: tuple[Form, ...] = FORMS
    """Forms of a chain, one of which is drawn for each record."""
    samples: int = field(default=1, metadata={"min": 1})
    """Chains per record."""

    def run(self) -> int:
        """Write."""
        out = self._out([self.source], {"kind": self.kind, "forms": self.forms, "samples": self.samples})
        found = [record for record in records(Source(self.source)) for _ in range(self.samples)]

        def make(part: Sequence[Any], first: int) -> Made:
            if self.kind == "chain":
                return chains(part, first, self.seed, self.language, self.forms)
            return edits(part, self.kind == "edit-pairs")

        out.each(found, make, 1000)
        self._show(out)
        return 0


@dataclass(frozen=True, kw_only=True)
class GhostAttention(_Asking):
    """Write dialogues that keep to a system instruction, which the teacher read in every turn, for `train.py sft`."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Dialogues, whose questions are asked."""
    instructions: Annotated[Path | None, tyro.conf.arg(metavar="FILE.txt")] = None
    """Instructions, one per line; roles and styles of the package's unless given."""
    max_new_tokens: int = field(default=256, metadata={"min": 1})
    """Tokens per answer at most."""
    limit: int = field(default=0, metadata={"min": 0})
    """Number of dialogues; 0: all."""

    def run(self) -> int:
        """Write."""
        from minillama.inference.load import read_texts
        from minillama.synthetic.ghost_attention import GhostAttention as Task

        own = list(read_texts([], self.instructions, "instruction")) if self.instructions else []
        teacher = self._open()
        out = self._out([self.source], self._about(teacher, instructions=own))
        task = Task(teacher, own, self._sampling(), self.language, self.max_new_tokens)
        found = []
        for record in islice(records(Source(self.source)), self.limit or None):
            asked = [m["content"] for m in turns(read_record(answered(record))[0]) if m["role"] == "user"]
            if not asked:
                raise InputError("a dialogue without a question", where=record.where)
            found.append(asked)
        out.each(found, task.write, self.concurrency)
        self._show(out)
        return 0


def _short(value: object) -> str:
    """JSON of a value; of messages their roles and contents."""
    if isinstance(value, list) and value and all(isinstance(each, dict) and "content" in each for each in value):
        return " | ".join(f"{each['role']}: {each['content']}" for each in value)
    return json.dumps(value, ensure_ascii=False)
