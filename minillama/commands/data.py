"""Data sets: show the records of a fine-tuning file as a model reads them; compare them with evaluation sets."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minillama.commands.tables import print_table
from minillama.config.command_line import refuse_repeated
from minillama.config.loader import check
from minillama.data.conversations import Format, conversations
from minillama.data.reading import BadText, Skipped
from minillama.data.sources import OnError, parse_source
from minillama.errors import InputError
from minillama.files import replace_file
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.rendering import Rendered, TrainOn, encode, truncated
from minillama.tokenizer.template import Template, load_template

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Show:
    """Print conversations as the model reads them: tokens, weights in the loss, the trained ones colored and barred."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A file of records, .jsonl or .json, perhaps .gz or .zst, a folder of them, or hf:NAME."""
    template: str = ""
    """Chat template: alpaca, chatglm, chatglm2, chatml, llama-2, llama-3, plain, vicuna, ziya, a Jinja file; the
    tokenizer's own unless given."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = ""
    """Model whose tokenizer encodes the records."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="PATH")] = ""
    """Tokenizer file or folder, if it is not a model's."""
    format: Format = "auto"
    """Format of the records; auto: as their fields say."""
    train_on: TrainOn = "all"
    """Trained answers of a conversation."""
    context: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Truncate to so many tokens, as training does; 0: show all."""
    limit: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Number of conversations; 0: all."""
    on_error: OnError = "stop"
    """On a record that cannot be read or has no trained token: stop, or count it and continue."""

    def run(self) -> int:
        """Show."""
        from rich.console import Console

        tokenizer = self._tokenizer()
        template = load_template(self.template, tokenizer)
        console = Console(highlight=False, soft_wrap=True)
        report, shown = Skipped(), []
        found = conversations(parse_source(self.source), self.format, self.on_error, report)
        for conversation in islice(found, self.limit or None):
            try:
                rendered = encode(conversation, template, tokenizer, self.train_on)
            except InputError as error:
                if self.on_error == "stop":
                    raise
                report.add(BadText("not rendered", error.what, where=error.where))
                continue
            shown.append(truncated(rendered, self.context, tokenizer.bos_id) if self.context else rendered)
            _print(console, conversation, shown[-1])
        if not shown:
            raise InputError("no conversation to show", where=self.source, found=str(report) or "no records")
        print(_summary(shown, template, report), file=sys.stderr)
        return 0

    def _tokenizer(self) -> Tokenizer:
        from minillama.formats.open import open_model

        if bool(self.model) == bool(self.tokenizer):
            what, fix = "give either a model or a tokenizer", "add --model MODEL, or --tokenizer PATH"
            raise InputError(what, where="command line", fix=fix)
        return Tokenizer.load(self.tokenizer or open_model(self.model).tokenizer_path())


@dataclass(frozen=True)
class Decontaminate:
    """Find, list and remove documents that share n-grams with evaluation sets: 13 words, or Chinese characters."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Training data: a .jsonl or .json file of records, or a text, whose paragraphs are the documents."""
    against: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the evaluation sets, as for `minillama eval`."""
    n: int = field(default=13, metadata={"min": 1})
    """Words per n-gram."""
    report: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write every overlap as a line of JSON; the first ten are printed otherwise."""
    remove: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the documents without overlap to this file, and beside it what a run's provenance repeats."""

    def run(self) -> int:
        """Decontaminate."""
        from minillama.evaluate import decontaminate

        index = decontaminate.Index(self.against, self.n)
        documents = list(decontaminate.texts(self.file))
        found = [index.hits(document.text, document.where) for document in documents]
        hits, bad = list(chain(*found)), sum(map(bool, found))
        sets = decontaminate.by_set(hits, index.items)
        print_table("set", ["items", "found"], [[name, str(of), str(hit)] for name, (hit, of) in sets.items()])
        share = bad / max(1, len(documents))
        print(f"{bad} of {len(documents)} documents ({share:.2%}) share {self.n}-grams with {len(sets)} sets", end="")
        print(f"; {index.short} items are too short to be looked for" if index.short else "")
        if self.report is not None:
            lines = "".join(json.dumps(hit._asdict(), ensure_ascii=False) + "\n" for hit in hits)
            replace_file(self.report, lambda to: to.write_text(lines, encoding="utf-8"))
        for hit in hits[:10] if self.report is None else ():
            print(f"  {hit.where}: {hit.item}: {''.join(c if c.isprintable() else ' ' for c in hit.words)}")
        if self.remove is not None:
            kept = [document.line for document, overlaps in zip(documents, found, strict=True) if not overlaps]
            decontaminate.write(self.remove, self.file, index, kept, bad)
            print(f"written: {self.remove}, {len(kept)} documents")
        return 0


def _print(console: Console, conversation: Conversation, rendered: Rendered) -> None:
    from rich.text import Text

    counts = [f"{len(conversation.messages)} messages", _counts([rendered])]
    counts += [f"{cut} cut off the {part}" for cut, part in zip(rendered.cut, ("prompt", "answer"), strict=True) if cut]
    console.print(Text(f"{conversation.where}: {', '.join(counts)}", style="bold"))
    for text, weight in rendered.runs:
        mark, style = ("┃", "green") if weight else ("│", "")
        for number, line in enumerate(_lines(text)):
            label = f"{weight:g}" if number == 0 else ""
            console.print(Text(f"{label:>6} {mark} ", style=style or "dim").append(line, style=style))
    console.print()


def _lines(text: str) -> Iterator[str]:
    """Lines with their ends visible; control characters escaped, as the text is untrusted."""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        shown = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
        if number < len(lines):
            yield f"{shown}↵"
        elif shown or len(lines) == 1:
            yield shown


def _counts(rendered: Sequence[Rendered]) -> str:
    tokens, trained = sum(len(item.ids) for item in rendered), sum(item.trained for item in rendered)
    return f"{tokens:,} tokens, {trained:,} trained, weight {sum(sum(item.weights) for item in rendered):,.6g}"


def _summary(shown: Sequence[Rendered], template: Template, report: Skipped) -> str:
    cut = sum(any(item.cut) for item in shown)
    parts = [f"{len(shown):,} conversations, template {template.name}: {_counts(shown)}"]
    parts += [f"{cut:,} truncated"] if cut else []
    return "; ".join(parts + [str(report)] * bool(str(report)))


def parse(words: Sequence[str]) -> Show | Decontaminate:
    """Subcommand of the command line."""
    refuse_repeated(words)
    commands = {"show": Show, "decontaminate": Decontaminate}
    return tyro.extras.subcommand_cli_from_dict(commands, args=list(words), prog="minillama data")


def run(args: Show | Decontaminate) -> int:
    """Run the subcommand."""
    check(args)
    return args.run()
