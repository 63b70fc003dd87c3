"""Evaluation: multiple-choice sets, perplexity, pairwise judging.

`eval judge A B` compares the answers of two models, see its --help. `torchrun --nproc-per-node N -m minillama eval ...`
shares the items out over N processes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minillama.commands.progress import Progress
from minillama.commands.tables import print_pairs, print_table
from minillama.config.command_line import refuse_repeated
from minillama.config.loader import check
from minillama.errors import InputError
from minillama.files import model_folder, refuse_remote, replace_text
from minillama.inference.load import ModelArgs, Quantize

if TYPE_CHECKING:
    from minillama.commands.judge import Judge
    from minillama.evaluate.results import ResultFolder
    from minillama.evaluate.task import Item, Style, Task
    from minillama.training.ranks import Ranks
else:
    from minillama.evaluate.task import Style


@dataclass(frozen=True)
class Args(ModelArgs):
    """Command-line arguments."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    tasks: tuple[str, ...] = ()
    """Sets: boolq, piqa, siqa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa, mmlu, or all; cmmlu."""
    data: Path | None = None
    """Folder of the sets, each in a folder of its name, in the forms in which they are published."""
    style: Style = "lm-eval"
    """Prompts and normalization: of EleutherAI's harness, of LLaMA's report, or of OLMES in its cloze or its
    multiple-choice form."""
    shots: int | None = field(default=None, metadata={"min": 0})
    """Few-shot examples; the style's number unless given: 0, llama 5 for MMLU and CMMLU, olmes 5."""
    limit: int = field(default=0, metadata={"min": 0})
    """Items per set, the first ones, evenly over subjects; 0: all."""
    output: Path | None = None
    """Folder of the results, one per model: a line per item, and the summary as JSON and Markdown; evals/MODEL-ID
    unless given. What it has already is not computed again."""
    against: str = ""
    """Model, with its own tokenizer, the same --dtype and --quantize and no adapter; or, for other settings, its
    folder of results or a file in it: the paired difference on the same items."""
    perplexity: Path | None = None
    """Text file, .jsonl of texts, or a folder of them: perplexity and bits per byte instead of sets; with --output
    in perplexity.json, too."""
    context: int = field(default=0, metadata={"min": 0})
    """Tokens per window with --perplexity; 0: the model's context."""
    quantize: Quantize = "none"
    """int8 or int4 weights, or auto as in generate; none: a quantized file is evaluated in float."""


OF_TASKS = ("data", "style", "shots", "limit", "against")


def parse(words: Sequence[str]) -> Args | Judge:
    """Arguments of `eval`, or of `eval judge`."""
    refuse_repeated(words)
    if words and words[0] == "judge":
        from minillama.commands.judge import Judge

        return tyro.cli(Judge, args=list(words[1:]), prog="minillama eval judge", description=Judge.__doc__)
    return tyro.cli(Args, args=list(words), prog="minillama eval", description=__doc__)


def run(args: Args | Judge) -> int:
    """Evaluate, and print a table."""
    check(args)
    if not isinstance(args, Args):
        from minillama.training.process_group import started

        if started() > 1:
            raise InputError("this works in one process", where="eval judge", fix="start it without torchrun")
        return args.run()
    if bool(args.tasks) == (args.perplexity is not None):
        raise InputError("give either --tasks or --perplexity", where="command line")
    mode, others = ("--tasks", ("context",)) if args.tasks else ("--perplexity", OF_TASKS)
    given = [one.name for one in fields(args) if one.name in others and getattr(args, one.name) != one.default]
    if given:
        what, where = f"{mode} has no such option", ", ".join(f"--{name}" for name in given)
        raise InputError(what, where=where, fix="leave it out")
    from minillama.training.process_group import process_group
    from minillama.training.ranks import Ranks
    from minillama.training.watch import Advice

    again = "start all again" + (" with the same options: it goes on where it was" if args.tasks else "")
    with process_group(args.device, where="--device", advice=Advice("start fewer processes", again)):
        ranks = Ranks.current()
        return _perplexity(args, ranks) if args.perplexity is not None else _tasks(args, ranks)


def _perplexity(args: Args, ranks: Ranks) -> int:
    from minillama.evaluate.results import ResultFolder
    from minillama.training.evaluation import shared_perplexity
    from minillama.training.ranks import check_same_weights

    assert args.perplexity is not None
    texts, args = ranks.leaders(_texts(args.perplexity.expanduser()) if ranks.leads else []), _found(args)
    folder = ResultFolder(args.output, _identity(args)) if args.output and ranks.leads else None
    model, tokenizer = args.load(args.quantize, scores=True)
    check_same_weights({"model": model}, ranks)
    most = model.config.max_seq_len
    if args.context > most:
        what, expected = "a window is longer than the model's context", f"at most {most}"
        raise InputError(what, where="--context", found=args.context, expected=expected)
    total = sum(len(tokenizer.encode(text)) for text in texts)
    with Progress("perplexity", total) if ranks.leads else nullcontext() as progress:
        advance = progress.advance if progress else int
        whole = shared_perplexity(model, tokenizer, texts, args.context, ranks, advance)
    if not ranks.leads:
        return 0
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    counts = {"documents": len(texts), "tokens": whole.tokens, "words": words, "bytes": whole.bytes}
    measures = {
        "nats per token": whole.nats_per_token,
        "perplexity per token": whole.perplexity,
        "perplexity per word": _exp(whole.nats / words),
        "bits per byte": whole.bits_per_byte,
    }
    print_pairs("", counts | measures)
    if folder is not None:
        folder.claim()
        counts = {"context": args.context or most, **asdict(whole), **counts}
        _write_perplexity(folder, args.perplexity, counts | measures)
    return 0


def _texts(path: Path) -> list[str]:
    """Texts of --perplexity: of a file or a folder, and nothing else that training data may be."""
    from minillama.config.loader import nearest_path
    from minillama.data.sources import Source, documents

    if not path.exists():
        expected = "a text, a .json or .jsonl file of records, or a folder of them"
        raise InputError("no such file", where="--perplexity", found=path, expected=expected, fix=nearest_path(path))
    try:
        texts = [document.text for document in documents(Source(path=str(path)))]
    except InputError as error:
        where = f"--perplexity {path if error.where == 'data.sources' else error.where}"
        fix = "correct the file, or leave this text out" if "data." in (error.fix or "") else error.fix
        raise InputError(error.what, where=where, found=error.found, expected=error.expected, fix=fix) from None
    if not texts:
        raise InputError("there is no text", where=f"--perplexity {path}")
    return texts


def _write_perplexity(folder: ResultFolder, text: Path | None, figures: dict[str, Any]) -> None:
    import minillama

    named = {name.replace(" ", "_"): value for name, value in figures.items()}
    value = {"minillama": minillama.__version__, **folder.model, "text": str(text), **named}
    path = replace_text(folder.path / "perplexity.json", json.dumps(value, indent=2) + "\n")
    print(f"written: {path}", file=sys.stderr)


def _exp(nats: float) -> float | str:
    """e^nats; above 10^6, of texts with few spaces, as a power of ten."""
    return math.exp(nats) if nats < 6 * math.log(10) else f"10^{nats / math.log(10):.1f}, words end at spaces"


def _tasks(args: Args, ranks: Ranks) -> int:
    from minillama.evaluate.results import read_outcomes

    tasks, items = _sets(args) if ranks.leads else ({}, {})  # the others get theirs from there
    others: Any = None
    if args.against:
        given = Path(args.against)
        known = (given.parent if given.suffix in (".json", ".jsonl", ".md") else given) / "items.jsonl"
        if ranks.leaders(known.is_file()):
            others = read_outcomes(known) if ranks.leads else None
        else:
            other = replace(args, model=args.against, output=None, adapter=(), tokenizer=None)
            found = _evaluate(other, items, ranks)
            others = found.known if found else None
    folder = _evaluate(args, items, ranks)
    return _report(args, tasks, items, folder, others) if folder else 0


def _sets(args: Args) -> tuple[dict[str, Task], dict[str, list[Item]]]:
    """The sets that are asked for, and their items."""
    from minillama.evaluate.tasks import named

    if args.data is None:
        raise InputError("there is no folder of the sets", where="--data", fix="add --data DIR")
    tasks = named(args.tasks)
    gone = [task for task in tasks.values() if not task.split(args.data)]
    if len(gone) > 1:  # one by one, the next would be missed after each download
        what = f"the files of {', '.join(task.title for task in gone)} are missing"
        expected = "; ".join(f"{task.folders[0]}/: {task.expected}" for task in gone)
        raise InputError(what, where=args.data, expected=expected)
    return tasks, {name: task.load(args.data, args.style, args.shots, args.limit) for name, task in tasks.items()}


def _evaluate(args: Args, items: dict[str, list[Item]], ranks: Ranks) -> ResultFolder | None:
    """Outcomes of all items, at the first process; those in the model's folder are taken from there."""
    from minillama.training.evaluation import costs, shared_outcomes
    from minillama.training.ranks import check_same_weights

    name, args = args.model, _found(args)
    folder = _folder(name, args) if ranks.leads else None
    missing = {name: folder.missing(name, found) for name, found in items.items()} if folder else {}
    total, left = sum(map(len, items.values())), sum(map(len, missing.values()))
    known = f", {total - left} of them known" if left < total else ""
    if folder:
        print(f"{name}: {total} items{known}; results in {folder.path}", file=sys.stderr)
    missing = ranks.leaders(missing)
    if not any(missing.values()):
        return folder
    model, tokenizer = args.load(args.quantize, scores=True)
    check_same_weights({"model": model}, ranks)
    found = shared_outcomes(model, tokenizer, missing, ranks)
    if folder is None:
        list(found)  # there are none: they are sent
        return None
    weights = {name: costs(found) for name, found in missing.items()}
    with Progress("items", sum(sum(own.values()) for own in weights.values())) as progress:
        for outcome in found:
            folder.add(outcome)
            progress.advance(weights[outcome.task][outcome.id], outcome.task)
    return folder


def _folder(name: str, args: Args) -> ResultFolder:
    """Results of a model that was named so."""
    from minillama.evaluate.results import ResultFolder

    identity = _identity(args)
    digest = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return ResultFolder(args.output or Path("evals") / f"{Path(name).resolve().name}-{digest}", identity)


def _found(args: Args) -> Args:
    """Arguments with the model of a run in place of the run."""
    refuse_remote(args.model)
    return replace(args, model=str(model_folder(Path(args.model))))


def _identity(args: Args) -> dict[str, Any]:
    """What the outcomes of a model depend on: its files by name, size and time, dtype and quantization as they are."""
    from minillama.formats.open import open_model
    from minillama.inference.load import resolved

    _, dtype, weights = resolved(open_model(args.model), args.dtype, args.device, args.quantize)
    tokenizer = str(Path(args.tokenizer).resolve()) if args.tokenizer else None
    adapters = [str(path.resolve()) for path in args.adapter_paths]
    names = {"model": str(Path(args.model).resolve()), "tokenizer": tokenizer, "adapter": adapters}
    return {**names, "dtype": str(dtype).removeprefix("torch."), "quantize": weights, "files": args.files}


def _report(args: Args, tasks: dict[str, Task], items: dict[str, list[Item]], folder: ResultFolder, others: Any) -> int:
    import minillama
    from minillama.evaluate.results import earlier, markdown, mean_of, summary, table

    assert args.data is not None
    sets = {
        name: summary(task, args.style, folder.of(name, items[name]), others)
        | {"split": task.split(args.data), "shots": task.shots(args.style, args.shots)}
        for name, task in tasks.items()
    }
    if others is not None and not any("against" in one for one in sets.values()):
        fix = "evaluate both with the same --tasks, --style, --shots and --limit"
        raise InputError("there is no item that both results have", where="--against", found=args.against, fix=fix)
    headers, rows = table(sets)
    print_table(headers[0], headers[1:], rows)
    print("\n".join(_notes(args, sets)))
    for note in _truncated(sets):
        print(note, file=sys.stderr)
    shots = "" if args.shots is None else f"-{args.shots}shot"
    settings = {"style": args.style, "shots": args.shots, "limit": args.limit, "against": args.against or None}
    path = folder.path / f"{args.style}{shots}.json"
    sets = earlier(path, args.limit, args.against or None) | sets
    value = {"minillama": minillama.__version__, **folder.model, **settings, "sets": sets}
    value |= {"mean": mean_of(sets)._asdict()}
    texts = {".json": json.dumps(value, indent=2) + "\n", ".md": markdown(sets, _notes(args, sets))}
    for ending, text in texts.items():
        print(f"written: {replace_text(path.with_suffix(ending), text)}", file=sys.stderr)
    return 0


def _notes(args: Args, sets: dict[str, Any]) -> list[str]:
    """Lines below the table."""
    notes = [f"{args.model}, style {args.style}, percent ± standard error; * the accuracy that the style reports."]
    if any("against" in one for one in sets.values()):
        notes.append(
            f"difference: * of the model less that of {args.against}, on the same items, with its 95 % interval."
        )
    parts = [f"{one['title']} {one['split']}, {one['shots']}" for one in sets.values() if "split" in one]
    notes.append(f"split and number of few-shot examples: {'; '.join(parts)}.")
    notes += _truncated(sets)
    return notes + [
        f"{one['title']}: mean of {len(one['subjects'])} subjects {100 * one['mean_of_subjects']:.2f}."
        for one in sets.values()
        if "subjects" in one
    ]


def _truncated(sets: dict[str, Any]) -> list[str]:
    """Lines on items that did not fit."""
    cut = ((one["title"], one.get("truncated", 0), one["items"]) for one in sets.values())
    return [
        f"{title}: {n} of {of} items lost tokens on the left, for the model's context." for title, n, of in cut if n
    ]
