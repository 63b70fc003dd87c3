"""Preferences: pairs of a chosen and a rejected answer, or answers judged alone, in the forms that people have.

A record is rewritten as one conversation per answer, which `conversations.py` reads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from minillama.data.conversations import read_record
from minillama.data.reading import Record
from minillama.data.skipped import BadText, Skipped
from minillama.data.sources import OnError, Source, records, skipping
from minillama.errors import InputError
from minillama.files import parsing
from minillama.tokenizer.conversation import Conversation

SIDES = ("chosen", "rejected")
LABELS = ("label", "kto_tag")
EXPECTED = (
    "chosen and rejected beside prompt, instruction, question, messages or conversations; chosen_messages and "
    "rejected_messages; chosen and rejected as whole dialogues; or a conversation with a label, true or false"
)
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


class Preference(NamedTuple):
    """Preferred and dispreferred answer to one prompt, as conversations that differ in their last message.

    One of them is None where an answer was judged alone. `margin` is what the reward of the chosen one should exceed
    the other's by (Llama 2, arXiv 2307.09288, eq. 2); `probability` is that of the preference, by a judge that is not
    certain (RLAIF, arXiv 2309.00267).
    """

    chosen: Conversation | None
    rejected: Conversation | None
    margin: float = 0.0
    probability: float = 1.0

    @property
    def sides(self) -> list[Conversation]:
        """The conversations there are."""
        return [side for side in (self.chosen, self.rejected) if side is not None]


def preferences(source: Source, on_error: OnError = "stop", report: Skipped | None = None) -> Iterator[Preference]:
    """Preferences of a source of records.

    Args:
        source: as `conversations` takes it.
        on_error: stop at a record that is no preference, or skip and count it.
        report: counts of skipped records.

    Raises:
        InputError: such a record, by file and line or number, with what was expected; and as `records`.
    """
    for record in records(source, on_error, report):
        with skipping(on_error, report):
            yield read_preference(record)


def is_preference(fields: Mapping[str, Any]) -> bool:
    """Whether a record is made for comparisons alone; one of a conversation may have a rejected answer beside it."""
    return bool({"chosen", "chosen_messages", *LABELS} & fields.keys())


def read_preference(record: Record) -> Preference:
    """Preference of a record.

    Raises:
        BadText: it is none, or its answers do not answer the same.
    """
    try:
        with parsing(record.where):
            return _preference(record)
    except BadText:
        raise
    except InputError as error:
        wanted = error.expected or EXPECTED
        raise BadText("no preference", error.what, where=record.where, found=error.found, expected=wanted) from None


def _preference(record: Record) -> Preference:
    fields = record.value
    if {"rejected", "rejected_messages"} & fields.keys():
        chosen, rejected = (_conversation(_side(fields, name), record.where) for name in SIDES)
        if chosen.messages[:-1] != rejected.messages[:-1]:
            expected = "the same messages in front of the last answer"
            raise InputError("the two answers do not answer the same", expected=expected)
        return Preference(chosen, rejected, _margin(fields), _probability(fields))
    label = next((fields[name] for name in LABELS if name in fields), None)
    if label not in (True, False):  # 1 and 0 are
        names = ", ".join(map(repr, fields)) or "none"
        raise InputError("not a record of preferences", found=f"fields {names}", expected=EXPECTED)
    judged = _conversation(fields, record.where)
    return Preference(judged, None) if label else Preference(None, judged)


def _conversation(fields: Mapping[str, Any], where: str) -> Conversation:
    found = read_record(Record(dict(fields), where))
    if len(found) != 1 or not found[0].messages[-1].is_answer:
        raise InputError("an answer is not the last message of one conversation", found=f"{len(found)} conversations")
    return found[0]


def _side(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Record of a conversation that ends with one of the two answers."""
    if f"{name}_messages" in fields:
        return {"messages": fields[f"{name}_messages"]}
    rest = {key: value for key, value in fields.items() if key not in (*SIDES, "margin", "probability")}
    answer, turns = fields.get(name), next((key for key in ("messages", "conversations") if key in fields), None)
    if name == "chosen" and answer is None:  # of a record for fine-tuning with a rejected answer beside
        answer = next((rest[key] for key in ("response", "completion", "output") if key in rest), None)
    if turns is not None:
        earlier = _list(fields, turns)
        if "chosen" not in fields:  # the conversation's own last answer is
            return rest if name == "chosen" else {**rest, turns: [*earlier[:-1], _message(answer, earlier)]}
        return {**rest, turns: [*earlier, _message(answer, earlier)]}
    if isinstance(answer, list | Mapping):
        own, prompt = _list(fields, name) if isinstance(answer, list) else [answer], rest.pop("prompt", [])
        if isinstance(prompt, str):  # which the messages may repeat
            prompt = [{"role": "user", "content": prompt}] if len(own) == 1 else []
        return {**rest, "messages": [*prompt, *own]}
    if not isinstance(answer, str):
        raise InputError(f"{name!r} is no answer", found=repr(answer)[:80], expected=EXPECTED)
    prompt = rest.get("prompt", rest.pop("question", None))
    if isinstance(prompt, list):
        return {**rest, "messages": [*prompt, _message(answer, prompt)]}
    if isinstance(prompt, str) and not _TURN.match(prompt):
        return {**rest, "prompt": prompt, "response": answer}
    if "instruction" in fields:
        return {**rest, "output": answer}
    return {"messages": _dialogue((prompt or "") + answer)}


def _message(answer: object, earlier: list[Any]) -> object:
    """An answer as a message, in the form of those in front of it."""
    if not isinstance(answer, str):
        return answer
    is_sharegpt = bool(earlier) and isinstance(earlier[0], Mapping) and "from" in earlier[0]
    return {"from": "gpt", "value": answer} if is_sharegpt else {"role": "assistant", "content": answer}


def _dialogue(text: str) -> list[dict[str, str]]:
    """Messages of a text with turns that begin with Human: and Assistant: behind empty lines (HH-RLHF)."""
    before, *turns = _TURN.split(text)
    if before.strip() or not turns:
        raise InputError("no prompt, and not a dialogue of Human: and Assistant:", found=repr(text[:60]))
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [{"role": _ROLES[name], "content": content.strip()} for name, content in pairs]


def _list(fields: Mapping[str, Any], key: str) -> list[Any]:
    value = fields[key]
    if not isinstance(value, list):
        raise InputError(f"{key!r} is not a list of messages", found=repr(value)[:80])
    return value


def _margin(fields: Mapping[str, Any]) -> float:
    value = fields.get("margin", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError("the margin is not a number", found=repr(value)[:80])
    return float(value)


def _probability(fields: Mapping[str, Any]) -> float:
    value = fields.get("probability", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError("the probability is not a number between 0 and 1", found=repr(value)[:80])
    if value < 0.5:
        fix = "exchange the two answers, and write 1 less it"
        raise InputError("the chosen answer is the less probable one", found=value, expected="0.5 to 1", fix=fix)
    return float(value)
