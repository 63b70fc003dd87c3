"""The engine: requests that come and leave at any time, each with its own settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minillama.config import ModelConfig
from minillama.inference.engine import Engine
from minillama.inference.request import GREEDY, Request
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer.blanks import Layout

HOT = Sampling(temperature=1.3, seed=3)


def model(mixer: str = "attention", context: int = 96, **changes: object) -> Decoder:
    torch.manual_seed(0)
    if mixer == "wkv":
        changes |= {"mixer": "wkv", "position": "none", "norm": "layer", "mlp": "channel-mix"}
    shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 29}
    decoder = Decoder(ModelConfig(**(shape | {"max_seq_len": context} | changes)))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2 if parameter.dim() > 1 else 1)
    return decoder.eval()


def requests() -> list[Request]:
    return [
        Request([5, 3], 9),
        Request([7, 3, 9, 1, 4], 14, HOT, seed=11, logprobs=True),
        Request([2], 3, Sampling(temperature=0.8, top_k=4), seed=2),
        Request([11, 4, 8] * 7, 12, replace(HOT, repetition_penalty=1.4), seed=5),
        Request([6, 1, 0, 12], 20, HOT, seed=6, stop_ids=frozenset({3, 8})),
        Request([1, 2, 3], 30, HOT, seed=9, stop=lambda tokens: len(tokens) > 3 and tokens[-1] > 14),
        Request([10, 9], 5, logprobs=True),
    ]


def finished(engine: Engine, wanted: list[Request]) -> list[list[int]]:
    while any(request.finish_reason is None for request in wanted):
        assert engine.is_busy
        engine.step()
    return [request.tokens for request in wanted]


def alone(decoder: Decoder, **options: int) -> list[list[int]]:
    found = []
    for request in requests():
        engine = Engine(decoder, **options)  # type: ignore[arg-type]
        found += finished(engine, engine.submit(request))
    return found


@pytest.mark.parametrize("mixer", ["attention", "wkv"])
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 3, 1, 5, 0, 2, 4]])
def test_a_request_says_what_it_says_alone(mixer: str, rows: int, order: list[int]) -> None:
    decoder, engine = (made := model(mixer)), Engine(made, rows, chunk=8)
    mine, expected = requests(), alone(decoder)
    for i in order[:3]:
        engine.submit(mine[i])
    for i in order[3:]:  # the others come while these run
        engine.step()
        engine.submit(mine[i])
    assert finished(engine, mine) == expected
    assert not engine.is_busy and engine.step() == []
    reasons = [request.finish_reason for request in mine]
    assert reasons[:3] == ["length"] * 3 and {*reasons[4:6]} & {"eos", "stop"}
    ended = [r for r in mine[4:6] if r.finish_reason in ("eos", "stop")]
    assert all(r.tokens[-1] in r.stop_ids or (r.stop is not None and r.stop(r.tokens)) for r in ended)
    assert all((r.finish_reason == "eos") == (r.tokens[-1] in r.stop_ids) for r in ended)


def test_log_probabilities_are_those_of_a_full_forward_pass() -> None:
    decoder, mine = model(), requests()
    engine = Engine(decoder, 3, chunk=4)
    for request in mine:
        engine.submit(request)
    finished(engine, mine)
    for request in mine:
        assert len(request.log_probabilities) == (len(request.tokens) if request.logprobs else 0)
        if request.logprobs:
            ids = torch.tensor([[*request.prompt, *request.tokens]])  # type: ignore[misc]
            with torch.no_grad():
                expected = decoder(ids).log_softmax(-1)[0, len(request.prompt) - 1 : -1]  # type: ignore[arg-type]
            chosen = expected.gather(-1, torch.tensor(request.tokens)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(request.log_probabilities), chosen, atol=1e-5, rtol=0)


def test_samples_of_a_prompt_read_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, read = model(), []
    plain = decoder.hidden
    monkeypatch.setattr(decoder, "hidden", lambda ids, **rest: read.append(ids.shape) or plain(ids, **rest))
    engine = Engine(decoder, 8)
    other = engine.submit(Request([4, 4], 12))
    engine.step()
    prompt = list(range(20))
    four = engine.submit(Request(prompt, 6, HOT, seed=40, logprobs=True), samples=4)
    found = finished(engine, four)
    assert [shape for shape in read if shape[1] > 2] == [(1, 20)]
    assert len({tuple(tokens) for tokens in found}) == 4
    for i, tokens in enumerate(found):
        single = Engine(model())
        assert finished(single, single.submit(Request(prompt, 6, HOT, seed=40 + i))) == [tokens]
    assert len(finished(engine, other)[0]) == 12


@pytest.mark.parametrize("mixer", ["attention", "wkv"])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_what_prompts_begin_with_is_read_once(mixer: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, read = model(mixer), []
    plain = decoder.hidden
    monkeypatch.setattr(decoder, "hidden", lambda ids, **rest: read.append(ids.shape) or plain(ids, **rest))
    head = [i * i % 29 for i in range(40)]
    prompts = [[*head, *tail] for tail in ([3], [5, 1, 2], [5, 1], [7] * 6, [3])]
    engine = Engine(decoder, rows, chunk=None)
    mine = [engine.submit(Request(prompt, 4 + i, HOT, seed=i))[0] for i, prompt in enumerate(prompts)]
    found = finished(engine, mine)
    assert [shape for shape in read if shape[1] > 6] == [(1, 40)]
    for i, prompt in enumerate(prompts):
        single = Engine(decoder, chunk=None)
        assert finished(single, single.submit(Request(prompt, 4 + i, HOT, seed=i))) == [found[i]]
    with torch.no_grad():  # nothing is kept for the next ones, before which weights and adapters may change
        decoder.output_weight.mul_(2.0)
        next(decoder.blocks[0].parameters()).mul_(1.5)
    again = [engine.submit(Request(prompt, 4, HOT, seed=i))[0] for i, prompt in enumerate(prompts)]
    fresh = Engine(decoder, rows, chunk=None)
    expected = finished(fresh, [fresh.submit(Request(prompt, 4, HOT, seed=i))[0] for i, prompt in enumerate(prompts)])
    assert finished(engine, again) == expected
    other = [engine.submit(Request([1, *prompt], 3))[0] for prompt in prompts]  # none begins as those did
    expected = [finished(e := Engine(decoder), e.submit(Request([1, *prompt], 3)))[0] for prompt in prompts]
    assert finished(engine, other) == expected


def test_a_long_prompt_holds_nobody_up_for_longer_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = model(context=3000)
    expected = finished(engine := Engine(decoder), engine.submit(Request([3] * 2000, 3)))
    engine = Engine(decoder, 4, chunk=100)
    running = engine.submit(Request([1, 2], 60))
    engine.step()
    widths: list[int] = []
    plain = decoder.hidden
    monkeypatch.setattr(decoder, "hidden", lambda t, **rest: widths.append(t.shape[1]) or plain(t, **rest))
    (long,) = engine.submit(Request([3] * 2000, 3))
    for step in range(19):
        assert engine.step() == running, step  # it gets a token in every one
    assert not long.tokens
    engine.step()
    assert len(long.tokens) == 1 and max(widths) == 100 and widths.count(100) == 20
    assert finished(engine, [long]) == expected
    assert len(finished(engine, running)[0]) == 60


@pytest.mark.parametrize("mixer", ["attention", "wkv"])
def test_prompts_of_unequal_length_enter_in_chunks(mixer: str) -> None:
    decoder = model(mixer)
    engine = Engine(decoder, 4, chunk=16)
    running = engine.submit(Request([1, 2], 40))
    engine.step()
    prompts = [[5, 3, 9, 1, 4], [(7 * i + 3) % 29 for i in range(40)], [8]]
    mine = [engine.submit(Request(prompt, 9))[0] for prompt in prompts]
    found = finished(engine, mine)
    assert found == [finished(e := Engine(decoder), e.submit(Request(prompt, 9)))[0] for prompt in prompts]
    other = Engine(decoder)
    assert finished(engine, running) == finished(other, other.submit(Request([1, 2], 40)))


def test_running_requests_are_not_starved_by_those_that_enter() -> None:
    engine = Engine(model(), 2)
    (long,) = engine.submit(Request([1, 2], 20))
    engine.step()
    for i in range(30):
        engine.submit(Request([i % 29], 1))
    for _ in range(30):
        engine.step()
    assert len(long.tokens) >= 15


def test_a_pass_that_fails_harms_nobody_else() -> None:
    decoder = model()
    engine = Engine(decoder, 4)

    def fails(tokens: object) -> bool:
        raise RuntimeError("the caller's")

    others = [engine.submit(Request([i + 1, 3], 10))[0] for i in range(2)]
    engine.step()
    (bad,) = engine.submit(Request([4, 4], 10, stop=fails))
    failed = 0
    while any(request.finish_reason is None for request in others):
        try:
            engine.step()
        except RuntimeError:
            failed += 1
            engine.cancel(bad)
    assert failed == 1
    expected = [finished(e := Engine(decoder), e.submit(Request([i + 1, 3], 10)))[0] for i in range(2)]
    assert [request.tokens for request in others] == expected
    assert not engine.is_busy and engine.running is None


def test_cancelled_requests_leave_from_everywhere() -> None:
    decoder = model()
    engine = Engine(decoder, 2, chunk=2)
    one, two, three, four = (engine.submit(Request([i + 1] * (9 if i == 2 else 2), 8))[0] for i in range(4))
    engine.step()
    engine.cancel(four)  # it waits
    engine.step()
    engine.cancel(one)  # it runs
    engine.step()
    assert engine.entering is not None
    engine.cancel(three)  # it is being read
    assert finished(engine, [two]) == [finished(e := Engine(decoder), e.submit(Request([2, 2], 8)))[0]]
    assert [r.finish_reason for r in (one, two, three, four)] == ["cancelled", "length", "cancelled", "cancelled"]
    assert len(one.tokens) == 2 and not three.tokens and not four.tokens and not engine.is_busy


def test_refresh_goes_on_with_other_weights() -> None:
    decoder = model()
    engine = Engine(decoder, 2)
    mine = [engine.submit(Request([5, i + 1], 12, HOT, seed=i))[0] for i in range(3)]
    for _ in range(4):
        engine.step()
    before = [list(request.tokens) for request in mine]
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.1)
    engine.refresh()
    finished(engine, mine)
    for request, old in zip(mine, before, strict=True):
        assert request.tokens[: len(old)] == old and len(request.tokens) == 12
        ids = torch.tensor([[*request.prompt, *request.tokens]])  # type: ignore[misc]
        with torch.no_grad():  # the last token is drawn from the new model's distribution
            logits = decoder(ids)[0, -2]
        assert logits.softmax(-1)[request.tokens[-1]] > 1e-4
    greedy = [engine.submit(Request([9, 2], 6))[0] for _ in range(2)]
    fresh = finished(e := Engine(decoder), e.submit(Request([9, 2], 6)))
    assert finished(engine, greedy) == fresh * 2


def test_what_no_request_can_be() -> None:
    engine = Engine(model(context=24))
    for prompt, said in (([], "without a token"), ([1] * 25, "longer than the model's context of 24")):
        with pytest.raises(ValueError, match=said):
            engine.submit(Request(prompt, 4))
    with pytest.raises(ValueError, match=r"ids of 0 to 28"):
        engine.submit(Request([1, 29], 4))
    with pytest.raises(ValueError, match="submitted before"):
        engine.submit(Request([1], 4, tokens=[3]))
    with pytest.raises(ValueError, match="1 or more"):
        Engine(engine.model, 0)
    (full,) = engine.submit(Request([1] * 22, 9))
    with pytest.raises(ValueError, match="do not share"):
        engine.submit(Request(Layout.of([1, 2]), 3))
    (none,) = engine.submit(Request([1], 0))
    assert none.finish_reason == "length" and not none.tokens
    assert len(finished(engine, [full])[0]) == 2 and full.finish_reason == "context"


def test_a_longer_request_than_there_is_room_for() -> None:
    decoder = model()
    engine = Engine(decoder, 2)
    short = engine.submit(Request([1, 2], 20))
    engine.step()
    (long,) = engine.submit(Request([3] * 30, 40))
    expected = [finished(e := Engine(decoder), e.submit(Request(p, n)))[0] for p, n in (([1, 2], 20), ([3] * 30, 40))]
    assert finished(engine, [*short, long]) == expected


def test_greedy_is_the_default() -> None:
    assert Request([1], 1).sampling == GREEDY
