"""The recorded decode step against the layers: on a CPU the pass that is recorded runs instead of being played."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from minillama import graph_step
from minillama.config import ModelConfig
from minillama.decoding import decode
from minillama.graph_step import GraphStep, Play, record, unsupported
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.sampling import Sampling

# 6 query heads on 2 key/value heads of another width than D / H
CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=83, max_seq_len=96
)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [11, 12]]


def model(**changes: object) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(CONFIG, **changes)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return decoder.fuse()


def said(decoder: Decoder, **options: object) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in PROMPTS]
    for step in decode(decoder, PROMPTS, 60, Sampling(temperature=0.8, seed=3), **options):  # type: ignore[arg-type]
        for row, token in step:
            rows[row].append(token)
    return rows


class Recorder:
    """Counts what it is to record, and plays it by running it."""

    def __init__(self) -> None:
        self.made = self.played = 0

    def __call__(self, run: Play) -> Play:
        self.made += 1

        def play() -> torch.Tensor:
            self.played += 1
            return run()

        return play


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "PIECE", 32)


WINDOW = {"window": 20, "sinks": 2}  # of LLaMA's positions alone


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        *itertools.product(
            [{}, {"position": "alibi"}, {"tie_embeddings": True, "bias": "qkv"}, {"logit_scale": 0.5}],
            [{}, {"batch_size": 2}, {"cache_dtype": torch.int8}, {"cache_dtype": torch.bfloat16}],
        ),
        ({}, WINDOW),
    ],
    ids=str,
)
def test_tokens_are_those_of_the_layers(changes: dict[str, object], options: dict[str, object]) -> None:
    decoder, recorder = model(**changes), Recorder()
    expected = said(decoder, **options)
    decoder.step = GraphStep(decoder, record=recorder)
    assert said(decoder, **options) == expected
    assert recorder.made >= 2 and recorder.played > 30  # beyond a piece, and most of the steps


def test_a_recording_serves_until_the_memory_or_the_rows_change() -> None:
    decoder, recorder = model(), Recorder()
    step = GraphStep(decoder, record=recorder)
    twin, state = decoder.state(2), decoder.state(2)
    with torch.inference_mode():
        for at in range(20):
            if at == 12:
                for memory in (twin, state):
                    memory.select([1])
            tokens = [[at], [at + 1]][: len(state.lengths)]
            found = step(tokens, state, Mask())
            expected = decoder(torch.tensor(tokens), state=twin)[:, -1]
            waits = at < graph_step.PATIENCE or 12 <= at < 12 + graph_step.PATIENCE
            assert (found is None) == waits
            if found is None:
                found = decoder(torch.tensor(tokens), state=state)[:, -1]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert state.lengths == twin.lengths
    assert recorder.made == 2


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
        raise RuntimeError("capture is not permitted")

    decoder, lines = model(), list[str]()
    expected = said(decoder)
    decoder.step = GraphStep(decoder, lines.append, fails)
    assert said(decoder) == expected
    assert lines == ["the decode step was not recorded, decoding goes on without: capture is not permitted"]


def test_it_is_for_keys_and_values_on_a_gpu_and_stays_with_its_model() -> None:
    decoder = model()
    assert unsupported(decoder) == "the model lies on cpu"
    decoder.step = GraphStep(decoder)
    assert copy.deepcopy(decoder).step is None


@pytest.mark.cuda
@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, WINDOW], ids=str)
def test_played_tokens_are_those_of_the_layers(options: dict[str, object]) -> None:
    decoder, made = model().cuda(), []

    def counting(run: Play) -> Play:
        made.append(run)
        return record(run)

    expected: Sequence[Sequence[int]] = said(decoder, **options)
    decoder.step = GraphStep(decoder, record=counting)
    assert said(decoder, **options) == expected and made
