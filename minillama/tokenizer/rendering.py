"""Rendered conversation: token ids, and the weight of each in the loss.

The trained spans come from the template's text: from `{% generation %}`, or else from the difference between the
prompt of an answer and the conversation up to it. Names of special tokens in a message are plain characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from minillama.errors import InputError
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.marking import Marking
from minillama.tokenizer.special import is_stand_in
from minillama.tokenizer.template import Template
from minillama.tokenizer.tokenizer import Tokenizer

TrainOn = Literal["all", "last"]


@dataclass(frozen=True)
class Rendered:
    """Rendered conversation.

    Args:
        ids: N token ids.
        weights: N weights in the loss of each token as a target, 0 where it is not trained.
        text: what the tokens say, with the names of special tokens, before any cut.
        offsets: N ranges of characters of the text.
        cut: number of tokens that were cut, of the prompt and of the answer.
    """

    ids: list[int]
    weights: list[float]
    text: str = ""
    offsets: list[tuple[int, int]] = field(default_factory=list)
    cut: tuple[int, int] = (0, 0)

    @property
    def trained(self) -> int:
        """Number of trained tokens."""
        return sum(weight > 0 for weight in self.weights)

    @property
    def end_id(self) -> int:
        """Last trained token: the end of the last answer's turn, unless it was cut."""
        return next(i for i, weight in zip(self.ids[::-1], self.weights[::-1], strict=True) if weight > 0)

    @property
    def runs(self) -> list[tuple[str, float]]:
        """The text that the tokens cover, in pieces of one weight each."""
        found: list[tuple[str, float]] = []
        done = 0
        for (start, end), weight in zip(self.offsets, self.weights, strict=True):
            piece = self.text[max(start, done) : end]
            if found and found[-1][1] == weight:
                found[-1] = (found[-1][0] + piece, weight)
            else:
                found.append((piece, weight))
            done = max(done, end)
        return found


class _Span(NamedTuple):
    """Trained characters of a coded text, and their weight."""

    start: int
    end: int
    weight: float


def encode(conversation: Conversation, template: Template, tokenizer: Tokenizer, train_on: TrainOn = "all") -> Rendered:
    """Token ids of a conversation, and the weight of each in the loss.

    Trained are the answers with the token that ends each turn. The tokens in front of an answer are those that
    `encode_prompt` gives for it, so that no token crosses into the answer. BOS comes once, from the template or the
    tokenizer; an answer whose turn no special token ends is followed by EOS if it is the last. Messages behind the
    last answer are left out.

    Args:
        conversation: with an answer.
        train_on: all answers, or the last alone; each has its own weight, 1 unless it says another.

    Raises:
        InputError: the template refuses the conversation, loses a tool or its call, or renders an answer otherwise
            than behind its prompt; or no token is trained.
    """
    answered, where = conversation.until_last_answer(), conversation.where or None
    weights = [message.loss_weight for message in answered.messages]
    if train_on == "last":
        weights = [0.0] * (len(weights) - 1) + weights[-1:]
    if not any(weights):
        found = "no answer" if not answered.messages else f"weight 0 on every answer, train_on {train_on!r}"
        raise InputError("no token of this conversation is trained", where=where, found=found)
    coded, spans = _read(Marking(answered, template, tokenizer.special), weights)
    coded, spans = _ended(coded, spans, tokenizer)
    tokens = tokenizer.special.in_parts(coded, [span.start for span in spans])
    weights = _weights(tokens.offsets, spans)
    if not any(weights):
        found = f"template {template.name} marks no answer"
        raise InputError("no token of this conversation is trained", where=where, found=found)
    text, offsets = tokenizer.special.decode(coded, tokens.offsets)
    if not _needs_bos(tokens.ids, template, tokenizer):
        return Rendered(tokens.ids, weights, text, offsets)
    bos = tokenizer.bos_token
    offsets = [(0, len(bos)), *((start + len(bos), end + len(bos)) for start, end in offsets)]
    return Rendered([tokenizer.bos_id, *tokens.ids], [0.0, *weights], bos + text, offsets)


def encode_prompt(conversation: Conversation, template: Template, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the prompt for an answer to a conversation: what `encode` has in front of this answer.

    Raises:
        InputError: the template refuses the conversation, loses a tool or its call, or fails.
    """
    marking = Marking(conversation, template, tokenizer.special)
    coded, spans = _read(marking, [0.0] * len(conversation.messages), add_generation_prompt=True)
    ids = tokenizer.special.in_parts(coded, [span.start for span in spans]).ids
    return [tokenizer.bos_id] * _needs_bos(ids, template, tokenizer) + ids


def truncated(rendered: Rendered, context: int, bos_id: int | None = None) -> Rendered:
    """A rendered conversation of at most `context` tokens.

    What precedes the last answer loses its beginning, down to half of the context; then the answer loses its end, and
    with it the token that ends the turn. An answer that has lost its beginning is not trained.

    Args:
        rendered: the conversation.
        context: number of tokens.
        bos_id: stays in front, where the conversation begins with it.
    """
    ids, weights = rendered.ids, rendered.weights
    if len(ids) <= context:
        return rendered
    end = max(i for i, weight in enumerate(weights, 1) if weight > 0)
    start = next((i for i in range(end - 1, 0, -1) if weights[i - 1] == 0), 0)  # of the last answer
    prompt = min(start, max(context - (end - start), context // 2))
    answer = min(end - start, context - prompt)
    first = start - prompt
    kept = list(range(first, start + answer))
    if first > 0 and ids[0] == bos_id:
        kept[0] = 0
    begun = first + (kept[0] == 0)
    rest = begun  # behind an answer without its beginning
    while begun > 0 and rest < start and weights[rest] and weights[rest - 1]:
        rest += 1
    return Rendered(
        [ids[i] for i in kept],
        [0.0 if begun <= i < rest else weights[i] for i in kept],
        rendered.text,
        [rendered.offsets[i] for i in kept],
        (first, end - start - answer),
    )


def _read(marking: Marking, weights: Sequence[float], add_generation_prompt: bool = False) -> tuple[str, list[_Span]]:
    """The conversation and the span of each answer, trained or not."""
    find = _marked if marking.template.marks_answers(marking.conversation) else _differences
    coded, spans = find(marking, weights, add_generation_prompt)
    marking.check_tools(coded)
    return coded, spans


def _marked(marking: Marking, weights: Sequence[float], prompt: bool) -> tuple[str, list[_Span]]:
    """The conversation, and its generation blocks."""
    count = len(weights)
    trained = [i for i, weight in enumerate(weights) if weight > 0]
    alike = {weights[i] for i, message in enumerate(marking.conversation.messages) if message.is_answer}
    if len(alike) <= 1:  # whose each block is does not matter
        whole = marking.renderings([(count, prompt)])[0]
        return whole.text, [_Span(*span, max(alike, default=0.0)) for span in whole.spans]
    prefixes = sorted({edge for i in trained for edge in (i, i + 1) if edge})
    whole, *parts = marking.renderings([(count, prompt)] + [(edge, False) for edge in prefixes])
    blocks = {0: 0} | {edge: len(part.spans) for edge, part in zip(prefixes, parts, strict=True)}
    own = [0.0] * len(whole.spans)
    done = 0
    for i in trained:
        first, last = blocks[i], blocks[i + 1]
        if first < done or last > len(own):
            fix = "give every answer the same weight, or train on the last alone"
            raise marking.fails("the template marks this answer otherwise when more messages follow", i, fix)
        own[first:last] = [weights[i]] * (last - first)
        done = last
    return whole.text, [_Span(*span, weight) for span, weight in zip(whole.spans, own, strict=True)]


def _differences(marking: Marking, weights: Sequence[float], prompt: bool) -> tuple[str, list[_Span]]:
    """The conversation, and what each answer adds to its prompt."""
    answers = [i for i, message in enumerate(marking.conversation.messages) if message.is_answer]
    prefixes = [(len(weights), prompt)] + [pair for i in answers for pair in ((i, True), (i + 1, False))]
    whole, *pairs = [rendering.text for rendering in marking.renderings(prefixes)]
    spans = []
    for i, before, answered in zip(answers, pairs[::2], pairs[1::2], strict=True):
        end = _end(before, answered, whole)
        if end is not None:
            spans.append(_Span(len(before), end, weights[i]))
        elif weights[i] > 0:
            same = "behind its prompt" if not answered.startswith(before) else "when more messages follow"
            fix = "mark the answers in the template with {% generation %}"
            if answered.startswith(before):
                fix += ", or train on the last answer alone"
            raise marking.fails(f"the template renders this answer otherwise {same}", i, fix)
    return whole, spans


def _end(before: str, answered: str, whole: str) -> int | None:
    """End of an answer in the whole conversation, None where it is not there as it is behind its prompt.

    Spaces behind the token that ends the turn do not belong to it, nor does a token that ends a conversation.
    """
    pairs = enumerate(zip(answered, whole, strict=False))
    common = len(answered) if whole.startswith(answered) else next((i for i, (a, b) in pairs if a != b), len(whole))
    if not answered.startswith(before) or common < len(before):
        return None
    bare = answered[:common].rstrip()
    if len(bare) > len(before) and is_stand_in(bare[-1]) and not any(map(_is_text, answered[len(bare) :])):
        return len(bare)
    return common if common == len(answered) else None


def _is_text(character: str) -> bool:
    return not (is_stand_in(character) or character.isspace())


def _ended(coded: str, spans: Sequence[_Span], tokenizer: Tokenizer) -> tuple[str, list[_Span]]:
    """Spans that end with the special token behind them, if they have none; EOS behind the last, if there is none."""
    found = []
    for start, end, weight in spans:
        if not is_stand_in(coded[start:end].rstrip()[-1:]):
            if not coded[end:].strip():
                coded = coded[:end] + tokenizer.special.stand_in(tokenizer.eos_token)
            end += is_stand_in(coded[end : end + 1])
        found.append(_Span(start, end, weight))
    return coded, found


def _needs_bos(ids: Sequence[int], template: Template, tokenizer: Tokenizer) -> bool:
    """Whether BOS is to be put in front, because the tokenizer adds it and the template has not."""
    return template.begins and tokenizer.add_bos and list(ids[:1]) != [tokenizer.bos_id]


def _weights(offsets: Sequence[tuple[int, int]], spans: Sequence[_Span]) -> list[float]:
    """Weight of each token: of the span that it touches."""
    weights, rest = [], list(reversed(spans))
    for start, end in offsets:
        while rest and rest[-1].end <= start:
            rest.pop()
        touches = rest and max(end, start + 1) > rest[-1].start
        weights.append(rest[-1].weight if touches else 0.0)
    return weights
