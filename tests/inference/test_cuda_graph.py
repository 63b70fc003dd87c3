"""The recorded decode step against the layers: on a CPU torch's operations are recorded, and played where they lay."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillama.config import ModelConfig
from minillama.formats.open import open_model
from minillama.inference import cuda_graph, engine
from minillama.inference.cuda_graph import CudaRecorder, GraphStep, Play, unsupported
from minillama.inference.engine import Engine
from minillama.inference.load import load_model
from minillama.inference.request import Request
from minillama.inference.sampling import Sampling
from minillama.layers.mask import Mask
from minillama.model import Decoder

# 6 query heads on 2 key/value heads of another width than D / H
CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=83, max_seq_len=160
)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12]]
WINDOW = {"window": 20, "sinks": 2}  # of LLaMA's positions alone


def model(**changes: object) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(CONFIG, **changes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return decoder.fuse()


def said(decoder: Decoder, **options: Any) -> list[list[int]]:
    """What four prompts go on with, of which the third stops early."""
    engine = Engine(decoder, chunk=None, **{"max_rows": len(PROMPTS)} | options)
    mine = [Request(prompt, 80, Sampling(temperature=0.8), seed=3 + i) for i, prompt in enumerate(PROMPTS)]
    mine[2].stop = lambda tokens: len(tokens) == 40
    return [request.tokens for request in engine.run(mine)]


class Operations(TorchDispatchMode):
    """A log of what runs. What it gave is filled anew by `play`, which knows nothing else of the pass."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number was read back while recording")
        out = func(*args, **(kwargs or {}))
        theirs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x for x in made if x.untyped_storage().data_ptr() not in theirs]
        if fresh or func._schema.is_mutable:
            self.log.append((func, args, kwargs or {}, made if fresh else []))
        return out

    def play(self) -> None:
        for func, args, kwargs, made in self.log:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, new in zip(made, again, strict=False):
                old.copy_(new)


class Recorder:
    """What `CudaRecorder` does, with torch's operations in the place of kernels."""

    def __init__(self) -> None:
        self.made = self.played = 0

    def __call__(self, run: Play) -> Play:
        self.made += 1
        run()
        with Operations() as operations:
            result = run()

        def play() -> Tensor:
            self.played += 1
            operations.play()
            return result

        return play


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces and states so short that texts outgrow them."""
    monkeypatch.setattr(cuda_graph, "PAGE", 32)
    slots = engine.cache_slots
    monkeypatch.setattr(
        engine, "cache_slots", lambda config, n, window, sinks: 40 if window else slots(config, n, window, sinks)
    )


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        *itertools.product(
            [{}, {"position": "alibi"}, {"tie_embeddings": True, "bias": "qkv"}, {"logit_scale": 0.5}],
            [{}, {"max_rows": 2}, {"cache_dtype": torch.int8}, {"cache_dtype": torch.bfloat16}],
        ),
        ({}, WINDOW),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_layers(changes: dict[str, object], options: dict[str, object]) -> None:
    decoder, recorder = model(**changes), Recorder()
    expected = said(decoder, **options)
    decoder.step = GraphStep(decoder, pytest.fail, recorder)
    for _ in range(2):
        assert said(decoder, **options) == expected
    assert recorder.made >= 4 and recorder.played > 80  # beyond a piece, and most of the steps


def test_a_recording_serves_until_memory_rows_or_pattern_change() -> None:
    decoder, recorder = model(), Recorder()
    step = GraphStep(decoder, pytest.fail, recorder)
    twin, state = decoder.state(2), decoder.state(2)
    patience = cuda_graph.PATIENCE
    changes = {8: [1, 0], 16: [1]}  # elsewhere in memory with as many rows; fewer rows
    patterns = {24: Mask(window=9), 31: Mask(window=9, sinks=1)}
    fresh, mask, kept = 0, Mask(), None
    with torch.inference_mode():
        for at in range(40):
            if at in changes:
                for memory in (twin, state):
                    memory.select(changes[at])
            mask = patterns.get(at, mask)
            if at in changes or at in patterns or at == 32:  # or a piece is full
                fresh = at
            tokens = [[at], [at + 1]][: len(state.lengths)]
            found = step(tokens, state, mask)
            expected = decoder(torch.tensor(tokens), mask=mask, state=twin)[:, -1]
            assert (found is None) == (at < fresh + patience)
            if found is None:
                found = decoder(torch.tensor(tokens), mask=mask, state=state)[:, -1]
            elif at == patience:
                kept = found, found.clone()
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert state.lengths == twin.lengths
    assert recorder.made == 5
    assert kept is not None and torch.equal(*kept)  # later steps leave it as it was


def test_a_step_between_does_not_cost_the_recording() -> None:
    decoder, recorder = model(), Recorder()
    step = GraphStep(decoder, pytest.fail, recorder)
    state = decoder.state(1)
    with torch.inference_mode():
        for at in range(9):
            if step([[at]], state, Mask()) is None:
                decoder(torch.tensor([[at]]), state=state)
            if at > cuda_graph.PATIENCE:
                assert step([[at], [at]], decoder.state(2), Mask()) is None
    assert recorder.made == 1 and recorder.played == 9 - cuda_graph.PATIENCE


@pytest.mark.parametrize(
    "mask", [Mask(lengths=torch.tensor([1, 1])), Mask(prefix=torch.tensor([1, 1])), Mask(causal=False)]
)
def test_other_masks_and_more_tokens_are_left_to_the_layers(mask: Mask) -> None:
    decoder = model()
    step = GraphStep(decoder, record=Recorder())
    for tokens, seen in (([[1], [2]], mask), ([[1, 2], [2, 3]], Mask())):
        for _ in range(10):
            assert step(tokens, decoder.state(2), seen) is None


def test_when_recording_fails_the_layers_go_on() -> None:
    def fails(run: Play) -> Play:
        try:
            raise RuntimeError("a number was read back")
        finally:
            raise RuntimeError("capture has ended")

    decoder, lines = model(), list[str]()
    expected = said(decoder)
    decoder.step = GraphStep(decoder, lines.append, fails)
    assert said(decoder) == expected
    assert lines == ["the CUDA graph was not captured, decoding goes on without: a number was read back"]


def test_it_is_for_keys_and_values_on_a_gpu_and_stays_with_its_weights() -> None:
    decoder = Decoder(CONFIG)
    assert unsupported(decoder) == "the model is on cpu"
    assert unsupported(Decoder(ModelConfig.load("rwkv-tiny"))) == "a recurrent state has no fixed address"
    decoder.step = GraphStep(decoder, record=Recorder())
    assert copy.deepcopy(decoder).step is None
    assert decoder.fuse().step is None


def test_generate_takes_it_where_it_can(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Decoder(CONFIG).save_pretrained(tmp_path)
    monkeypatch.setattr(cuda_graph, "unsupported", lambda model: None)
    monkeypatch.setattr(cuda_graph, "CudaRecorder", lambda device: Recorder())
    opened = open_model(tmp_path)
    assert isinstance(load_model(opened, "auto", "cpu", compiles=True).step, GraphStep)
    assert load_model(opened, "auto", "cpu", compiles=False).step is None


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("changes", "options"),
    [({}, {}), ({}, {"max_rows": 2}), ({}, WINDOW), ({}, {"cache_dtype": torch.int8}), ({"position": "alibi"}, {})],
    ids=str,
)
def test_played_tokens_are_those_of_the_layers(changes: dict[str, object], options: dict[str, object]) -> None:
    decoder, played = model(**changes).cuda(), []
    recorder = CudaRecorder(decoder.device)

    def counting(run: Play) -> Play:
        play = recorder(run)

        def counted() -> Tensor:
            played.append(1)
            return play()

        return counted

    expected = said(decoder, **options)
    decoder.step = GraphStep(decoder, pytest.fail, counting)
    for _ in range(2):
        assert said(decoder, **options) == expected
    assert len(played) > 80
