"""Conversation: messages of a system, a user, an assistant and its tools."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from minillama.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user"} | dict.fromkeys(("gpt", "model", "bot", "chatgpt"), "assistant")
ALIASES |= dict.fromkeys(("observation", "function", "ipython"), "tool")


@dataclass(frozen=True)
class Message:
    """Message of a conversation.

    Args:
        role: one of `ROLES`.
        content: its text.
        weight: of its tokens in the loss; None: 1 for an answer, that is a message of the assistant, and 0 otherwise.
        input: text that an instruction applies to; templates without a place for it read it as a paragraph behind
            the content.
        tool_calls: calls of functions, as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
        name: of the tool that a message comes from.
        extra: further members for the template, such as `reasoning_content`.
    """

    role: str
    content: str
    weight: float | None = None
    input: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError("unknown role", found=self.role, expected=", ".join(ROLES))
        if self.weight and not self.is_answer:
            raise InputError("only messages of the assistant are trained", found=f"{self.role} with {self.weight:g}")

    @classmethod
    def of(cls, members: Mapping[str, Any]) -> Message:
        """Message of JSON.

        Args:
            members: `role`, one of `ROLES` or `ALIASES`; `content`, a string or a list of text parts; `weight` or
                `loss_weight`; `tool_calls`; others are for the template.

        Raises:
            InputError: a missing or wrong member.
        """
        given = dict(members)
        role, content = given.pop("role", None), given.pop("content", None)
        if not isinstance(role, str):
            raise InputError("a message has no role", found=_names(members), expected="members role and content")
        calls = given.pop("tool_calls", None) or []
        if not isinstance(calls, list):
            raise InputError("tool_calls of a message", found=repr(calls)[:80], expected="a list")
        if content is None and not calls:
            raise InputError("a message has no content", found=_names(members), expected="members role and content")
        weight = given.pop("loss_weight", given.pop("weight", None))
        if weight is not None and not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise InputError("weight of a message", found=repr(weight)[:80], expected="a number of at least 0")
        name = given.pop("name", None)
        return cls(
            ALIASES.get(role, role),
            _text(content),
            None if weight is None else float(weight),
            tool_calls=tuple(map(tool_call, calls)),
            name=name if isinstance(name, str) else "",
            extra={key: value for key, value in given.items() if value is not None},
        )

    @property
    def is_answer(self) -> bool:
        """Whether the assistant wrote it."""
        return self.role == "assistant"

    @property
    def loss_weight(self) -> float:
        """Weight of its tokens in the loss."""
        return float(self.is_answer) if self.weight is None else self.weight

    @property
    def full_content(self) -> str:
        """The content, with the input as a paragraph behind it."""
        return f"{self.content}\n{self.input}" if self.input else self.content

    def for_template(self) -> dict[str, Any]:
        """Members that a template reads; `instruction` and `input` apart where there is an input."""
        members: dict[str, Any] = {**self.extra, "role": self.role, "content": self.full_content}
        if self.input:
            members |= {"instruction": self.content, "input": self.input}
        if self.tool_calls:
            members["tool_calls"] = list(self.tool_calls)
        if self.name:
            members["name"] = self.name
        return members


@dataclass(frozen=True)
class Conversation:
    """Conversation, and the tools that the assistant may call.

    Args:
        messages: in order.
        tools: descriptions, as `{"type": "function", "function": {"name": ..., "parameters": ...}}`.
        where: file and record, for messages of errors.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = ""

    @classmethod
    def of(cls, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """Conversation of messages as JSON has them, see `Message.of`.

        Raises:
            InputError: a wrong message, named by its number.
        """
        read = []
        for number, members in enumerate(messages, 1):
            try:
                read.append(Message.of(members))
            except InputError as error:
                raise error.at(f"message {number}") from None
        return cls(tuple(read), tuple(map(tool, tools)))

    @property
    def question(self) -> str:
        """What the user asks first; without a user, the first message. It decides the split of all that follows."""
        asked = next((message for message in self.messages if message.role == "user"), self.messages[0])
        return asked.full_content.strip()

    def first(self, count: int) -> Conversation:
        """The conversation up to a message."""
        return replace(self, messages=self.messages[:count])

    def until_last_answer(self) -> Conversation:
        """Without the messages that nobody answered."""
        return self.first(max((n for n, message in enumerate(self.messages, 1) if message.is_answer), default=0))


def tool(value: object) -> Mapping[str, Any]:
    """Description of a tool: an object with a name, or one inside `{"type": "function", "function": ...}`.

    Raises:
        InputError: no name.
    """
    return {"type": "function", "function": _function(value, "not a tool", '{"name": ..., "parameters": ...}')}


def _function(value: object, what: str, expected: str) -> Mapping[str, Any]:
    """Object with a name, or the one inside `{"type": "function", "function": ...}`."""
    inner = value.get("function", value) if isinstance(value, Mapping) else value
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise InputError(what, found=repr(value)[:80], expected=expected)
    return inner


def tool_call(value: object) -> Mapping[str, Any]:
    """Call of a tool, with its arguments as an object where they are JSON in a string.

    Raises:
        InputError: no name.
    """
    inner = _function(value, "not a tool call", '{"name": ..., "arguments": {...}}')
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # then it stays a string
            arguments = json.loads(arguments)
    own = {key: member for key, member in value.items() if key == "id"} if isinstance(value, Mapping) else {}
    return {**own, "type": "function", "function": {**inner, "arguments": arguments}}


def _text(content: object) -> str:
    """Text of a content: a string, nothing, or parts of type `text` with a `text` or `value`."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [part.get("text", part.get("value")) if isinstance(part, Mapping) else part for part in _list(content)]
    for part, text in zip(_list(content), texts, strict=True):
        if not isinstance(text, str) or (isinstance(part, Mapping) and part.get("type", "text") != "text"):
            raise InputError("a part of a message is not text", found=repr(part)[:80], expected='{"type": "text", ...}')
    return "".join(texts)


def _list(content: object) -> list[Any]:
    if not isinstance(content, list):
        raise InputError("content of a message", found=repr(content)[:80], expected="a string, or a list of text parts")
    return content


def _names(members: Mapping[str, Any]) -> str:
    return f"members {', '.join(map(repr, members)) or 'none'}"
