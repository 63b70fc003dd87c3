"""Marked rendering: which characters of a rendered conversation are a template's and which are a message's.

Names of special tokens in the messages are replaced before the template sees them, and put back as plain characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from minillama.errors import InputError
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.spec import check_unicode
from minillama.tokenizer.special import SpecialEncoder, refuse_stand_ins
from minillama.tokenizer.template import Template


class Coded(NamedTuple):
    """Rendered conversation as coded text, see `SpecialEncoder`.

    Args:
        text: with a stand-in for each special token of the template.
        spans: character ranges of the `{% generation %}` blocks.
    """

    text: str
    spans: list[tuple[int, int]]


class Marking:
    """Renderings of a conversation and its prefixes, as coded text.

    Args:
        encoder: has the names of the special tokens.

    Raises:
        InputError: characters that no message may hold.
    """

    def __init__(self, conversation: Conversation, template: Template, encoder: SpecialEncoder) -> None:
        self.conversation, self.template, self._encoder = conversation, template, encoder
        messages = [message.for_template() for message in conversation.messages]
        everything = json.dumps([messages, conversation.tools, template.source_for(conversation)], ensure_ascii=False)
        try:
            check_unicode(everything)
            refuse_stand_ins(everything)
        except InputError as error:
            raise error.at(conversation.where or None) from None
        self._names: list[str] = []
        self._mark = next(chr(i) for i in range(0xE000, 0xF900) if chr(i) not in everything)
        roles = [message["role"] for message in messages]
        self._messages = [self._hidden(message) | {"role": role} for message, role in zip(messages, roles, strict=True)]
        self._tools = self._hidden(list(conversation.tools))
        # JSON inside a template may escape the mark
        mark = f"(?:{self._mark}|{re.escape(json.dumps(self._mark)[1:-1])})"
        self._tokens = re.compile(
            rf"{mark}(?:(?P<open>\()|(?P<close>\))|(?P<hidden>\d+){mark})|(?P<name>{encoder.names.pattern})|(?P<odd>{mark})"
        )

    def renderings(self, prefixes: Sequence[tuple[int, bool]]) -> list[Coded]:
        """Renderings of the first messages, with or without a generation prompt."""
        texts = self.template.renderings(self.conversation, self._messages, prefixes, self._mark, self._tools)
        return [self._scan(text) for text in texts]

    def fails(self, what: str, message: int | None = None, fix: str | None = None) -> InputError:
        """Error of this conversation and its template."""
        where = ", ".join(
            part for part in (self.conversation.where, f"message {message + 1}" if message is not None else "") if part
        )
        return InputError(what, where=where or None, found=f"template {self.template.name}", fix=fix)

    def check_tools(self, coded: str) -> None:
        """Refuse a rendering that has lost a tool or a tool call.

        Raises:
            InputError: the name of one of them is not in the text.
        """
        conversation = self.conversation
        calls = [call for message in conversation.messages for call in message.tool_calls]
        for kind, items in (("a tool call", calls), ("a tool", conversation.tools)):
            for item in items:
                name = item["function"]["name"]
                if name not in coded and json.dumps(name)[1:-1] not in coded:
                    raise self.fails(f"the template leaves out {kind}: {name}", fix="choose a template with tools")

    def _hidden(self, value: Any) -> Any:
        """A JSON value in which marked numbers stand for names of special tokens."""
        if isinstance(value, str):
            return self._encoder.names.sub(self._hide, value)
        if isinstance(value, dict):
            return {self._hidden(key): self._hidden(member) for key, member in value.items()}
        return [self._hidden(member) for member in value] if isinstance(value, list | tuple) else value

    def _hide(self, match: re.Match[str]) -> str:
        self._names.append(match[0])
        return f"{self._mark}{len(self._names) - 1}{self._mark}"

    def _scan(self, text: str) -> Coded:
        parts: list[str] = []
        length, done = 0, 0
        opened: list[int] = []
        spans: list[tuple[int, int]] = []
        for match in self._tokens.finditer(text):
            parts.append(text[done : match.start()])
            length += match.start() - done
            done = match.end()
            if match["open"]:
                opened.append(length)
            elif match["close"]:
                spans.append((opened.pop(), length))
            elif match["odd"]:
                raise self.fails("the template cuts a message inside the name of a special token")
            else:
                hidden = match["hidden"]
                parts.append(self._names[int(hidden)] if hidden else self._encoder.stand_in(match["name"]))
                length += len(parts[-1])
        parts.append(text[done:])
        return Coded("".join(parts), spans)
