"""Cloze classification: a pattern turns a record into a text with one mask, a verbalizer maps each label to words.

Schick and Schuetze 2021, arXiv 2001.07676; Du et al. 2022, arXiv 2103.10360, §2.4. Needs an infilling model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minillama.data.reading import Record, clean
from minillama.data.skipped import BadText
from minillama.errors import InputError
from minillama.evaluate.question import MASK, Question, label_of
from minillama.inference.engine import evaluating
from minillama.inference.infill import lay_out, require_infilling
from minillama.layers.cross_entropy import log_probabilities
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import Blanks, Layout, Rows, collate

STEP = 32  # sequences are padded to a multiple of this, so that compiled code meets few shapes


class Answers(Rows):
    """Batch of records with all their candidate answers, L labels each: the tensors of `Rows` with (B, L) for (N)."""

    def scores(self, model: Decoder) -> Tensor:
        """(B, L) log p(words of the label, end | text of the record), in nats."""
        size = self.tokens.shape[:2]
        chosen = self.weights.flatten(0, 1) > 0
        mask = Mask(prefix=self.prefix.flatten())
        hidden = model.hidden(self.tokens.flatten(0, 1), positions=self.positions.flatten(0, 1), mask=mask)[chosen]
        targets = self.targets.flatten(0, 1)[chosen]
        nats = log_probabilities(model.head(hidden), targets)
        rows = torch.arange(size.numel(), device=chosen.device)[:, None].expand_as(chosen)[chosen]
        return torch.zeros(size.numel(), device=nats.device).index_add(0, rows, nats).view(size)


class Cloze:
    """Cloze classifier of records.

    Args:
        tokenizer: the model's, with the special tokens of infilling.
        context: maximum sequence length.

    Raises:
        InputError: there is no question, the tokenizer lacks the special tokens, or cannot tell two answers apart.
    """

    def __init__(self, question: Question, tokenizer: Tokenizer, context: int) -> None:
        if not question.pattern:
            expected = 'a pattern and verbalizers, as "{text} It was [MASK]." and positive=good negative=bad'
            raise InputError("there is no question", where="pattern", expected=expected)
        self.question, self.tokenizer, self.context = question, tokenizer, context
        self.blanks = Blanks.of(tokenizer)
        # A space in front of the mask belongs to the word, as in any text.
        space = question.pattern.partition(MASK)[0][-1:] == " "
        self.words = [tokenizer.encode_inside(" " * space + word) for word in question.words]
        known: dict[tuple[int, ...], str] = {(): "nothing"}
        for entry, ids in zip(question.verbalizers, self.words, strict=True):
            if tuple(ids) in known:
                found = f"{entry} and {known[tuple(ids)]} are the same tokens: {' '.join(map(str, ids)) or 'none'}"
                raise InputError("this tokenizer cannot tell two answers apart", where="verbalizers", found=found)
            known[tuple(ids)] = entry

    def label(self, record: Record) -> int:
        """Index of a record's label.

        Raises:
            BadText: it has none, or one without a verbalizer.
        """
        name, labels = self.question.label, self.question.labels
        if name not in record.value:
            raise _bad("the record has no label", record, name, _fields_of(record))
        value = label_of(record.value[name])
        if value not in labels:
            raise _bad("a label without a verbalizer", record, name, value, ", ".join(labels))
        return labels.index(value)

    def layouts(self, record: Record) -> list[Layout]:
        """Layout of the text for each answer. Where it is too long, its longest field is truncated at the end.

        Raises:
            BadText: a field is missing or not a string; the pattern alone is too long.
        """
        fields = self._fields(record)
        room = self.context - 1 - max(map(len, self.words))
        while True:
            before, after = self.question.around(fields)
            part_a, spans = lay_out([before.removesuffix(" "), after], [self.blanks.token], self.tokenizer)
            excess = len(part_a.tokens) - room
            if excess <= 0:
                return [part_a.fill(spans[0], [self.blanks.start, *words]) for words in self.words]
            longest = max(fields, key=lambda name: len(fields[name]))
            if not fields[longest]:
                found, expected = f"{len(part_a.tokens)} tokens", f"at most {room}"
                raise _bad("the pattern alone does not fit the context", record, "pattern", found, expected)
            share = excess / len(part_a.tokens)
            fields[longest] = fields[longest][: -max(1, int(share * len(fields[longest])))]

    def _fields(self, record: Record) -> dict[str, str]:
        fields = {}
        for name in self.question.fields:
            value = record.value.get(name)
            if not isinstance(value, str):
                if name in record.value:
                    raise _bad("a field of the pattern is not a string", record, name, repr(value)[:80])
                raise _bad("a field of the pattern is missing", record, name, _fields_of(record))
            text = clean(value, f"{record.where}, {name}")
            if isinstance(text, BadText):
                raise text
            fields[name] = text.text
        return fields

    def collate(self, records: Sequence[list[Layout]]) -> Answers:
        """Batch of records with equally many layouts, padded on the right."""
        longest = max(len(layout.tokens) for layouts in records for layout in layouts)
        length = min(self.context, -(-longest // STEP) * STEP)
        answers = [[*words, self.blanks.end] for words in self.words] * len(records)
        rows = collate([layout for layouts in records for layout in layouts], answers, length)
        return Answers(*(tensor.unflatten(0, (len(records), len(self.words))) for tensor in rows))

    def log_probabilities(
        self, model: Decoder, records: Sequence[list[Layout]], batch_size: int = 16
    ) -> Iterator[list[float]]:
        """Label log-probabilities ln p(label | record), p = p(words | text) / sum over the labels, record by record.

        Args:
            records: what `layouts` gives for each.
            batch_size: records per forward pass.

        Raises:
            InputError: the model was not trained for infilling.
        """
        require_infilling(model, self.tokenizer)
        for start in range(0, len(records), batch_size):
            answers = self.collate(records[start : start + batch_size])
            with evaluating(model):
                moved = Answers(*(tensor.to(model.device) for tensor in answers))
                scores = moved.scores(model).log_softmax(-1).tolist()
            yield from scores


def _fields_of(record: Record) -> str:
    return f"fields {', '.join(record.value) or 'none'}"


def _bad(what: str, record: Record, name: str, found: object, expected: object = None) -> BadText:
    return BadText("does not fit the question", what, where=f"{record.where}, {name}", found=found, expected=expected)
