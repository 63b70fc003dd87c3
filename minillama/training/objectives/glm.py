"""Autoregressive blank infilling (GLM) over windows of packed text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from minillama.evaluate.perplexity import Score
from minillama.inference.engine import evaluating
from minillama.layers.mask import Mask
from minillama.runs.objectives import GLMConfig
from minillama.tokenizer.blanks import Blanks, Layout, collate
from minillama.training.objectives.base import Batch, Metrics, TextObjective
from minillama.training.ranks import Ranks
from minillama.training.spans import Span, long_span, one_token, sentence_spans, short_spans, span_lengths

HELD_OUT = 0x61E1D  # seed of the spans in held-out text, the same in every run


class Example:
    """Infilling example: one sequence with masked spans, its targets and positions.

    Part A is the text with each span replaced by one mask token; part B is the spans in the order given, each
    read after a start token and predicted with an end token. Du et al. 2022, arXiv 2103.10360, §2.1.

    Args:
        text: (N,) token ids.
        spans: masked spans, in the order in which they are predicted.
        mask: id of the mask token.
        blanks: ids of the start and the end token.
    """

    def __init__(self, text: NDArray[np.int64], spans: list[Span], mask: int, blanks: Blanks) -> None:
        self.count = len(spans)
        ids = text.tolist()
        part_a: list[int] = []
        slots: dict[Span, int] = {}
        at = 0
        for start, stop in sorted(spans):
            part_a += ids[at:start]
            slots[start, stop] = len(part_a)
            part_a.append(mask)
            at = stop
        self.layout = Layout.of(part_a + ids[at:])
        self.targets = [0] * self.layout.prefix
        for start, stop in spans:
            self.layout = self.layout.fill(slots[start, stop], [blanks.start, *ids[start:stop]])
            self.targets += [*ids[start:stop], blanks.end]


@dataclass(eq=False)
class BlankInfilling(TextObjective):
    """Blank infilling: loss = -sum_i log p(span_i | text around the spans, span_<i), spans in random order.

    A row is a window of text with one kind of masked span, chosen by the configured shares: short spans
    ([MASK]), whole sentences ([sMASK]) or one long span ([gMASK]). Rows are padded to the context.

    Args:
        blanks: special token ids.
        ends: (V,) sentence-final tokens.
        separator: id of the token that opens a document, None where there is none.
        config: kinds and sizes of masked spans.
    """

    blanks: Blanks
    ends: NDArray[np.bool_]
    separator: int | None
    config: GLMConfig

    @property
    def window(self) -> int:
        """Tokens of text per row: one long span takes two slots more than the text that it covers."""
        return self.context - 2

    @cached_property
    def short(self) -> int:
        """The same for many short spans, with room for a quarter more of them than are expected."""
        lengths = span_lengths(self.config.mean_length)
        mean = float(lengths @ np.arange(1, len(lengths) + 1))
        return min(int(self.context / (1 + 2.5 * self.config.share / mean)), self.window)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        windows = self.data.batch(self.seed, step, self.batch_size, self.window)[:, :-1]
        rngs = [np.random.default_rng([self.seed, step, row]) for row in range(len(windows))]
        examples = [self.example(window, rng) for window, rng in zip(windows, rngs, strict=True)]
        return self.collate(examples).share(rank, world)

    def example(self, text: NDArray[np.int64], rng: np.random.Generator) -> Example:
        """Window with one kind of span."""
        config, blanks = self.config, self.blanks
        shares = np.array([config.tokens, config.sentences, config.document])
        kind = int(rng.choice(3, p=shares / shares.sum()))
        if kind != 2:
            text = text[: self.short]
        separators = text == self.separator if self.separator is not None else np.zeros(len(text), bool)
        if kind == 0:
            spans = short_spans(separators, config.share, config.mean_length, rng)
        elif kind == 1:
            spans = sentence_spans(self.ends[text], separators, config.share, rng)
        else:
            spans = long_span(separators, config.document_least, config.document_suffix, rng)
        if not spans:  # no whole sentence, or too short a document
            kind, text, separators = 0, text[: self.short], separators[: self.short]
            spans = short_spans(separators, config.share, config.mean_length, rng) or one_token(separators, rng)
        order = rng.permutation(len(spans))[: (self.context - len(text)) // 2]
        return Example(text, [spans[i] for i in order.tolist()], blanks.masks[kind], blanks)

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Batch padded to the context; padding has weight 0."""
        targets = [example.targets[example.layout.prefix :] for example in examples]
        rows = collate([example.layout for example in examples], targets, self.context)
        return Batch(rows.tokens, rows.targets, rows.weights, Mask(prefix=rows.prefix), rows.positions)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Sum of nats over the tokens of part B and the end tokens."""
        model = self.model
        chosen = batch.weights > 0  # the head is the costliest layer, and most slots have no target
        hidden = model.hidden(batch.tokens, positions=batch.positions, mask=batch.mask)[chosen]
        z_loss = self.config.z_loss if model.training else 0.0
        loss = model.loss(hidden, batch.targets[chosen], batch.weights[chosen], z_loss)
        return {"loss": loss}, {}

    def validate(self, rows: int, limit: int) -> Metrics:
        """Loss on held-out text with the same masked spans every time; bits per byte of what they cover."""
        whole, ranks = Score(0.0, 0, 0.0), Ranks.current()
        with evaluating(self.model):
            for split, windows in self.data.held_out(self.window, limit):
                numbered = enumerate(windows)
                while passed := list(islice(numbered, rows * ranks.world)):
                    own, counts = ranks.part(len(passed), rows)
                    part = [
                        self.example(text[: self.window], np.random.default_rng([HELD_OUT, i]))
                        for i, text in passed[own]
                    ]
                    batch = self.collate(part).to(self.model.device)
                    nats, weight = self.loss(batch)[0]["loss"].item(), int(batch.total("loss"))
                    covered = weight - sum(example.count for example in part)  # end tokens cover no text
                    if counts:
                        whole += Score(nats, weight, covered * split.bytes / split.tokens)
        return self.measures(whole)
