"""Data sets: clean text; show, grade and make the records of a fine-tuning file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from minillama.commands.best_of_n import BestOfN
from minillama.commands.data_clean import Clean
from minillama.commands.difficulty import Difficulty
from minillama.config.command_line import refuse_repeated
from minillama.data.conversations import Format, conversations
from minillama.data.reading import BadText, Skipped
from minillama.data.sources import OnError, parse_source
from minillama.errors import InputError
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


SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "clean": Clean,
    "show": Show,
    "difficulty": Difficulty,
    "best-of-n": BestOfN,
}
Subcommand = Clean | Show | Difficulty | BestOfN


def parse(words: Sequence[str]) -> Subcommand:
    """Subcommand of the command line."""
    refuse_repeated(words)
    return tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS, args=list(words), prog="minillama data")


def run(args: Subcommand) -> int:
    """Run the subcommand."""
    return args.run()
