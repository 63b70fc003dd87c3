"""One token a row on a GPU by one launch: the kernels of the layers are recorded once and played again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.state import KVCache, LayerState, Span, State

__all__ = ["GraphStep", "record", "unsupported"]

PIECE = 256  # slots: attention reads whole pieces of the memory, so that one recording serves as many tokens
PATIENCE = 4  # steps through the layers before one is recorded, which takes as long as about so many

Play = Callable[[], Tensor]


def unsupported(model: Decoder) -> str | None:
    """Why `GraphStep` does not take a model, or None: it takes keys and values on a CUDA device."""
    if model.device.type != "cuda":
        return f"the model lies on {model.device}"
    return "a recurrence has no memory of fixed place" if model.config.mixer == "wkv" else None


def record(run: Play) -> Play:
    """A CUDA graph of the kernels that `run` starts; playing it gives the tensor that `run` gave, filled anew."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()  # what kernels set up when they first run must not be recorded
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def play() -> Tensor:
        graph.replay()
        return result

    return play


@dataclass(frozen=True)
class _FixedSpan(Span):
    """One token a row, whose slot and place are read from tensors, (B, 1) each, when the kernels run."""

    slot: Tensor | None = None
    place: Tensor | None = None

    def slots(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.slot)

    def positions(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.place)


class _Recording:
    """A pass over some rows of a state, in memory that stays where it is, and attention over its first `end` slots."""

    def __init__(self, model: Decoder, layers: Sequence[LayerState], rows: int, end: int, mask: Mask) -> None:
        self.model, self.layers, self.mask = model, layers, mask
        with torch.inference_mode(False):  # else nothing outside of that mode could write to it
            self.inputs = torch.zeros(3, rows, 1, dtype=torch.long, device=model.device)
        ids, slot, place = self.inputs
        self.ids, self._span = ids, _FixedSpan(None, 1, end, slot=slot, place=place)

    def span(self, count: int) -> Span:
        """Of `State`, whose place it takes in the pass."""
        return self._span

    def advance(self, counts: Sequence[int]) -> None:
        """Nothing: `GraphStep` tells the state."""

    def run(self) -> Tensor:
        hidden = self.model.hidden(self.ids, mask=self.mask, state=cast(State, self))
        return self.model.head(hidden[:, -1])


class GraphStep:
    """Reads a token a row and returns logits, for `Decoder.step`; the layers are what computes them.

    A recording is good for one place of the state in memory, as many rows, and up to 256 more tokens; then another is
    made. A launch takes some microseconds where Python and the launches of each layer take milliseconds (CUDA
    Programming Guide, "CUDA Graphs").

    Args:
        model: that `unsupported` has nothing against.
        say: told when recording fails; the layers go on then.
        record: makes a pass one that is played.
    """

    def __init__(
        self, model: Decoder, say: Callable[[str], None] = lambda text: None, record: Callable[[Play], Play] = record
    ) -> None:
        self.model, self.say, self.record = model, say, record
        self.key: tuple[object, ...] = ()
        self.seen = 0
        self.recording: tuple[Tensor, Play] | None = None  # its inputs, and what plays it
        self.failed = False

    def __call__(self, tokens: Sequence[Sequence[int]], state: State, mask: Mask) -> Tensor | None:
        """Logits (B, V) behind the one token of each row; None while the layers are to read them."""
        windowed = Mask(window=mask.window, sinks=mask.sinks)
        if self.failed or mask != windowed or any(len(row) != 1 for row in tokens):
            return None
        end = min(math.ceil(state.span(1).end / PIECE) * PIECE, state.max_len)
        key = (len(tokens), end, mask.window, mask.sinks, *map(_places, state.layers))
        if key != self.key:
            self.key, self.seen, self.recording = key, 0, None
        self.seen += 1
        if self.seen <= PATIENCE:
            return None
        inputs = [
            (ids[0], used, used + gone) for ids, used, gone in zip(tokens, state.lengths, state.dropped, strict=True)
        ]
        logits = self._play(torch.tensor(inputs).T[..., None], state, end, mask)
        if logits is not None:
            state.advance([1] * len(tokens))
        return logits

    def _play(self, inputs: Tensor, state: State, end: int, mask: Mask) -> Tensor | None:
        if self.recording is None:
            made = _Recording(self.model, state.layers, inputs.shape[1], end, mask)
            made.inputs.copy_(inputs)  # recording runs the pass
            try:
                self.recording = made.inputs, self.record(made.run)
            except RuntimeError as error:
                self.failed = True
                self.say(f"the decode step was not recorded, decoding goes on without: {error}")
                return None
        memory, play = self.recording
        memory.copy_(inputs)
        return play().clone()  # the next step fills it anew

    def __deepcopy__(self, memo: object) -> None:
        """None: it reads the weights of its model, and a copy of the model would go on with those."""


def _places(layer: LayerState) -> tuple[object, ...]:
    """Where a layer's memory lies and what it looks like: all of a recording that depends on the state."""
    return tuple((part.data_ptr(), part.shape, part.dtype) for part in cast(KVCache, layer).stored())
