"""The decode loop: rows that enter and leave, and what keys and values are kept in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from minillama.config import ModelConfig
from minillama.inference.engine import Engine
from minillama.inference.request import GREEDY, Request
from minillama.inference.sampling import Sampling
from minillama.model import Decoder

Decode = Callable[..., list[list[int]]]
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


@pytest.mark.parametrize("mixer", ["attention", "wkv"])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.5, repetition_penalty=1.2, seed=3)], ids=["greedy", "sampled"]
)
def test_waiting_rows_say_what_they_say_alone(
    mixer: str, batch_size: int, sampling: Sampling, decode: Decode, uncached: Decode
) -> None:
    decoder = model(mixer)
    seeds = [replace(sampling, seed=sampling.seed + i) for i in range(len(PROMPTS))]
    alone = [decode(decoder, [p], 12, own, [4])[0] for p, own in zip(PROMPTS, seeds, strict=True)]
    assert len({len(text) for text in alone}) > 1 or sampling is GREEDY
    assert decode(decoder, PROMPTS, 12, sampling, [4], max_rows=batch_size) == alone
    assert uncached(decoder, PROMPTS, 12, sampling, [4]) == alone


def test_a_batch_is_kept_full() -> None:
    engine = Engine(model(), 2, chunk=None)
    mine = [engine.submit(Request(prompt, 4))[0] for prompt in PROMPTS[:4]]

    def step(*ended: int) -> list[int]:
        for row in ended:
            engine.cancel(mine[row])
        return [mine.index(request) for request in engine.step()]

    assert step() == [0, 1]
    assert step(0) == [2]  # reads its prompt while 1 is still going
    assert step() == [2, 1]
    assert step(1) == [3]
    assert step(2) == [3]  # 2 is ended while 3 enters
    assert step() + step() == [3, 3] and not engine.is_busy


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


def test_short_caches_with_rows_that_come_and_go(decode: Decode) -> None:
    decoder = model()
    alone = [decode(decoder, [p], 12, stop_ids=[4], cache_dtype=torch.int8)[0] for p in PROMPTS]
    assert decode(decoder, PROMPTS, 12, stop_ids=[4], cache_dtype=torch.int8, max_rows=3) == alone


@pytest.mark.parametrize("cache", [None, torch.int8])
@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (4, 2), (7, 9), (1, 1)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_window_drops_what_it_no_longer_sees(
    cache: torch.dtype | None,
    window: int,
    sinks: int,
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
    decode: Decode,
    uncached: Decode,
) -> None:
    """Prompts longer than the slots, rows that come and go; and the layers without a state, which keep nothing."""
    monkeypatch.setattr("minillama.config.cost.SPARE", 1)
    decoder = model(context=60)
    prompts = [*PROMPTS[:3], [(7 * i + i * i) % 13 for i in range(37)], [3] * 15]
    options = {"window": window, "sinks": sinks}
    slots = []
    make = decoder.state
    decoder.state = lambda *args: slots.append(made := make(*args)) or made  # type: ignore[method-assign,assignment,func-returns-value]
    found = decode(decoder, prompts, 12, stop_ids=[4], max_rows=batch_size, cache_dtype=cache, **options)
    assert max(state.max_len for state in slots) == sinks + 2 * window
    assert any(any(state.dropped) for state in slots)
    if cache is None:
        assert found == uncached(decoder, prompts, 12, stop_ids=[4], **options)
    else:
        decoder.config = replace(decoder.config, position="none")  # what `cache_slots` asks: all are kept
        assert found == decode(decoder, prompts, 12, stop_ids=[4], cache_dtype=cache, **options)


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


def test_a_prompt_longer_than_the_context_is_refused(decode: Decode) -> None:
    with pytest.raises(ValueError, match="30 tokens is longer than the model's context of 24"):
        decode(model(), [[1], [5] * 30], 4, window=21, sinks=4)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_one_query_does_not_repeat_the_keys(heads: int) -> None:
    decoder = model(heads=heads)
    tokens = torch.randint(0, 13, (3, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = decoder(tokens)
        fused, state = decoder.fuse(), decoder.state(3)
        steps = [fused(tokens[:, i : i + 1], state=state) for i in range(12)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_decodes_without_compiling(decode: Decode) -> None:
    decoder = model()
    expected = decode(decoder, PROMPTS, 12)

    def compiled(*args: object, **kwargs: object) -> torch.Tensor:
        raise AssertionError("compiled code was called")

    for layer in decoder.blocks:
        layer._compiled_call_impl = compiled  # what nn.Module.compile sets
    assert decode(decoder, PROMPTS, 12) == expected
    with pytest.raises(AssertionError, match="compiled code was called"):
        decoder(torch.tensor([[1, 2]]))
