"""The decode loop: rows that enter and leave, and what keys and values are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from minillama.config import ModelConfig
from minillama.inference.engine import decode
from minillama.inference.request import GREEDY
from minillama.inference.sampling import Sampling
from minillama.model import Decoder

PROMPTS = [[5], [7, 3, 9, 1], [2, 2], [11, 4, 8], [6, 1, 0, 12, 3, 9], [1], [10, 9]]


def model(mixer: str = "attention", heads: int = 2, context: int = 24) -> Decoder:
    torch.manual_seed(0)
    changes = (
        {} if mixer == "attention" else {"mixer": "wkv", "position": "none", "norm": "layer", "mlp": "channel-mix"}
    )
    config = ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=heads, hidden_dim=96, vocab_size=13, max_seq_len=context, **changes
    )
    return Decoder(config)


def texts(
    model: Decoder, prompts: Sequence[Sequence[int]], ends: int | None, sampling: Sampling, **options: object
) -> list[list[int]]:
    """Tokens of each prompt; a row ends after the token `ends`."""
    out: list[list[int]] = [[] for _ in prompts]
    steps = decode(model, prompts, 12, sampling, **options)  # type: ignore[arg-type]
    ended: set[int] | None = None
    while True:
        try:
            step = steps.send(ended)
        except StopIteration:
            return out
        for row, token in step:
            out[row].append(token)
        ended = {row for row, token in step if token == ends}


@pytest.mark.parametrize("mixer", ["attention", "wkv"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("use_state", [True, False])
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.5, repetition_penalty=1.2, seed=3)], ids=["greedy", "sampled"]
)
def test_waiting_rows_say_what_they_say_alone(mixer: str, batch_size: int, use_state: bool, sampling: Sampling) -> None:
    decoder = model(mixer)
    alone = [texts(decoder, [p], 4, sampling, seeds=[sampling.seed + i])[0] for i, p in enumerate(PROMPTS)]
    assert len({len(text) for text in alone}) > 1 or sampling is GREEDY
    assert texts(decoder, PROMPTS, 4, sampling, batch_size=batch_size, use_state=use_state) == alone


def test_a_batch_is_kept_full() -> None:
    decoder = model()
    steps = decode(decoder, PROMPTS[:4], 4, GREEDY, batch_size=2)
    assert [row for row, _ in next(steps)] == [0, 1]
    assert [row for row, _ in steps.send({0})] == [2]  # reads its prompt while 1 is still going
    assert [row for row, _ in steps.send(set())] == [2, 1]
    assert [row for row, _ in steps.send({1})] == [3]
    assert [row for row, _ in steps.send({2})] == [3]  # 2 is ended while 3 enters
    assert [row for step in steps for row, _ in step] == [3, 3]


@pytest.mark.parametrize(("cache", "share"), [(torch.bfloat16, 0.5), (torch.int8, 0.25 + 1 / 16)])
def test_short_caches(cache: torch.dtype, share: float) -> None:
    decoder = model()
    tokens = torch.randint(0, 13, (2, 20), generator=torch.Generator().manual_seed(1))
    full, short = decoder.state(2), decoder.state(2, cache_dtype=cache)
    with torch.no_grad():
        for start, end in ((0, 9), (9, 10), (10, 20)):
            expected = decoder(tokens[:, start:end], state=full)
            found = decoder(tokens[:, start:end], state=short)
            assert (found - expected).norm() < 0.02 * expected.norm()
    sizes = [sum(tensor.nbytes for tensor in state.layers[0].tensors) for state in (short, full)]
    assert sizes[0] == share * sizes[1]


def test_short_caches_with_rows_that_come_and_go() -> None:
    decoder = model()
    alone = [texts(decoder, [p], 4, GREEDY, cache_dtype=torch.int8)[0] for p in PROMPTS]
    assert texts(decoder, PROMPTS, 4, GREEDY, cache_dtype=torch.int8, batch_size=3) == alone


@pytest.mark.parametrize("cache", [None, torch.int8])
@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (4, 2), (7, 9), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_window_drops_what_it_no_longer_sees(
    cache: torch.dtype | None, window: int, sinks: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts longer than the slots, rows that come and go; and the layers without a state, which keep nothing."""
    monkeypatch.setattr("minillama.config.cost.SPARE", 1)
    decoder = model(context=60)
    prompts = [*PROMPTS[:3], [(7 * i + i * i) % 13 for i in range(37)], [3] * 15]
    options = {"window": window, "sinks": sinks}
    slots = []
    make = decoder.state
    decoder.state = lambda *args: slots.append(made := make(*args)) or made  # type: ignore[method-assign,assignment,func-returns-value]
    found = texts(decoder, prompts, 4, GREEDY, batch_size=batch_size, cache_dtype=cache, **options)
    assert max(state.max_len for state in slots) == sinks + 2 * window
    assert any(any(state.dropped) for state in slots)
    if cache is None:
        assert found == texts(decoder, prompts, 4, GREEDY, use_state=False, **options)
    else:
        decoder.config = replace(decoder.config, position="none")  # what `cache_slots` asks: all are kept
        assert found == texts(decoder, prompts, 4, GREEDY, cache_dtype=cache, **options)


def test_there_is_no_way_back_to_tokens_that_were_dropped() -> None:
    decoder = model()
    state = decoder.state(1, 8)
    with torch.no_grad():
        decoder(torch.tensor([[1, 2, 3, 4, 5, 6, 7]]), state=state)
        snapshot = state.snapshot()
        state.make_room(1, 3, 1)
        assert (state.lengths, state.dropped) == ([7], [0])  # one more fits
        state.make_room(2, 3, 1)
        assert (state.lengths, state.dropped) == ([3], [4])
    with pytest.raises(ValueError, match="cannot be restored"):
        state.restore(snapshot)
    with pytest.raises(ValueError, match="no longer position ids"):
        state.truncate([2])


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match="30 tokens is longer than the model's context of 24"):
        next(decode(model(), [[1], [5] * 30], 4, window=21, sinks=4))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_one_query_does_not_repeat_the_keys(heads: int) -> None:
    decoder = model(heads=heads)
    tokens = torch.randint(0, 13, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder(tokens)
        fused, state = decoder.fuse(), decoder.state(3)
        steps = [fused(tokens[:, i : i + 1], state=state) for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_decodes_without_compiling() -> None:
    decoder = model()
    expected = texts(decoder, PROMPTS, None, GREEDY)

    def compiled(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("compiled code was called")

    for layer in decoder.blocks:
        layer._compiled_call_impl = compiled  # what nn.Module.compile sets
    assert texts(decoder, PROMPTS, None, GREEDY) == expected
    with pytest.raises(AssertionError, match="compiled code was called"):
        decoder(torch.tensor([[1, 2]]))
