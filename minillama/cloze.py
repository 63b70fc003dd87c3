"""Classification as a cloze question: a pattern writes a record as a text with a blank, a word stands for each label.

Schick and Schuetze 2021, arXiv 2001.07676; Du et al. 2022, arXiv 2103.10360, §2.4. Needs a model that fills blanks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillama.blanks import Blanks, Layout
from minillama.errors import InputError
from minillama.generation import evaluating
from minillama.infilling import Cut
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.question import Question, label_of
from minillama.tokenizer import Tokenizer

__all__ = ["Answers", "Cloze"]

STEP = 32  # rows are padded to a multiple of this, so that compiled code meets few shapes


class Answers(NamedTuple):
    """Records with all their possible answers, L labels each; T slots.

    Args:
        tokens: (B, L, T) ids.
        targets: (B, L, T) ids.
        answer: (B, L, T) 1 where a token of the answer is predicted, its end included.
        positions: (B, L, 2, T).
        prefix: (B, L).
    """

    tokens: Tensor
    targets: Tensor
    answer: Tensor
    positions: Tensor
    prefix: Tensor

    def scores(self, model: Decoder) -> Tensor:
        """(B, L) log p(words of the label, end | the record's text), in nats."""
        size = self.tokens.shape[:2]
        chosen = self.answer.flatten(0, 1) > 0
        mask = Mask(prefix=self.prefix.flatten())
        hidden = model.hidden(self.tokens.flatten(0, 1), self.positions.flatten(0, 1), mask)[chosen]
        targets = self.targets.flatten(0, 1)[chosen]
        nats = model.head(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        rows = torch.arange(size.numel(), device=chosen.device)[:, None].expand_as(chosen)[chosen]
        return torch.zeros(size.numel(), device=nats.device).index_add(0, rows, nats).view(size)


class Cloze:
    """Asks the question about records.

    Args:
        config: the question.
        tokenizer: the model's, with the marks of blanks.
        context: slots at most.

    Raises:
        InputError: the question or the tokenizer lacks something.
    """

    def __init__(self, config: Question, tokenizer: Tokenizer, context: int) -> None:
        if not config.pattern:
            fix = 'give cloze.pattern and cloze.verbalisers, as "{text} It was [MASK]." and positive=good negative=bad'
            raise InputError("there is no question", where="cloze.pattern", fix=fix)
        self.config, self.tokenizer, self.context = config, tokenizer, context
        self.blanks = Blanks.of(tokenizer)
        space = config.pattern.partition("[MASK]")[0][-1:] == " "  # it belongs to the word, as in any text
        self.words = [tokenizer.encode(" " * space + word.lstrip(" ")) for word in config.words]

    def label(self, record: Mapping[str, Any], where: str) -> int:
        """The number of a record's label.

        Raises:
            InputError: it has none, or one without a verbaliser.
        """
        name = self.config.label
        if name not in record:
            raise InputError("the record has no label", where=f"{where}, {name}", found=", ".join(record))
        value = label_of(record[name])
        if value not in self.config.labels:
            expected = ", ".join(self.config.labels)
            raise InputError("a label without a verbaliser", where=f"{where}, {name}", found=value, expected=expected)
        return self.config.labels.index(value)

    def layouts(self, record: Mapping[str, Any], where: str) -> list[Layout]:
        """The text with each answer in its blank. Where it is too long, the end of its longest field is left out.

        Raises:
            InputError: a field is missing or no text; the pattern alone is too long.
        """
        fields = {}
        for name in self.config.fields:
            value = record.get(name)
            if not isinstance(value, str):
                what = "is no text" if name in record else "is missing"
                raise InputError(f"a field of the pattern {what}", where=f"{where}, {name}", found=repr(value)[:80])
            fields[name] = value
        room = self.context - 1 - max(map(len, self.words))
        while True:
            cut = Cut(self.config.pattern.format(**_without_marks(fields)), self.tokenizer, where)
            excess = len(cut.layout.tokens) - room
            if excess <= 0:
                break
            longest = max(fields, key=lambda name: len(fields[name]))
            if not fields[longest]:
                found, expected = f"{len(cut.layout.tokens)} tokens", f"at most {room}"
                raise InputError("the pattern does not fit the context", where=where, found=found, expected=expected)
            share = excess / len(cut.layout.tokens)
            fields[longest] = fields[longest][: -max(1, int(share * len(fields[longest])))]
        return [cut.layout.fill(cut.places[0], [self.blanks.start, *words]) for words in self.words]

    def collate(self, records: Sequence[list[Layout]]) -> Answers:
        """Records of equally many layouts, padded on the right."""
        longest = max(len(layout.tokens) for layouts in records for layout in layouts)
        shape = len(records), len(self.words), min(self.context, -(-longest // STEP) * STEP)
        tokens, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        answer, positions = torch.zeros(shape), torch.zeros(*shape[:2], 2, shape[2], dtype=torch.long)
        prefix = torch.tensor([[layout.prefix for layout in layouts] for layouts in records])
        for i, layouts in enumerate(records):
            for j, (layout, words) in enumerate(zip(layouts, self.words, strict=True)):
                size = len(layout.tokens)
                tokens[i, j, :size] = torch.tensor(layout.tokens)
                positions[i, j, :, :size] = torch.tensor(layout.places).T
                targets[i, j, layout.prefix : size] = torch.tensor([*words, self.blanks.end])
                answer[i, j, layout.prefix : size] = 1
        return Answers(tokens, targets, answer, positions, prefix)

    def log_probabilities(
        self, model: Decoder, records: Sequence[Mapping[str, Any]], batch_size: int = 16
    ) -> Iterator[list[float]]:
        """Ln p(label | record), p = p(words | text) / sum over the labels, of one record after the other."""
        with evaluating(model):
            for start in range(0, len(records), batch_size):
                part = records[start : start + batch_size]
                answers = self.collate([self.layouts(r, f"record {start + i + 1}") for i, r in enumerate(part)])
                moved = Answers(*(tensor.to(model.device) for tensor in answers))
                yield from moved.scores(model).log_softmax(-1).tolist()


def _without_marks(fields: Mapping[str, str]) -> dict[str, str]:
    """Fields whose text cannot be taken for the pattern's blank."""
    return {name: value.replace("MASK]", "MASK ]") for name, value in fields.items()}
