"""One token a row on a GPU by one launch: the kernels of the layers are recorded once and played again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minillama.layers.cache import CacheRange, KVCache, LayerState, State
from minillama.layers.mask import Mask
from minillama.model import Decoder

PAGE = 256  # slots: attention reads whole pages of the memory, so that one recording serves as many tokens
PATIENCE = 4  # steps through the layers before one is recorded, which is taken to cost as much as about so many

Play = Callable[[], Tensor]


def unsupported(model: Decoder) -> str | None:
    """Why `GraphStep` does not take a model, or None: it takes keys and values on a CUDA device."""
    if model.config.mixer == "wkv":
        return "a recurrence has no memory of fixed place"
    return None if model.device.type == "cuda" else f"the model lies on {model.device}"


class CudaRecorder:
    """Makes a CUDA graph of the kernels that a function starts; playing it gives that function's tensor, filled anew.

    All are recorded on one stream, so that they share what libraries keep for a stream: drop the last one before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.beside = device, torch.cuda.Stream(device)

    def __call__(self, run: Play) -> Play:
        """Run it once, and record it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):  # a capture that fails would stay on it
                run()  # what kernels set up when they first run must not be recorded
                with torch.cuda.graph(graph, stream=self.beside):
                    result = run()
            torch.cuda.current_stream().wait_stream(self.beside)

        def play() -> Tensor:
            with torch.cuda.device(self.device):
                graph.replay()
            return result

        return play


@dataclass(frozen=True)
class _FixedRange(CacheRange):
    """One token a row, whose slot and place are read from tensors, (B, 1) each, when the kernels run."""

    slot: Tensor | None = None
    place: Tensor | None = None

    def slots(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.slot)

    def positions(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.place)


class _Pass:
    """A pass whose inputs, (3, B, 1) ids, slots and places, stay where they are, as the state's memory does.

    It takes the state's place in `Decoder.hidden`; attention sees the first `end` slots.
    """

    def __init__(self, model: Decoder, layers: Sequence[LayerState], inputs: Tensor, end: int, mask: Mask) -> None:
        self.model, self.layers, self.mask = model, layers, mask
        self.ids, slot, place = inputs
        self._span = _FixedRange(None, 1, end, slot=slot, place=place)

    def span(self, count: int) -> CacheRange:
        return self._span

    def advance(self, counts: Sequence[int]) -> None:
        """Nothing: `GraphStep` tells the state."""

    def run(self) -> Tensor:
        hidden = self.model.hidden(self.ids, mask=self.mask, state=cast(State, self))
        return self.model.head(hidden[:, -1])


@dataclass(frozen=True)
class _Recording:
    """What plays a pass, its inputs, and all that must be as it was then."""

    key: tuple[object, ...]
    inputs: Tensor
    play: Play


class GraphStep:
    """Reads a token a row and returns logits, for `Decoder.step`; the layers are what computes them.

    A recording is good for one place of the state in memory, as many rows, and up to 256 more tokens; then another is
    made. One launch takes the place of Python and of every layer's launches (CUDA Programming Guide, "CUDA Graphs").

    Args:
        model: that `unsupported` has nothing against. Make the step anew when its weights are replaced or moved.
        say: told when recording fails; the layers go on then.
        record: makes a pass one that is played; a `CudaRecorder` unless given.
    """

    def __init__(
        self,
        model: Decoder,
        say: Callable[[str], None] = lambda text: None,
        record: Callable[[Play], Play] | None = None,
    ) -> None:
        self.model, self.say, self.record = model, say, record or CudaRecorder(model.device)
        self.awaited: tuple[object, ...] = ()
        self.seen = 0
        self.recording: _Recording | None = None
        self.failed = False

    def __call__(self, tokens: Sequence[Sequence[int]], state: State, mask: Mask) -> Tensor | None:
        """Logits (B, V) behind the one token of each row; None while the layers are to read them."""
        windowed = Mask(window=mask.window, sinks=mask.sinks)
        if self.failed or mask != windowed or any(len(row) != 1 for row in tokens):
            return None
        end = min(math.ceil(state.span(1).end / PAGE) * PAGE, state.max_len)
        key = (len(tokens), end, mask.window, mask.sinks, *map(_places, state.layers))
        rows = zip(tokens, state.lengths, state.dropped, strict=True)
        inputs = torch.tensor([(ids[0], used, used + gone) for ids, used, gone in rows]).T[..., None]
        if self.recording is None or key != self.recording.key:
            self.seen = self.seen + 1 if key == self.awaited else 1
            self.awaited = key
            if self.seen <= PATIENCE:
                return None
            self.recording = None  # before there is another: they share a stream
            self.recording = self._recorded(key, inputs.to(self.model.device), state, end, mask)
            if self.recording is None:
                return None
        state.advance([1] * len(tokens))
        self.recording.inputs.copy_(inputs)
        return self.recording.play().clone()  # the next step fills it anew

    def _recorded(
        self, key: tuple[object, ...], inputs: Tensor, state: State, end: int, mask: Mask
    ) -> _Recording | None:
        made = _Pass(self.model, state.layers, inputs, end, mask)
        try:
            return _Recording(key, inputs, self.record(made.run))
        except RuntimeError as error:
            self.failed = True
            cause = error.__context__ or error  # ending a capture that failed is an error of its own
            self.say(f"the decode step was not recorded, decoding goes on without: {cause}")
            return None

    def __deepcopy__(self, memo: object) -> None:
        """None: it reads the weights of its model, and a copy of the model would go on with those."""


def _places(layer: LayerState) -> tuple[object, ...]:
    """Where a layer's memory lies and what it looks like: all of a recording that depends on the state."""
    return tuple((part.data_ptr(), part.shape, part.dtype) for part in cast(KVCache, layer).tensors())
