"""Preference data set: prompts and judged answers as token ids, in a training and a held-out split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from minillama.data.examples import by_length, drawn, is_held_out, too_few
from minillama.data.instructions import MULTIPLE
from minillama.data.preferences import Preference, preferences
from minillama.data.skipped import Skipped
from minillama.data.sources import OnError, Source, skipping
from minillama.errors import InputError
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.rendering import encode
from minillama.tokenizer.template import Template
from minillama.tokenizer.tokenizer import Tokenizer


class Answered(NamedTuple):
    """Token ids of a prompt and of the answer behind it, which the token that ends the turn belongs to.

    These are the ids of training and of scoring alike. `text` is what the prompt says.
    """

    prompt: list[int]
    answer: list[int]
    text: str = ""


def encode_answer(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> Answered:
    """Prompt and last answer of a conversation, as `encode` renders them.

    Raises:
        InputError: as `encode`.
    """
    rendered = encode(conversation, template, tokenizer, "last")
    ends = [i for i, weight in enumerate(rendered.weights) if weight > 0]
    start, stop = ends[0], ends[-1] + 1
    return Answered(rendered.ids[:start], rendered.ids[start:stop], rendered.text[: rendered.offsets[start][0]])


def fitted(
    prompt: Sequence[int], answers: Sequence[Sequence[int]], limit: int, bos_id: int | None = None
) -> tuple[list[int], list[list[int]]]:
    """A prompt and its answers, each pair of at most `limit` tokens.

    The prompt loses its beginning, down to half of the limit, the same for all answers; then answers lose their end,
    and with it the token that ends the turn.

    Args:
        bos_id: stays in front, where the prompt begins with it.
    """
    longest = max(map(len, answers))
    kept = min(len(prompt), max(limit - longest, limit // 2))
    found = list(prompt[len(prompt) - kept :])
    if kept < len(prompt) and kept and prompt[0] == bos_id:
        found[0] = prompt[0]
    return found, [list(answer[: limit - kept]) for answer in answers]


@dataclass(frozen=True)
class Judged:
    """Tokenized preference.

    Args:
        prompt: ids.
        answers: ids of the chosen and the rejected answer, or of one that was judged alone.
        label: margin of a pair; of a single answer 1 if it is desirable, 0 if not.
        where: file and record.
        probability: that the first answer of a pair is the better one.
    """

    prompt: NDArray[np.int32]
    answers: tuple[NDArray[np.int32], ...]
    label: float = 0.0
    where: str = ""
    probability: float = 1.0

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        answers: Sequence[Sequence[int]],
        label: float,
        where: str = "",
        probability: float = 1.0,
    ) -> Judged:
        """Judgment of lists."""
        arrays = (np.asarray(ids, np.int32) for ids in (prompt, *answers))
        return cls(next(arrays), tuple(arrays), label, where, probability)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


class Texts(NamedTuple):
    """Batch of texts; B judgments of L answers, T tokens.

    Args:
        ids: (B, L, T) of prompts and answers, 0 in the padding behind them.
        lengths: (B, L) numbers of tokens.
        answers: (B, L) numbers of tokens of the answers.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    answers: NDArray[np.int64]


def collate(rows: Sequence[Judged], limit: int | None = None) -> Texts:
    """Padded texts; T is a multiple of 32, so that compiled code meets few shapes, or the limit."""
    padded = -(-max(row.longest for row in rows) // MULTIPLE) * MULTIPLE
    shape = len(rows), len(rows[0].answers), min(padded, limit or padded)
    ids, lengths = np.zeros(shape, np.int64), np.zeros(shape[:2], np.int64)
    for row, judged in enumerate(rows):
        for side, answer in enumerate(judged.answers):
            text = np.concatenate([judged.prompt, answer])
            ids[row, side, : len(text)], lengths[row, side] = text, len(text)
    return Texts(ids, lengths, np.array([[len(answer) for answer in judged.answers] for judged in rows]))


@dataclass(frozen=True)
class Preferences:
    """Preference data set.

    Args:
        train: training split, each text of at most `context` tokens.
        val: held-out split; no prompt is in both.
        context: T, tokens per text.
        fingerprint: SHA-256 of ids, labels, probabilities and the split.
        skipped: records left out.
        stop_ids: special tokens that end an answer.
    """

    train: Sequence[Judged]
    val: Sequence[Judged]
    context: int
    fingerprint: str = ""
    skipped: Skipped = field(default_factory=Skipped)
    stop_ids: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        train: Sequence[Judged],
        val: Sequence[Judged],
        context: int,
        skipped: Skipped | None = None,
        stop_ids: frozenset[int] = frozenset(),
    ) -> Preferences:
        """Data set of two splits, with its fingerprint.

        Raises:
            InputError: an empty split.
        """
        if not (train and val):
            raise too_few("preferences", train, val, skipped or Skipped())
        digest = sha256(f"preferences {context}".encode())
        for split in (train, val):
            digest.update(f"{len(split)}".encode())
            for row in split:
                digest.update(f"{row.label} {[len(part) for part in (row.prompt, *row.answers)]}".encode())
                if row.probability != 1:
                    digest.update(f"probability {row.probability}".encode())
                digest.update(b"".join(part.tobytes() for part in (row.prompt, *row.answers)))
        return cls(train, val, context, digest.hexdigest(), skipped or Skipped(), stop_ids)

    def chosen(self, seed: int, step: int, count: int) -> list[int]:
        """Indices of a step's rows, without replacement within an epoch: a pure function of the arguments."""
        return drawn("preferences", seed, step, count, len(self.train))

    def where(self, seed: int, step: int, count: int, rows: Sequence[int]) -> list[str]:
        """File and record of the chosen rows of a step."""
        chosen = self.chosen(seed, step, count)
        return [self.train[chosen[row]].where for row in rows]

    def held_out(self, count: int, limit: int = 0) -> Iterator[list[Judged]]:
        """Held-out rows, `count` at a time, of similar lengths.

        Args:
            limit: approximate number of tokens in all, of evenly spaced rows; 0: all.
        """
        total = sum(len(row.answers) * row.longest for row in self.val)
        return by_length(self.val, lambda row: row.longest, count, max(1, total // limit) if limit else 1)


def load(
    sources: Sequence[Source],
    template: Template,
    tokenizer: Tokenizer,
    context: int,
    val_fraction: float,
    on_error: OnError = "stop",
    pairs: bool = True,
) -> Preferences:
    """Read and tokenize all sources once, whatever their weight.

    A preference is held out when a hash of its first question falls below `val_fraction`. Pairs of equal
    answers say nothing, and are left out with a note.

    Args:
        pairs: of two answers; else answers one by one, those of pairs as well.

    Raises:
        InputError: a record that cannot be read, rendered or compared, unless these are skipped; an empty split.
    """
    skipped, ends = Skipped(), set[int]()
    split: dict[bool, list[Judged]] = {True: [], False: []}
    for source in sources:
        for preference in preferences(source, on_error, skipped):
            where = preference.sides[0].where
            with skipping(on_error, skipped, where):
                sides = [encode_answer(side, template, tokenizer) for side in preference.sides]
                _check(preference, sides, pairs)
                if len(sides) == 2 and sides[0].answer == sides[1].answer:
                    skipped.note("pairs of equal answers left out")
                    continue
                ends |= {side.answer[-1] for side in sides}
                answers = [side.answer for side in sides]
                if max(map(len, answers)) + len(sides[0].prompt) > context:
                    skipped.note("texts truncated to the context")
                prompt, answers = fitted(sides[0].prompt, answers, context, tokenizer.bos_id)
                rows = split[is_held_out(preference.sides[0].question, val_fraction)]
                if pairs:
                    rows.append(Judged.of(prompt, answers, preference.margin, where, preference.probability))
                else:
                    labels = [float(side is preference.chosen) for side in preference.sides]
                    p = preference.probability
                    rows += [Judged.of(prompt, [ids], y, where, p) for ids, y in zip(answers, labels, strict=True)]
    return Preferences.of(split[False], split[True], context, skipped, frozenset(ends & tokenizer.special_ids))


def _check(preference: Preference, sides: Sequence[Answered], pairs: bool) -> None:
    where = preference.sides[0].where
    if pairs and len(sides) == 1:
        what, fix = "an answer that was judged alone is no pair", 'take objective.name = "kto"'
        raise InputError(what, where=where, expected="a chosen and a rejected answer", fix=fix)
    if len(sides) == 2 and sides[0].prompt != sides[1].prompt:
        raise InputError("the template renders the prompt otherwise in front of the two answers", where=where)
