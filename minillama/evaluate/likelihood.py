"""Log-likelihood of continuations; a prefix that several of them share is read once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minillama.config.arguments import checked
from minillama.errors import InputError
from minillama.inference.engine import evaluating
from minillama.inference.request import check_ids
from minillama.layers.cache import State
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer.blanks import Blanks

SHARED = 8  # tokens that neighbors in lexicographic order have in common, from which a prefill of their own pays
LOGITS = 2**23  # logits in memory at once
GROUP = 8  # passes whose states are in memory at once
PADDING = 64, 4096  # padded tokens of a pass on a CPU and on a GPU, from which two passes cost less than one
WORK = 4e12, 1e15  # FLOP of such passes on a CPU and on a GPU, so that a large model shows results, too
SLOTS = 8  # of the decode state of a pass, per token
Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""


class Likelihood(NamedTuple):
    """Log-likelihood ln P(continuation | context) in nats, and whether greedy decoding gives the continuation."""

    nats: float
    is_greedy: bool


@checked
def log_likelihoods(model: Decoder, context: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Likelihood]:
    """Log-likelihoods sum_i ln P(token_i | context, tokens before i) of continuations of one context.

    Args:
        context: token ids, at least one.
        continuations: token ids, each at least one.

    Returns:
        One likelihood per continuation, in order.

    Raises:
        InputError: an empty part, an id that is none of the model's, or more ids than the model's context.
    """
    context, *continuations = (list(map(operator.index, ids)) for ids in (context, *continuations))
    check_ids([*context, *chain.from_iterable(continuations)], model.config.vocab_size)
    longest = len(context) + max(map(len, continuations), default=0)
    if longest > model.config.max_seq_len:
        expected = f"at most {model.config.max_seq_len}"
        what = "the sequence is longer than the model's context"
        raise InputError(what, found=f"{longest} tokens", expected=expected)
    found = dict(score(model, [[(context, continuation) for continuation in continuations]]))
    return found.get(0, [])


def score(
    model: Decoder, items: Sequence[Sequence[Pair]], blanks: Blanks | None = None, tokens: int = 0
) -> Iterator[tuple[int, list[Likelihood]]]:
    """Log-likelihoods of items of several pairs each, in the order in which they are ready, a few passes after another.

    The sequences are a tree: what all pairs of an item have in common is read once for them, and so is what items
    with a long common prefix share, as a few-shot prompt. Each pass reads nodes of one level and about one length;
    logits are computed where a token of a continuation is predicted and nowhere else. What is too long for the model
    loses tokens on the left. Results do not depend on batch size and order, but for rounding.

    Args:
        items: pairs (context, continuation) of token ids, no part empty.
        blanks: special tokens of an infilling model, which reads a context in both directions.
        tokens: per pass; by the device unless given.

    Yields:
        Index of an item, and the likelihoods of its pairs.

    Raises:
        InputError: an empty part, a continuation longer than the model's context, or a NaN or infinite logit.
    """
    context = model.config.max_seq_len
    trees: list[_Node] = []
    for number, pairs in enumerate(items):
        for before, after in pairs:
            if not before or not after:
                raise InputError("an empty context or continuation", fix="use the bos token where there is no context")
            if len(after) > context - (2 if blanks else 0):  # a mask and the start of its span
                found, expected = f"{len(after)} tokens", f"at most {context - (2 if blanks else 0)}"
                raise InputError("a continuation is longer than the model's context", found=found, expected=expected)
        made = _infilling(number, pairs, blanks, context) if blanks else _trees(number, pairs, context)
        trees += made
    results = _Results(items)
    reader = _Reader(model, results, tokens)
    for _ in reader.read(trees if blanks else _shared(trees)):
        yield from results.ready()


def lost(pair: Pair, context: int, blanks: Blanks | None = None) -> int:
    """Tokens on the left of a pair that `score` leaves out, by the model's context."""
    before, after = pair
    room = max(1, context - 1 - len(after)) if blanks else context + 1 - len(after)
    return max(0, len(before) - room)


class _Target(NamedTuple):
    """Prediction that is scored: offset of the node's token that makes it, predicted id, item and pair."""

    at: int
    token: int
    pair: tuple[int, int]

    def moved(self, by: int) -> _Target:
        return self._replace(at=self.at - by)


@dataclass
class _Node:
    """Tokens behind those of the parent, and which of them predict what.

    Attributes:
        positions: 2D position ids of an infilling model.
        prefix: length of its bidirectional part; 0 below the root.
    """

    tokens: list[int]
    targets: list[_Target]
    children: list[_Node] = field(default_factory=list)
    positions: list[tuple[int, int]] = field(default_factory=list)
    prefix: int = 0
    row: int = 0  # of the parent in its state


def _trees(item: int, pairs: Sequence[Pair], context: int) -> list[_Node]:
    """Tree of an item's sequences: their common prefix, and below it the rest of each. Several if there is none."""
    ids = [[*pair[0], *pair[1]][lost(pair, context) :] for pair in pairs]
    shared = min([_common(ids), *(len(one) - 1 for one in ids)]) if ids else 0
    trees: list[_Node] = []
    for k, (one, (_, after)) in enumerate(zip(ids, pairs, strict=True)):
        if not trees or not shared:
            trees.append(_Node(one[: shared or -1], []))
        root = trees[-1]
        targets = [_Target(at - 1, one[at], (item, k)) for at in range(len(one) - len(after), len(one))]
        root.targets += [target for target in targets if target.at < len(root.tokens)]
        rest = [target.moved(shared) for target in targets if target.at >= len(root.tokens)]
        root.children += [_Node(one[shared:-1], rest)] if rest else []
    return trees


def _infilling(item: int, pairs: Sequence[Pair], blanks: Blanks, context: int) -> list[_Node]:
    """Trees by context: it is bidirectional, and shared by the continuations of just this context."""
    roots: dict[tuple[int, ...], _Node] = {}
    for k, (before, after) in enumerate(pairs):
        key = tuple(before[lost((before, after), context, blanks) :])
        layout = blanks.continuation(key)
        root = roots.setdefault(key, _Node(layout.tokens, [], [], layout.positions, layout.prefix))
        root.targets.append(_Target(len(layout.tokens) - 1, after[0], (item, k)))
        if len(after) > 1:
            mask, within = layout.positions[-1]
            places = [(mask, within + step) for step in range(1, len(after))]
            targets = [_Target(at, token, (item, k)) for at, token in enumerate(after[1:])]
            root.children.append(_Node(list(after[:-1]), targets, [], places))
    return [*roots.values()]


def _shared(trees: Sequence[_Node]) -> list[_Node]:
    """Trees with a common prefix of `SHARED` tokens or more below a node that has it, level by level."""
    found: list[_Node] = []
    for run in _runs(sorted(trees, key=lambda tree: tree.tokens)):
        # every node keeps a token, and a position that predicts stays where it is
        ends = [min([len(tree.tokens) - 1, *(target.at for target in tree.targets)]) for tree in run]
        size = min(*ends, _common([run[0].tokens, run[-1].tokens]))
        if len(run) == 1 or size < SHARED:
            found += run
            continue
        root = _Node(run[0].tokens[:size], [])
        for tree in run:
            tree.tokens, tree.targets = tree.tokens[size:], [target.moved(size) for target in tree.targets]
        root.children = _shared(run)
        found.append(root)
    return found


def _runs(trees: Iterable[_Node]) -> list[list[_Node]]:
    """Runs of neighbors with `SHARED` common tokens."""
    runs: list[list[_Node]] = []
    for tree in trees:
        if runs and _common([runs[-1][-1].tokens, tree.tokens]) >= SHARED:
            runs[-1].append(tree)
        else:
            runs.append([tree])
    return runs


def _common(rows: Sequence[list[int]]) -> int:
    """Length of the common prefix."""
    low, high = min(rows), max(rows)  # in lexicographic order all others lie between them
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


class _Results:
    """Sums per pair, and the items of which all tokens have been scored."""

    def __init__(self, items: Sequence[Sequence[Pair]]) -> None:
        self.nats = [[0.0] * len(pairs) for pairs in items]
        self.is_greedy = [[True] * len(pairs) for pairs in items]
        self.missing = [sum(len(after) for _, after in pairs) for pairs in items]
        self.complete = [item for item, count in enumerate(self.missing) if count == 0]

    def add(self, pair: tuple[int, int], nats: float, is_greedy: bool) -> None:
        """Add a token."""
        item, k = pair
        if not math.isfinite(nats):
            raise InputError("the model's log-probabilities are NaN or infinite", found=nats)
        self.nats[item][k] += nats
        self.is_greedy[item][k] &= is_greedy
        self.missing[item] -= 1
        if not self.missing[item]:
            self.complete.append(item)

    def ready(self) -> Iterator[tuple[int, list[Likelihood]]]:
        """Complete items that were not given out before."""
        complete, self.complete = self.complete, []
        for item in complete:
            yield item, [*map(Likelihood, self.nats[item], self.is_greedy[item])]


class _Reader:
    """Reads a level of nodes in passes of about one length each, and the level below from the states it leaves."""

    def __init__(self, model: Decoder, results: _Results, tokens: int) -> None:
        is_gpu = model.device.type != "cpu"
        work = max(1, int(WORK[is_gpu] / (2 * model.config.num_params())))
        self.model, self.results, self.tokens = model, results, tokens or min(work, 16384 if is_gpu else 512)
        self.at_once = min(work, GROUP * self.tokens)

    def read(self, nodes: Sequence[_Node], above: State | None = None) -> Iterator[None]:
        """Read nodes behind their parents' tokens, and all nodes below; pauses where sums may have become complete.

        States of as many nodes as `at_once` allows are in memory per level, and what is below them is read before the
        next ones, so that items are complete long before the last node is read.
        """
        taken = max(above.lengths) if above is not None else 0
        for group in _batches(nodes, lambda n, w: self._fits(n, taken + w) and n * w <= self.at_once):
            with evaluating(self.model):  # not beyond a pause, where others may use the model
                state = self._level(group, above, taken)
            yield
            yield from self.read([child for node in group for child in node.children], state)
            del state  # before the next one is made

    def _fits(self, rows: int, slots: int) -> bool:
        return rows * slots <= SLOTS * self.tokens

    def _level(self, nodes: Sequence[_Node], above: State | None, taken: int) -> State | None:
        """Read nodes without those below them; their states, if there are any below."""
        longest, row = max(len(node.tokens) for node in nodes), 0
        whole = self.model.state(len(nodes), taken + longest) if any(node.children for node in nodes) else None
        padding = PADDING[self.model.device.type != "cpu"]
        for batch in _batches(nodes, lambda n, w: self._fits(n, taken + w) and n * w <= self.tokens, padding):
            state = self._pass(batch, above, keep=whole is not None)
            if whole is not None and state is not None:
                whole.replace(range(row, row + len(batch)), state)
            for node in batch:
                for child in node.children:
                    child.row = row
                row += 1
        return whole

    def _pass(self, nodes: Sequence[_Node], above: State | None, keep: bool) -> State | None:
        """Forward pass over nodes; the state that it leaves, if it is wanted or needed."""
        counts, device = torch.tensor([len(node.tokens) for node in nodes]), self.model.device
        ids = pad_sequence([torch.tensor(node.tokens) for node in nodes], batch_first=True).to(device)
        state = positions = prefix = None
        if above is not None:
            state = above.fork([node.row for node in nodes], ids.shape[1])
        elif keep:
            state = self.model.state(*ids.shape)
        if nodes[0].positions:
            places = [torch.tensor(node.positions) for node in nodes]
            positions = pad_sequence(places, batch_first=True).mT.to(device)
            prefix = torch.tensor([node.prefix for node in nodes]) if above is None else None
        mask = Mask(lengths=None if len({*counts.tolist()}) == 1 else counts, prefix=prefix)
        self._score(self.model.hidden(ids, positions=positions, mask=mask, state=state), nodes)
        return state

    def _score(self, hidden: Tensor, nodes: Sequence[_Node]) -> None:
        """Log-probabilities of the targets, of as many positions at once as their logits have room."""
        targets = sorted((row, target) for row, node in enumerate(nodes) for target in node.targets)
        places = {place: i for i, place in enumerate(dict.fromkeys((row, target.at) for row, target in targets))}
        if not places:
            return
        rows, offsets = torch.tensor([*places], device=hidden.device).T
        chosen, size = hidden[rows, offsets], max(1, LOGITS // self.model.config.vocab_size)
        index = torch.tensor([places[row, target.at] for row, target in targets], device=hidden.device)
        wanted = torch.tensor([target.token for _, target in targets], device=hidden.device)
        nats: list[float] = []
        greedy: list[bool] = []
        for start in range(0, len(chosen), size):
            logits = self.model.head(chosen[start : start + size]).float().log_softmax(-1)
            own = (index >= start) & (index < start + size)
            at, token = index[own] - start, wanted[own]
            found = logits[at, token]
            nats += found.tolist()
            greedy += (found == logits.amax(-1)[at]).tolist()
        for (_, target), value, is_greedy in zip(targets, nats, greedy, strict=True):
            self.results.add(target.pair, value, is_greedy)


def _batches(
    nodes: Sequence[_Node], fits: Callable[[int, int], bool], padding: float = math.inf
) -> Iterator[list[_Node]]:
    """Nodes by length, the longest first, as many at once as `fits` their number and the longest's length."""
    batch: list[_Node] = []
    padded = 0
    for node in sorted(nodes, key=lambda node: (len(node.tokens), node.tokens), reverse=True):
        missing = len(batch[0].tokens) - len(node.tokens) if batch else 0
        if batch and not (padded + missing <= padding and fits(len(batch) + 1, len(batch[0].tokens))):
            yield batch
            batch, padded, missing = [], 0, 0
        batch.append(node)
        padded += missing
    if batch:
        yield batch
