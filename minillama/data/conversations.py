"""Conversations of fine-tuning files: Alpaca, Dolly, ShareGPT, messages, prompt and response, Self-Instruct's tasks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import dropwhile
from typing import Any, Literal, NamedTuple

from minillama.data.reading import Record
from minillama.data.skipped import BadText, Skipped
from minillama.data.sources import OnError, Source, records, skipping
from minillama.errors import InputError
from minillama.tokenizer.conversation import ALIASES, Conversation, Message, tool

Format = Literal["auto", "alpaca", "dolly", "sharegpt", "messages", "pairs", "seed-tasks"]


def conversations(
    source: Source, format: Format = "auto", on_error: OnError = "stop", report: Skipped | None = None
) -> Iterator[Conversation]:
    """Conversations of a source of records.

    Args:
        source: .jsonl, .json or .ndjson files, perhaps .gz or .zst, or a data set of the hub.
        format: of the records; auto: each as its fields say.
        on_error: stop at a record that cannot be read, or skip and count it.
        report: counts of skipped records.

    Raises:
        InputError: such a record, by file and line or number, with what was expected; and as `records`.
    """
    for record in records(source, on_error, report):
        with skipping(on_error, report):
            yield from read_record(record, format, report)


def read_record(record: Record, format: Format = "auto", report: Skipped | None = None) -> list[Conversation]:
    """Conversations of a record: one, or as many as a task has instances.

    Answers of ShareGPT that precede any question are left out, as FastChat does, and noted in the report.

    Raises:
        BadText: the record has none of the formats, or not the one that is named; or its text is not valid.
    """
    _check_text(record)
    fields = record.value
    for name, kind in _FORMATS.items():
        if format == name or (format == "auto" and kind.fits(fields)):
            try:
                found = kind.read(fields)
            except InputError as error:
                raise _bad(record, error, kind.expected) from None
            if report is not None and any(parts.unasked for parts in found):
                report.note("conversations without the answer in front of their first question")
            return [Conversation(parts.messages, parts.tools, record.where) for parts in found]
    names = ", ".join(map(repr, fields)) or "none"
    expected = "; or ".join(kind.expected for kind in _FORMATS.values())
    raise BadText(
        "no conversation",
        "not a record of a known format",
        where=record.where,
        found=f"fields {names}",
        expected=expected,
    )


class _Parts(NamedTuple):
    """Messages and tools of a conversation, and the number of answers left out in front of them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    unasked: int = 0


class _Format(NamedTuple):
    """Format of a record.

    Args:
        fits: whether fields are of this format.
        read: conversations of the fields.
        expected: for messages of errors.
    """

    fits: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], list[_Parts]]
    expected: str


def _alpaca(fields: Mapping[str, Any]) -> list[_Parts]:
    opening = _system(fields) + _history(fields)
    asked = _exchange(fields, "instruction", "output", fields.get("input"))
    return [_Parts((*opening, *asked))]


def _dolly(fields: Mapping[str, Any]) -> list[_Parts]:
    return [_Parts(_exchange(fields, "instruction", "response", fields.get("context")))]


def _seed_tasks(fields: Mapping[str, Any]) -> list[_Parts]:
    instances = _list(fields, "instances")
    instruction = {"instruction": fields.get("instruction")}
    return [_Parts(_exchange({**instruction, **i}, "instruction", "output", i.get("input"))) for i in instances]


def _sharegpt(fields: Mapping[str, Any]) -> list[_Parts]:
    turns = _list(fields, "conversations")
    messages = [_numbered(_turn, turn, number) for number, turn in enumerate(turns, 1)]
    opening = messages[: messages[0].role == "system"]
    rest = messages[len(opening) :]
    asked = list(dropwhile(lambda message: message.is_answer, rest))
    parts = (*_system(fields), *opening, *asked)
    return [_Parts(_answered(parts), _tools(fields), len(rest) - len(asked))]


def _turn(turn: Mapping[str, Any]) -> Message:
    """Message of a turn `{"from": ..., "value": ...}`."""
    role, value = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or not isinstance(value, str):
        found = ", ".join(map(repr, turn)) or "nothing"
        raise InputError("not a turn", found=found, expected="strings in 'from' and 'value'")
    weight = {key: turn[key] for key in ("loss_weight", "weight") if key in turn}
    if role in ("function_call", "tool_call"):
        calls = _json(value, "function_call")
        return Message.of(
            {"role": "assistant", "content": "", "tool_calls": calls if isinstance(calls, list) else [calls], **weight}
        )
    return Message.of({"role": ALIASES.get(role, role), "content": value, **weight})


def _messages(fields: Mapping[str, Any]) -> list[_Parts]:
    turns = _list(fields, "messages" if "messages" in fields else "conversations")
    messages = [_numbered(Message.of, turn, number) for number, turn in enumerate(turns, 1)]
    return [_Parts(_answered((*_system(fields), *messages)), _tools(fields))]


def _pairs(fields: Mapping[str, Any]) -> list[_Parts]:
    answer = "response" if "response" in fields else "completion"
    if isinstance(fields.get("prompt"), list):  # messages, and those that answer them
        turns = _list(fields, "prompt") + _list(fields, answer)
        return _messages({"messages": turns, "tools": fields.get("tools")})
    return [_Parts((*_system(fields), *_exchange(fields, "prompt", answer, None)))]


def _is_sharegpt(fields: Mapping[str, Any]) -> bool:
    turns = fields.get("conversations")
    return isinstance(turns, list) and not (turns and isinstance(turns[0], Mapping) and "role" in turns[0])


_FORMATS = {
    "messages": _Format(
        lambda fields: "messages" in fields or ("conversations" in fields and not _is_sharegpt(fields)),
        _messages,
        "messages: [{role, content}, ...]",
    ),
    "sharegpt": _Format(_is_sharegpt, _sharegpt, "conversations: [{from, value}, ...]"),
    "seed-tasks": _Format(
        lambda fields: {"instruction", "instances"} <= fields.keys(),
        _seed_tasks,
        "instruction, instances: [{input, output}, ...]",
    ),
    "alpaca": _Format(
        lambda fields: {"instruction", "output"} <= fields.keys(), _alpaca, "instruction, output, perhaps input"
    ),
    "dolly": _Format(
        lambda fields: {"instruction", "response"} <= fields.keys(), _dolly, "instruction, response, perhaps context"
    ),
    "pairs": _Format(
        lambda fields: "prompt" in fields and ("response" in fields or "completion" in fields),
        _pairs,
        "prompt, response or completion",
    ),
}


def _exchange(fields: Mapping[str, Any], question: str, answer: str, given: object) -> tuple[Message, Message]:
    """A question, perhaps with an input, and its answer."""
    if not isinstance(given, str | None):
        raise InputError("the input is not a string", found=repr(given)[:80])
    asked, answered = _string(fields, question), _string(fields, answer)
    if not answered.strip():
        raise InputError("the answer is empty", found=f"{answer} = {answered!r}")
    return Message("user", asked, input=given or ""), Message("assistant", answered)


def _history(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    """Earlier exchanges, `history: [[question, answer], ...]`."""
    pairs = fields.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError("not a history", found=repr(pairs)[:80], expected="[[question, answer], ...]")
    found = [_exchange({"question": q, "answer": a}, "question", "answer", None) for q, a in pairs]
    return tuple(message for pair in found for message in pair)


def _system(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    return (Message("system", _string(fields, "system")),) if fields.get("system") else ()


def _tools(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools of a record: a list, or JSON of one."""
    found = fields.get("tools") or []
    if isinstance(found, str):
        found = _json(found, "tools") if found.strip() else []
    if not isinstance(found, list):
        raise InputError("tools are not a list", found=repr(found)[:80])
    return tuple(map(tool, found))


def _answered(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not any(message.is_answer and (message.content.strip() or message.tool_calls) for message in messages):
        raise InputError("nothing in it is of the assistant", found=f"{len(messages)} messages")
    return messages


def _numbered(read: Callable[[Mapping[str, Any]], Message], turn: Mapping[str, Any], number: int) -> Message:
    try:
        return read(turn)
    except InputError as error:
        raise InputError(f"{error.what}, in message {number}", found=error.found, expected=error.expected) from None


def _string(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str):
        raise InputError(f"{key!r} is not a string", found=repr(value)[:80])
    return value


def _list(fields: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = fields.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"{key!r} is not a list of objects", found=repr(value)[:80])
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON", found=f"{error}: {text[:60]!r}") from None


def _check_text(record: Record) -> None:
    """Refuse NUL and lone surrogates."""
    text = json.dumps(record.value, ensure_ascii=False)
    if re.search(r"(?<!\\)(?:\\\\)*\\u0000", text):
        raise BadText("NUL", "there is a NUL character in this record", where=record.where)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"a lone surrogate, {text[error.start]!a}"
        raise BadText("invalid Unicode", "this record is not valid Unicode", where=record.where, found=found) from None


def _bad(record: Record, error: InputError, expected: str) -> BadText:
    expected = f"{error.expected}" if error.expected else expected
    return BadText("no conversation", error.what, where=record.where, found=error.found, expected=expected)
