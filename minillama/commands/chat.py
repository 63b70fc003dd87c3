"""Conversation with a model in the terminal. Ctrl-C stops an answer or clears the line, Ctrl-D or /quit ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os.path import expanduser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from minillama.config.loader import check
from minillama.errors import InputError
from minillama.files import read_json, replace_text
from minillama.inference.load import ModelArgs, Quantize
from minillama.inference.sampling import Sampling, models_own
from minillama.tokenizer.conversation import Conversation, Message

if TYPE_CHECKING:
    from minillama.inference.chat import ChatPrompts
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

HELP = """\
/system TEXT    set the system message, and begin again; without a text: none
/regenerate     another answer to the last question
/reset          begin again
/save FILE      write the conversation as JSON
/load FILE      read one
/quit           end, as Ctrl-D; Ctrl-C stops an answer, or clears the line"""

CUT_OFF = {"length": "--max-new-tokens was reached", "context": "the model's context is full; /reset begins again"}


@dataclass(frozen=True)
class Args(ModelArgs):
    """Command-line arguments."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    system: str = ""
    """System message."""
    template: str = ""
    """Chat template, if the model has none: alpaca, chatml, llama-2, llama-3, vicuna ..., or a Jinja file."""
    max_new_tokens: int = field(default=512, metadata={"min": 1})
    """Maximum number of new tokens per answer."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Stop strings; they are not written."""
    quantize: Quantize = "auto"
    """Weight quantization, as of `generate`."""
    compile: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help_behavior_hint="")] = True
    """Without the decode step in C++ of `generate`."""


@dataclass
class Session:
    """Conversation in progress.

    Args:
        args: sampling and limits.
        prompts: its chat template.
        answers: answers given, which seeds the next one.
    """

    args: Args
    model: Decoder
    tokenizer: Tokenizer
    prompts: ChatPrompts
    messages: list[Message] = field(default_factory=list)
    answers: int = 0

    def answer(self) -> None:
        """Stream an answer to the last message; Ctrl-C keeps what has been written."""
        from minillama.inference.chat import why_empty
        from minillama.inference.generate import stream

        sampling = replace(self.args.sampling, seed=self.args.sampling.seed + self.answers)
        text, reason, self.answers = "", None, self.answers + 1
        try:
            ids = self.prompts.encode(self.messages)
            chunks = stream(self.model, self.tokenizer, [ids], self.args.max_new_tokens, sampling, self.args.stop)
            for chunk in chunks:
                text, reason = text + chunk.text, chunk.reason
                print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:  # the stream that is dropped cancels its request
            say("\n(stopped)")
        print(flush=True)
        if not text.strip() and reason is not None:
            say(f"(no text: {why_empty(reason)})")
        elif reason in CUT_OFF:
            say(f"(cut off: {CUT_OFF[reason]})")
        self.messages.append(self.prompts.answer(text))

    def ask(self, question: str) -> None:
        """Answer a question; one that cannot be answered leaves the conversation as it was."""
        self._answer_to([*self.messages, Message("user", question)])

    def _answer_to(self, messages: list[Message]) -> None:
        before, self.messages = self.messages, messages
        try:
            self.answer()
        except InputError:
            self.messages = before
            raise

    def regenerate(self, _: str) -> None:
        """/regenerate."""
        asked = self.messages[:-1]
        if not asked or asked[-1].is_answer or not self.messages[-1].is_answer:
            raise InputError("there is no answer to a question yet")
        self._answer_to(asked)

    def system(self, text: str) -> None:
        """/system TEXT."""
        self.prompts.system = (Message("system", text),) if text else ()
        self.reset("")

    def reset(self, _: str) -> None:
        """/reset."""
        self.messages = []
        say("(a new conversation)")

    def save(self, name: str) -> None:
        """/save FILE."""
        if not name:
            raise InputError("/save needs a file", fix="/save chat.json")
        messages = [*self.prompts.system, *self.messages]
        values = {"messages": [message.for_template() for message in messages]}
        replace_text(Path(expanduser(name)), json.dumps(values, ensure_ascii=False, indent=2) + "\n")
        say(f"wrote {name}: {len(messages)} messages")

    def load(self, name: str) -> None:
        """/load FILE."""
        values = read_json(Path(expanduser(name))) if name else {}
        try:
            messages = list(Conversation.of(values["messages"]).messages)
        except InputError as error:
            raise error.at(", ".join(filter(None, (name, str(error.where or ""))))) from None
        except (KeyError, TypeError):
            what, expected = "not a saved conversation", 'a file of /save, {"messages": [...]}'
            raise InputError(what, where=name or "/load", found=", ".join(values) or None, expected=expected) from None
        has_system = bool(messages) and messages[0].role == "system"
        self.prompts.system = (messages.pop(0),) if has_system else ()
        self.messages = messages
        for message in messages:
            print(f"{'> ' if message.role == 'user' else ''}{message.content}")


def say(text: str) -> None:
    """Print beside the conversation."""
    print(text, file=sys.stderr, flush=True)


def run(args: Args) -> int:
    """Read questions until the input ends."""
    check(args)
    from minillama.inference.chat import ChatPrompts
    from minillama.tokenizer.template import OWN

    model, tokenizer = args.load(args.quantize, args.compile, generates=True)
    if not args.template and tokenizer.chat_template is None:
        fix = "name one with --template, as vicuna; a base model answers to `minillama generate`"
        raise InputError("the model has no chat template", where=args.model, fix=fix)
    prompts = ChatPrompts(tokenizer, args.template, args.system)
    model.stop_ids |= prompts.stop_ids
    args = replace(args, sampling=models_own(args.sampling, model.sampling))
    session = Session(args, model, tokenizer, prompts)
    commands: dict[str, Callable[[str], None]] = {
        "/system": session.system,
        "/regenerate": session.regenerate,
        "/reset": session.reset,
        "/save": session.save,
        "/load": session.load,
        "/help": lambda _: say(HELP),
    }
    with suppress(ImportError):
        import readline  # noqa: F401 - editing and history in input()
    template = "its own template" if prompts.template.name == OWN else f"template {prompts.template.name}"
    say(f"{args.model}, {template}; /help lists commands, Ctrl-D ends")
    while (line := _read()) is not None:
        name, _, rest = line.strip().partition(" ")
        if name in ("/quit", "/exit"):
            break
        try:
            if name in commands:
                commands[name](rest.strip())
            elif name.startswith("/"):
                say(f"unknown command {name}; /help lists them")
            elif line.strip():
                session.ask(line)
        except ValueError as error:  # an InputError, or a text that is not valid Unicode
            say(f"error: {error}")
    return 0


def _read() -> str | None:
    """A line of input; None at its end. Ctrl-C clears the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return None
        except KeyboardInterrupt:
            say("")
