"""Data sets: clean and decontaminate text; show, grade and make the records of a fine-tuning file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minillama.commands.best_of_n import BestOfN
from minillama.commands.data_clean import Clean
from minillama.commands.data_models import TrainClassifier, TrainNgramLM
from minillama.commands.data_synthetic import Constitutional, GhostAttention, Hindsight, SelfInstruct
from minillama.commands.decontaminate import Decontaminate
from minillama.commands.difficulty import Difficulty
from minillama.config.command_line import refuse_repeated
from minillama.data.conversations import Format, read_record
from minillama.data.preference_set import encode_answer, fitted
from minillama.data.preferences import Preference, is_preference, read_preference
from minillama.data.skipped import Skipped
from minillama.data.sources import OnError, Source, records, skipping
from minillama.errors import InputError
from minillama.tokenizer import Tokenizer, byte_tokenizer
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.rendering import Rendered, TrainOn, encode, truncated
from minillama.tokenizer.template import Template, load_template, special_tokens

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Show:
    """Print conversations as the model reads them: tokens, weights in the loss, the trained ones colored and barred.

    Of preferences the chosen answer is green and marked +, the rejected one red and marked -.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A file of records, .jsonl or .json, perhaps .gz or .zst, a folder of them, or hf:NAME."""
    template: str = ""
    """Chat template: alpaca, chatglm, chatglm2, chatml, llama-2, llama-3, plain, vicuna, ziya, a Jinja file; the
    tokenizer's own unless given."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL")] = ""
    """Model whose tokenizer encodes the records."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="PATH")] = ""
    """Tokenizer file or folder, if it is not a model's; bytes where neither is given but a template."""
    format: Format | Literal["preferences"] = "auto"
    """Format of the records; auto: as their fields say. preferences: also where fine-tuning would take the record."""
    train_on: TrainOn = "all"
    """Trained answers of a conversation."""
    context: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Truncate as training with a context of N does: N + 1 tokens, of preferences N; 0: show all."""
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
        preferences = 0
        for item in islice(self._read(report), self.limit or None):
            with skipping(self.on_error, report):
                if isinstance(item, Preference):
                    _print_preference(console, item, template, tokenizer, self.context)
                    preferences += 1
                    continue
                rendered = encode(item, template, tokenizer, self.train_on)
                # training predicts N tokens, each but the first of N + 1
                shown.append(truncated(rendered, self.context + 1, tokenizer.bos_id) if self.context else rendered)
                _print(console, item, shown[-1])
        if not shown and not preferences:
            raise InputError("no conversation to show", where=self.source, found=str(report) or "no records")
        counts = [f"{preferences:,} preferences, template {template.name}"] if preferences else []
        counts += [_summary(shown, template)] if shown else []
        print("; ".join(counts + [str(report)] * bool(str(report))), file=sys.stderr)
        return 0

    def _read(self, report: Skipped) -> Iterator[Conversation | Preference]:
        """Preferences where the format says so, or the record's fields, and else conversations."""
        for record in records(Source(self.source), self.on_error, report):
            with skipping(self.on_error, report):
                if self.format == "preferences" or (self.format == "auto" and is_preference(record.value)):
                    yield read_preference(record)
                else:
                    yield from read_record(record, self.format, report)

    def _tokenizer(self) -> Tokenizer:
        from minillama.formats.open import open_model

        if self.template and not (self.model or self.tokenizer):
            print("tokens are bytes, without a model; --model MODEL has those of a model", file=sys.stderr)
            return byte_tokenizer().with_special(special_tokens(self.template))
        if bool(self.model) == bool(self.tokenizer):
            what = "records are shown in a template, by its name or a tokenizer's own"
            found, fix = "a model and a tokenizer" if self.model else "none", "give one of them"
            expected = "--template NAME, --model MODEL or --tokenizer PATH"
            raise InputError(what, where="command line", found=found, expected=expected, fix=fix)
        return Tokenizer.load(self.tokenizer or open_model(self.model).tokenizer_path())


def _print(console: Console, conversation: Conversation, rendered: Rendered) -> None:
    from rich.text import Text

    counts = [f"{len(conversation.messages)} messages", _counts([rendered])]
    counts += [f"{cut} cut off the {part}" for cut, part in zip(rendered.cut, ("prompt", "answer"), strict=True) if cut]
    console.print(Text(f"{conversation.where}: {', '.join(counts)}", style="bold"))
    for text, weight in rendered.runs:
        _print_lines(console, text, f"{weight:g}", "green" if weight else "")
    console.print()


def _print_preference(
    console: Console, preference: Preference, template: Template, tokenizer: Tokenizer, context: int
) -> None:
    from rich.text import Text

    sides = [encode_answer(side, template, tokenizer) for side in preference.sides]
    prompt, answers = sides[0].prompt, [side.answer for side in sides]
    if context:
        prompt, answers = fitted(prompt, answers, context, tokenizer.bos_id)
    kinds = [("+", "green")] * (preference.chosen is not None) + [("-", "red")] * (preference.rejected is not None)
    counts = f"prompt {len(prompt):,} tokens, " + ", ".join(
        f"{kind} {len(answer):,}" for (kind, _), answer in zip(kinds, answers, strict=True)
    )
    margin = f", margin {preference.margin:g}" if preference.margin else ""
    margin += f", probability {preference.probability:g}" if preference.probability != 1 else ""
    console.print(Text(f"{preference.sides[0].where}: {counts}{margin}", style="bold"))
    _print_lines(console, tokenizer.decode(prompt, skip_special=False), "", "")
    for (kind, style), answer in zip(kinds, answers, strict=True):
        _print_lines(console, tokenizer.decode(answer, skip_special=False), kind, style)
    console.print()


def _print_lines(console: Console, text: str, label: str, style: str) -> None:
    from rich.text import Text

    for number, line in enumerate(_lines(text)):
        shown, mark = (label if number == 0 else ""), "┃" if style else "│"
        console.print(Text(f"{shown:>6} {mark} ", style=style or "dim").append(line, style=style))


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


def _summary(shown: Sequence[Rendered], template: Template) -> str:
    cut = sum(any(item.cut) for item in shown)
    parts = [f"{len(shown):,} conversations, template {template.name}: {_counts(shown)}"]
    return "; ".join(parts + ([f"{cut:,} truncated"] if cut else []))


SUBCOMMANDS: dict[str, Callable[..., Any]] = {
    "clean": Clean,
    "show": Show,
    "difficulty": Difficulty,
    "best-of-n": BestOfN,
    "decontaminate": Decontaminate,
    "self-instruct": SelfInstruct,
    "constitutional": Constitutional,
    "hindsight": Hindsight,
    "ghost-attention": GhostAttention,
}
MODELS: dict[str, Callable[..., Any]] = {"ngram-lm": TrainNgramLM, "classifier": TrainClassifier}
Args = (*SUBCOMMANDS.values(), *MODELS.values())


def parse(words: Sequence[str]) -> Any:
    """Subcommand of the command line."""
    refuse_repeated(words)
    if words and words[0] in MODELS:  # `ngram-lm train`: a subcommand of its own
        known, prog = {"train": MODELS[words[0]]}, f"minillama data {words[0]}"
        return tyro.extras.subcommand_cli_from_dict(known, args=list(words[1:]), prog=prog)
    return tyro.extras.subcommand_cli_from_dict(SUBCOMMANDS | MODELS, args=list(words), prog="minillama data")


def run(args: Any) -> int:
    """Run the subcommand."""
    try:
        return args.run()
    except InputError as error:  # of a run's settings, which are options here
        fix = (error.fix or "").replace('data.on_error = "skip"', "--on-error skip")
        if fix == (error.fix or "") or not hasattr(args, "on_error"):
            raise
        raise InputError(error.what, where=error.where, found=error.found, expected=error.expected, fix=fix) from None
