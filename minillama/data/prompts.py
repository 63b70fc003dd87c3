"""Prompts to be answered: the questions of conversations, with the answers to verify others by where they have some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from minillama.data.conversations import Format, read_record
from minillama.data.corpus import Corpus
from minillama.data.examples import drawn, is_held_out, too_few
from minillama.data.reading import Record
from minillama.data.skipped import BadText, Skipped
from minillama.data.sources import OnError, Source, records, skipping
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.rendering import encode
from minillama.tokenizer.template import Template

_OPEN = "?"  # stands where a record has no answer


def longest_prompt(context: int, max_new_tokens: int) -> int:
    """Tokens of the longest prompt behind which an answer fits, and the end token of one that was cut off.

    Reward models read that token as well.
    """
    return context - max_new_tokens - 1


@dataclass(frozen=True)
class Prompt:
    """Prompt of a conversation's last answer.

    Args:
        ids: token ids in front of that answer.
        text: what they say.
        record: fields of the record; `answer` is the answer, if it has one.
        conversation: its messages, without that answer.
        where: file and record.
    """

    ids: Sequence[int]
    text: str
    record: Mapping[str, Any]
    conversation: Conversation
    where: str


@dataclass(frozen=True)
class Prompts:
    """Prompts in a training and a held-out split.

    Args:
        train: training split.
        val: held-out split: those whose first question has a hash below the fraction, as for fine-tuning on them.
        end_id: token that ends an answer.
        fingerprint: SHA-256 of the prompts and the split.
        skipped: records left out.
        text: pretraining text that is mixed in.
    """

    train: Sequence[Prompt]
    val: Sequence[Prompt]
    end_id: int
    fingerprint: str = ""
    skipped: Skipped = field(default_factory=Skipped)
    text: Corpus | None = None

    @classmethod
    def load(
        cls,
        sources: Sequence[Source],
        template: Template,
        tokenizer: Tokenizer,
        longest: int,
        val_fraction: float,
        format: Format = "auto",
        on_error: OnError = "stop",
    ) -> Prompts:
        """Read all sources once.

        Args:
            sources: of conversations, or of prompts alone (`prompt`, `instruction`, messages that end with a question).
            longest: tokens that a prompt may have; longer ones are left out and counted.
            val_fraction: held-out share; 0: none.
            format: of the records.
            on_error: on a record that cannot be read.

        Raises:
            InputError: such a record; no prompt to train on, or none to hold out.
        """
        skipped, end_id = Skipped(), tokenizer.eos_id
        split: dict[bool, list[Prompt]] = {True: [], False: []}
        digest = sha256(f"{val_fraction} {longest}".encode())
        for source in sources:
            for prompt, question, end in _prompts(source, template, tokenizer, format, on_error, skipped):
                if len(prompt.ids) > longest:
                    skipped.add(BadText("too long", "a prompt is too long", where=prompt.where))
                    continue
                end_id = end
                held_out = is_held_out(question, val_fraction)
                digest.update(f"{held_out} {prompt.ids} {prompt.record.get('answer')}\n".encode())
                split[held_out].append(prompt)
        if not split[False] or (val_fraction and not split[True]):
            raise too_few("prompts", split[False], split[True], skipped, f", of at most {longest} tokens")
        return cls(split[False], split[True], end_id, digest.hexdigest(), skipped)

    def batch(self, seed: int, step: int, count: int) -> list[Prompt]:
        """Prompts of a rollout, without replacement within an epoch: a pure function of the arguments."""
        return [self.train[i] for i in drawn("prompts", seed, step, count, len(self.train))]


def _prompts(
    source: Source, template: Template, tokenizer: Tokenizer, format: Format, on_error: OnError, skipped: Skipped
) -> Iterator[tuple[Prompt, str, int]]:
    """Prompts of a source, each with the question that decides its split and the token that ends its answer."""
    for record in records(source, on_error, skipped):
        with skipping(on_error, skipped, record.where):
            for conversation in read_record(answered(record), format, skipped):
                yield _prompt(conversation.until_last_answer(), record, template, tokenizer)


def _prompt(
    conversation: Conversation, record: Record, template: Template, tokenizer: Tokenizer
) -> tuple[Prompt, str, int]:
    rendered, answer = encode(conversation, template, tokenizer, "last"), conversation.messages[-1].content
    ids = rendered.ids[: next(i for i, weight in enumerate(rendered.weights) if weight)]
    fields = record.value if answer == _OPEN else {**record.value, "answer": answer}
    asked = conversation.first(len(conversation.messages) - 1)
    return Prompt(ids, tokenizer.decode(ids), fields, asked, record.where), conversation.question, rendered.end_id


def answered(record: Record) -> Record:
    """The record with an answer where it has a prompt alone, or one of which answers are compared."""
    fields = record.value
    for key, member in (("messages", "role"), ("conversations", "role"), ("conversations", "from"), ("prompt", "role")):
        turns = fields.get(key)
        if not (isinstance(turns, list) and turns and isinstance(turns[-1], dict)):
            continue
        if turns[-1].get(member) in ("user", "human"):
            role, content = ("assistant", "content") if member == "role" else ("gpt", "value")
            whole = [*turns, {member: role, content: _OPEN}]
            return Record({"messages": whole} if key == "prompt" else {**fields, key: whole}, record.where)
    if isinstance(fields.get("prompt"), str) and not {"response", "completion"} & fields.keys():
        return Record({**fields, "response": _OPEN}, record.where)
    if "instruction" in fields and not {"output", "response", "instances"} & fields.keys():
        return Record({**fields, "output": _OPEN}, record.where)
    return record
