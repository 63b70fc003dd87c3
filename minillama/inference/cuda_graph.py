"""CUDA graph of a decode step of one token per sequence: captured once, replayed by one launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from minillama.layers.cache import CacheRange, State
from minillama.layers.hooks import has_hooks
from minillama.layers.mask import Mask
from minillama.model import Decoder

PAGE = 256  # slots: attention reads whole pages of the KV cache, so that one graph serves as many tokens
PATIENCE = 4  # eager steps before a capture, which is taken to cost as much as about so many

Play = Callable[[], Tensor]


def unsupported(model: Decoder) -> str | None:
    """Reason why `GraphStep` does not support a model, or None; it needs a KV cache on a CUDA device."""
    if model.config.mixer == "wkv":
        return "a recurrent state has no fixed address"
    return None if model.device.type == "cuda" else f"the model is on {model.device}"


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
class _StaticRange(CacheRange):
    """Slot range of one token per sequence; slot and position, (B, 1) each, are read when the kernels run."""

    slot: Tensor | None = None
    position: Tensor | None = None

    def slots(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.slot)

    def positions(self, device: torch.device) -> Tensor:
        return cast(Tensor, self.position)


class _StaticState:
    """State for `Decoder.hidden` over the same memory, with static inputs; attention covers the first `end` slots."""

    def __init__(self, state: State, slot: Tensor, position: Tensor, end: int) -> None:
        self.layers = state.layers
        self._range = _StaticRange(None, 1, end, length=state.length, slot=slot, position=position)

    def span(self, count: int) -> CacheRange:
        return self._range

    def advance(self, counts: Sequence[int]) -> None:
        """No-op: `GraphStep` advances the state."""


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
        self.key: tuple[object, ...] = ()  # all that the captured graph depends on
        self.awaited: tuple[object, ...] = ()  # the same of the last eager steps, `seen` of them
        self.seen = 0
        self.inputs = torch.empty(0)  # (3, B, 1) ids, slots and positions
        self.play: Play | None = None
        self.failed = False
        self.modules: list[tuple[int, int]] = []

    def __call__(self, tokens: Sequence[Sequence[int]], state: State, mask: Mask) -> Tensor | None:
        """Logits (B, V) after one token per sequence; None while the layers are to read them."""
        windowed = Mask(window=mask.window, sinks=mask.sinks)
        if self.failed or mask != windowed or any(len(row) != 1 for row in tokens):
            return None
        end = min(math.ceil(state.span(1).end / PAGE) * PAGE, state.max_len)
        memory = [(part.data_ptr(), part.shape, part.dtype) for layer in state.layers for part in layer.tensors]
        key = (len(tokens), end, mask.window, mask.sinks, *memory)
        rows = zip(tokens, state.lengths, state.dropped, strict=True)
        inputs = torch.tensor([(ids[0], used, used + gone) for ids, used, gone in rows]).T[..., None]
        if key != self.key:
            self.awaited, self.seen = key, self.seen + 1 if key == self.awaited else 1
            if self.seen <= PATIENCE:
                return None
            self.key, self.play = key, None  # freed before the next capture: they share a stream
            self._capture(inputs.to(self.model.device), state, end, mask)
        if self.play is None:
            return None
        state.advance([1] * len(tokens))
        self.inputs.copy_(inputs)
        return self.play().clone()  # the next replay overwrites it

    def unsupported(self) -> str | None:
        """Reason why the layers are to decode now, or None; layers and kernels replaced by hand are captured anew."""
        modules = [(id(part), id(getattr(part, "kernel", None))) for part in self.model.modules()]
        self.key, self.modules = self.key if modules == self.modules else (), modules
        return next((f"{name} has hooks" for name, part in self.model.named_modules() if has_hooks(part)), None)

    def _capture(self, inputs: Tensor, state: State, end: int, mask: Mask) -> None:
        self.inputs = inputs
        ids, slot, position = inputs
        static = cast(State, _StaticState(state, slot, position, end))
        try:
            self.play = self.record(lambda: self.model.head(self.model.hidden(ids, mask=mask, state=static)[:, -1]))
        except RuntimeError as error:
            self.failed = True
            cause = error.__context__ or error  # ending a failed capture is an error of its own
            self.say(f"the CUDA graph was not captured, decoding goes on without: {cause}")

    def __deepcopy__(self, memo: object) -> None:
        """None: it reads its model's weights, and a copy of the model would go on with those."""
