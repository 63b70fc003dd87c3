"""CUDA graph of a decode step of one token per sequence: captured once, replayed by one launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minillama.layers.cache import CacheRange, LayerState, State
from minillama.layers.mask import Mask
from minillama.model import Decoder

PAGE = 256  # slots: attention reads whole pages of the KV cache, so that one graph serves as many tokens
PATIENCE = 4  # eager steps before a capture, which is taken to cost as much as about so many

Play = Callable[[], Tensor]


def unsupported(model: Decoder) -> str | None:
    """Why `GraphStep` does not support a model, or None: it needs a KV cache on a CUDA device."""
    if model.config.mixer == "wkv":
        return "a recurrence has no memory of fixed place"
    return None if model.device.type == "cuda" else f"the model lies on {model.device}"


class CudaRecorder:
    """CUDA graph capture of the kernels of a function; its replay returns that function's tensor, overwritten.

    All are captured on one stream, so that they share what libraries keep per stream: free the last one before.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.beside = device, torch.cuda.Stream(device)

    def __call__(self, run: Play) -> Play:
        """Warm up, then capture."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            self.beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.beside):  # a failed capture would stay on it
                run()  # first-run setup of kernels must not be captured
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
    """Slot range of one token per sequence; slot and position, (B, 1) each, are read when the kernels run."""

    slot: Tensor | None = None
    place: Tensor | None = None

    def slots(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.slot)

    def positions(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.place)


class _Pass:
    """Forward pass with static inputs, (3, B, 1) ids, slots and positions, and static state memory.

    It takes the state's place in `Decoder.hidden`; attention covers the first `end` slots.
    """

    def __init__(self, model: Decoder, layers: Sequence[LayerState], inputs: Tensor, end: int, mask: Mask) -> None:
        self.model, self.layers, self.mask = model, layers, mask
        self.ids, slot, place = inputs
        self._span = _FixedRange(None, 1, end, slot=slot, place=place)

    def span(self, count: int) -> CacheRange:
        return self._span

    def advance(self, counts: Sequence[int]) -> None:
        """No-op: `GraphStep` advances the state."""

    def run(self) -> Tensor:
        hidden = self.model.hidden(self.ids, mask=self.mask, state=cast(State, self))
        return self.model.head(hidden[:, -1])


@dataclass(frozen=True)
class _Recording:
    """Captured graph: its key, static inputs and replay."""

    key: tuple[object, ...]
    inputs: Tensor
    play: Play


class GraphStep:
    """CUDA graph step, for `Decoder.step`: one token per sequence -> logits, captured from the layers.

    A graph is valid for one address of the state in memory, one batch size, and up to 256 more tokens; then another is
    captured. One launch replaces Python and every layer's launches (CUDA Programming Guide, "CUDA Graphs").

    Args:
        model: one for which `unsupported` is None. Rebuild the step when its weights are replaced or moved.
        say: told when capture fails; the layers go on then.
        record: captures a pass and returns its replay; a `CudaRecorder` unless given.
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
        """Logits (B, V) after one token per sequence; None while the layers are to read them."""
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
            self.recording = None  # before the next capture: they share a stream
            self.recording = self._recorded(key, inputs.to(self.model.device), state, end, mask)
            if self.recording is None:
                return None
        state.advance([1] * len(tokens))
        self.recording.inputs.copy_(inputs)
        return self.recording.play().clone()  # the next replay overwrites it

    def _recorded(
        self, key: tuple[object, ...], inputs: Tensor, state: State, end: int, mask: Mask
    ) -> _Recording | None:
        made = _Pass(self.model, state.layers, inputs, end, mask)
        try:
            return _Recording(key, inputs, self.record(made.run))
        except RuntimeError as error:
            self.failed = True
            cause = error.__context__ or error  # ending a failed capture is an error of its own
            self.say(f"the decode step was not recorded, decoding goes on without: {cause}")
            return None

    def __deepcopy__(self, memo: object) -> None:
        """None: it reads its model's weights, and a copy of the model would go on with those."""


def _places(layer: LayerState) -> tuple[object, ...]:
    """Addresses, shapes and dtypes of a layer's KV cache: all of a graph that depends on the state."""
    return tuple((part.data_ptr(), part.shape, part.dtype) for part in layer.tensors)
