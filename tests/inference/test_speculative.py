"""Speculation changes the speed and nothing else: the same greedy tokens, the same distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from minillama.commands import cli
from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.inference.engine import Engine
from minillama.inference.generate import generate, stream
from minillama.inference.request import GREEDY, Request
from minillama.inference.sampling import Sampler, Sampling
from minillama.inference.speculative import Acceptance, PromptLookup, Speculation, accept
from minillama.model import Decoder
from minillama.tokenizer import byte_tokenizer

CONFIG = ModelConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=60, max_seq_len=64)
EIGHT = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=8, max_seq_len=16)
PROMPTS = [[1], [5, 6, 7, 8], [3, 4, 5] * 6, list(range(40))]
CHAINS = [
    Sampling(temperature=1.0),
    Sampling(temperature=1.3, top_k=5),
    Sampling(temperature=0.9, top_p=0.85, min_p=0.02),
    Sampling(temperature=1.0, repetition_penalty=1.4),
]


def sharp(config: ModelConfig, seed: int, factor: float = 12) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)  # no two tokens are nearly equally likely
    return decoder


def near(model: Decoder, noise: float) -> Decoder:
    """The model with noise on its weights: a draft that is often right."""
    other = Decoder(model.config)
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def model() -> Decoder:
    return sharp(CONFIG, 2)


@pytest.fixture(scope="module")
def drafts(model: Decoder) -> dict[str, Decoder | None]:
    narrow = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=60, max_seq_len=20)
    return {"lookup": None, "itself": model, "near": near(model, 0.05), "strange": sharp(narrow, 3)}


def plain(model: Decoder, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY, **options: Any) -> list[int]:
    return Engine(model, chunk=None, **options).run([Request(prompt, count, sampling)])[0].tokens


def speculate(
    model: Decoder,
    prompt: Sequence[int],
    count: int,
    sampling: Sampling = GREEDY,
    draft: Decoder | None = None,
    draft_tokens: int = 8,
    stats: Acceptance | None = None,
    **options: Any,
) -> list[int]:
    speculation = Speculation(draft, draft_tokens, stats or Acceptance())
    return plain(model, prompt, count, sampling, speculation=speculation, **options)


@pytest.mark.parametrize("name", ["lookup", "itself", "near", "strange"])
@pytest.mark.parametrize("sampling", [GREEDY, replace(GREEDY, repetition_penalty=1.3)])
def test_greedy_tokens_are_those_of_plain_decoding(
    model: Decoder, drafts: dict[str, Decoder | None], name: str, sampling: Sampling
) -> None:
    for prompt in PROMPTS:
        for count in (0, 2, 40):  # 40 fills the context of the longest; the strange draft's is full before
            expected = plain(model, prompt, count, sampling)
            for draft_tokens in (1, 5):
                stats = Acceptance()
                tokens = speculate(model, prompt, count, sampling, drafts[name], draft_tokens, stats)
                assert tokens == expected
                assert stats.tokens == len(tokens) == stats.accepted + stats.passes


def test_a_draft_that_is_the_model_is_always_accepted(model: Decoder) -> None:
    stats = Acceptance()
    speculate(model, [5, 6, 7], 25, draft=model, draft_tokens=4, stats=stats)
    assert (stats.rate, stats.passes) == (1.0, 5)
    assert str(stats) == "20 of 20 drafted tokens accepted (100%), 5.0 tokens per pass"
    assert str(Acceptance()) == "0 of 0 drafted tokens accepted (0%), 0.0 tokens per pass"


def test_other_layers_take_their_state_back() -> None:
    for change in ({"position": "alibi"}, {"parallel_block": True, "n_kv_heads": 1}, {"position": "rope-2d"}):
        model = sharp(replace(CONFIG, head_dim=8, **change), 4)
        assert speculate(model, [1, 2], 30, draft=near(model, 0.1)) == plain(model, [1, 2], 30)


def test_keys_and_values_of_one_byte_go_back_too(model: Decoder) -> None:
    expected = plain(model, PROMPTS[2], 30, cache_dtype=torch.int8)
    for draft in (None, near(model, 0.05)):
        assert speculate(model, PROMPTS[2], 30, draft=draft, cache_dtype=torch.int8) == expected


def test_a_repeating_text_is_looked_up() -> None:
    class Repeating(Decoder):
        def head(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.eye(60)[(self.last + 1) % 7]

        def hidden(self, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            self.last = tokens[0, -9:]
            return super().hidden(tokens, *args, **options)

    stats = Acceptance()
    tokens = speculate(Repeating(CONFIG), [0, 1, 2, 3, 4, 5, 6, 0], 28, stats=stats)
    assert tokens == [i % 7 for i in range(1, 29)]
    assert (stats.rate, stats.passes) == (1.0, 4)  # 9 + 9 + 9 + 1


def test_lookup_copies_what_followed() -> None:
    sampler = Sampler(GREEDY, [0], 10)

    def drafted(text: list[int], count: int) -> list[int]:
        tokens, q = PromptLookup(10).propose(text, count, sampler)
        assert q.shape == (len(tokens), 10) and q.argmax(-1).tolist() == tokens and bool((q.sum(-1) == 1).all())
        return tokens

    assert drafted([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3], 2) == [4, 5]  # three tokens before two, which are nearer
    assert drafted([2, 3, 4, 9, 2, 3, 5, 8, 2, 3], 3) == [5, 8, 2]  # the most recent of two
    assert drafted([7, 8, 7], 5) == [8, 7, 8, 7, 8]  # on into its own copy
    assert drafted([1, 1], 3) == [1, 1, 1]
    assert drafted([1, 2, 3], 3) == drafted([1], 3) == drafted([1, 1], 0) == []


def test_lookup_goes_on_with_the_text_as_one_that_starts_there() -> None:
    text = torch.randint(4, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    growing, sampler = PromptLookup(4), Sampler(GREEDY, [0], 4)
    for end in range(1, 200, 3):
        assert growing.propose(text[:end], 5, sampler)[0] == PromptLookup(4).propose(text[:end], 5, sampler)[0]


@pytest.mark.parametrize("name", ["lookup", "itself"])
def test_a_condition_ends_the_text_in_the_middle_of_a_draft(
    model: Decoder, drafts: dict[str, Decoder | None], name: str
) -> None:
    speculation = Speculation(drafts[name])
    engine = Engine(model, speculation=speculation)
    (request,) = engine.submit(Request(PROMPTS[2], 30, stop=lambda tokens: len(tokens) == 3))
    while engine.is_busy:
        assert engine.step() == [request]
    assert request.tokens == plain(model, PROMPTS[2], 3) and request.finish_reason == "stop"
    assert speculation.acceptance.tokens == 3


@pytest.mark.parametrize("name", ["lookup", "near", "strange"])
def test_requests_with_drafts_come_and_leave_like_others(
    model: Decoder, drafts: dict[str, Decoder | None], name: str
) -> None:
    hot = Sampling(temperature=1.2, seed=3)
    asked = [(PROMPTS[3], 20, GREEDY), ([1], 31, hot), (PROMPTS[2], 9, GREEDY), ([7, 8], 50, hot)]
    alone = [speculate(model, *each, drafts[name], 5) for each in asked]
    engine = Engine(model, 3, chunk=6, speculation=Speculation(drafts[name], 5))
    mine = [Request(prompt, count, sampling, logprobs=True) for prompt, count, sampling in asked]
    engine.submit(mine[0])
    engine.step()
    engine.submit(mine[1])
    (other,) = engine.submit(Request([2, 3], 40))
    engine.submit(mine[2])  # it waits
    mine[3:] = twice = engine.submit(mine[3], samples=2)
    for _ in range(4):
        engine.step()
    engine.cancel(other)
    engine.refresh()
    while engine.is_busy:
        assert engine.step()
    assert other.finish_reason == "cancelled" and len(other.tokens) < 40
    assert [request.tokens for request in mine[:4]] == alone and twice[0].tokens != twice[1].tokens
    for request in mine:
        ids = torch.tensor([[*request.ids, *request.tokens]])
        with torch.no_grad():
            expected = model(ids).log_softmax(-1)[0, len(request.ids) - 1 : -1]
        chosen = expected.gather(-1, torch.tensor(request.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(request.log_probabilities), chosen, atol=1e-4, rtol=0)


def bound(freedom: int) -> float:
    """Chi-square of so many degrees of freedom exceeds this with probability 1e-4."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """Of counts with their expected values; cells that expect fewer than five are put together."""
    assert counts[expected == 0].sum() == 0
    large = expected >= 5
    pairs = [*zip(counts[large].tolist(), expected[large].tolist(), strict=True)]
    if (expected[~large]).sum() > 1:
        pairs.append((counts[~large].sum().item(), expected[~large].sum().item()))
    return sum((n - e) ** 2 / e for n, e in pairs), len(pairs)


@pytest.mark.parametrize(("shape_p", "shape_q"), [(0, 1), (1, 0), (2, 2), (0, 2), (3, 0), (0, 3), (3, 4)])
def test_the_rule_turns_draws_of_q_into_draws_of_p(shape_p: int, shape_q: int) -> None:
    shapes = torch.tensor(
        [
            [0.3, 0.25, 0.2, 0.15, 0.1, 0.0],
            [0.05, 0.05, 0.3, 0.2, 0.1, 0.3],
            [0.5, 0.0, 0.0, 0.25, 0.25, 0.0],
            [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],  # a point mass: prompt lookup, or greedy
            [1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    p, q, generator = shapes[shape_p], shapes[shape_q], torch.Generator().manual_seed(1)
    drawn = torch.multinomial(q, 6000, replacement=True, generator=generator).tolist()
    results = [accept(token, p, q, generator) for token in drawn]
    statistic, cells = chi_square(torch.bincount(torch.tensor(results), minlength=6), p * len(drawn))
    assert cells == 1 or statistic < bound(cells - 1)
    kept = sum(a == b for a, b in zip(drawn, results, strict=True)) / 6000
    assert abs(kept - torch.minimum(p, q).sum().item()) < 0.03  # Leviathan et al. 2023, corollary 3.6


def test_the_rule_survives_rounding() -> None:
    p, generator = torch.tensor([0.5, 0.5]), torch.Generator().manual_seed(0)
    q = 1e6 * p  # p < q everywhere, by more than rounding gives: rejected, and nothing is left to draw from
    assert {accept(0, p, q, generator) for _ in range(50)} == {0, 1}


def probabilities(model: Decoder, prompt: list[int], count: int, sampling: Sampling) -> torch.Tensor:
    """Of every continuation of `count` tokens, (V ** count,), each token's conditional after the whole chain."""
    texts = [[*prompt, *more] for more in product(range(8), repeat=count)]
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(texts))
    total = torch.ones(len(texts))
    for i in range(count):
        place = len(prompt) + i
        for j, text in enumerate(texts):
            conditional = Sampler(sampling, text[:place], 8).probabilities(logits[j, place - 1])
            total[j] *= conditional[text[place]]
    return total


@pytest.mark.parametrize("kind", ["lookup", "model"])
@pytest.mark.parametrize("sampling", [replace(CHAINS[3], top_k=6), CHAINS[2]])
def test_the_first_tokens_have_the_distribution_of_plain_decoding(kind: str, sampling: Sampling) -> None:
    model, prompt, count, draws = sharp(EIGHT, 5, 15), [1, 2, 3, 1, 2], 3, 500
    draft = near(model, 0.5) if kind == "model" else None
    expected = probabilities(model, prompt, count, sampling)
    assert abs(expected.sum() - 1) < 1e-4
    stats, seen = Acceptance(), Counter[int]()
    for seed in range(draws):
        a, b, c = speculate(model, prompt, count, replace(sampling, seed=seed), draft, 2, stats)
        seen[(a * 8 + b) * 8 + c] += 1
    counts = torch.tensor([seen[i] for i in range(512)])
    statistic, cells = chi_square(counts, expected * draws)
    assert cells > 5 and statistic < bound(cells - 1)
    assert 50 < stats.accepted < stats.drafted - 50  # both sides of the rule were taken


class Bigram(Decoder):
    """A table: each token's distribution depends on the token before, so that one long text tests thousands."""

    def __init__(self, seed: int) -> None:
        super().__init__(ModelConfig(dim=8, n_layers=1, n_heads=1, hidden_dim=8, vocab_size=8, max_seq_len=10**4))
        self.table = 1.5 * torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))

    def hidden(self, tokens: torch.Tensor, positions: Any = None, mask: Any = None, state: Any = None) -> torch.Tensor:
        state.advance([tokens.shape[1]])
        return self.table[tokens]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.mark.parametrize("kind", ["lookup", "model"])
@pytest.mark.parametrize("sampling", CHAINS)
def test_a_long_text_has_the_distribution_of_plain_decoding(kind: str, sampling: Sampling) -> None:
    model, draft = Bigram(1), Bigram(2) if kind == "model" else None
    prompt, stats = [*range(8)], Acceptance()  # with every token seen, the repetition penalty stays the same
    text = prompt[-1:] + speculate(model, prompt, 2000, sampling, draft, 4, stats)
    pairs = torch.zeros(8, 8)
    for pair in pairwise(text):
        pairs[pair] += 1
    sampler = Sampler(sampling, prompt, 8)
    conditional = torch.stack([sampler.probabilities(logits) for logits in model.table])
    statistic, freedom = 0.0, 0
    for row, expected in zip(pairs, conditional, strict=True):
        part, cells = chi_square(row, expected * row.sum())
        statistic, freedom = statistic + part, freedom + max(cells - 1, 0)
    assert freedom >= 10 and statistic < bound(freedom)
    assert 50 < stats.accepted < stats.drafted - 50


def test_a_seed_decides_and_without_drafts_draws_are_those_of_plain_decoding(model: Decoder) -> None:
    chain = Sampling(temperature=1.0, seed=4)
    assert speculate(model, [1, 2, 3], 1, chain) == plain(model, [1, 2, 3], 1, chain)
    first, again, other = (speculate(model, [1], 20, replace(chain, seed=s), model) for s in (4, 4, 5))
    assert first == again != other


def test_what_cannot_speculate_is_refused(model: Decoder) -> None:
    smaller = Decoder(replace(CONFIG, vocab_size=59))
    with pytest.raises(InputError, match="another vocabulary") as error:
        speculate(model, [1], 5, draft=smaller)
    assert "59 tokens" in str(error.value) and "60, the model's" in str(error.value)
    with pytest.raises(InputError, match="no token"):
        speculate(model, [1], 5, draft_tokens=0)
    wkv = ModelConfig.load("rwkv-tiny")
    recurrent = Decoder(wkv.changed({"dim": 16, "n_layers": 1, "hidden_dim": 16, "vocab_size": 60}))
    for arguments in ((recurrent, None), (model, recurrent)):
        with pytest.raises(InputError, match="KV cache"):
            speculate(arguments[0], [1], 5, draft=arguments[1])
    glm = Decoder(replace(CONFIG, objective="glm", position="rope-2d"))
    for arguments in ((glm, None), (model, glm)):
        with pytest.raises(InputError, match="infilling"):
            speculate(arguments[0], [1], 5, draft=arguments[1])


def test_a_state_is_truncated(model: Decoder) -> None:
    state, tokens = model.state(1), torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        model.hidden(tokens, state=state)
        state.truncate([9])
        assert state.lengths == [5]
        state.truncate([2])
        again = model.hidden(tokens[:, 2:], state=state)
        torch.testing.assert_close(again, model.hidden(tokens)[:, 2:], atol=1e-4, rtol=1e-4)


BYTES = ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=64)


def test_text_stops_as_with_plain_decoding() -> None:
    model, tokenizer, prompts = sharp(BYTES, 1), byte_tokenizer(), ["ab ab ab", "x" * 50]
    for draft in (None, model):
        for prompt in prompts:
            whole = generate(model, tokenizer, [prompt], 30, GREEDY)[0]
            stops = [(), (whole.text[-2:],)]
            for stop in stops:
                speculation = Speculation(draft, 5)
                engine = Engine(model, speculation=speculation)
                expected = generate(model, tokenizer, [prompt], 30, GREEDY, stop)
                assert generate(model, tokenizer, [prompt], 30, GREEDY, stop, engine=engine) == expected
                again = Engine(model, speculation=Speculation(draft, 5))
                pieces = list(stream(model, tokenizer, prompt, 30, GREEDY, stop, engine=again))
                assert "".join(piece.text for piece in pieces) == expected[0].text
                assert pieces[-1].reason == expected[0].reason
                assert speculation.acceptance.tokens == len(expected[0].tokens)
        engine = Engine(model, speculation=Speculation(draft))
        whole = generate(model, tokenizer, prompts, 30, GREEDY)
        assert generate(model, tokenizer, prompts, 30, GREEDY, engine=engine) == whole


def test_the_command_says_what_was_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharp(BYTES, 1).save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    path = str(tmp_path)
    command = ["generate", "--model", path, "--temperature", "0", "--max-new-tokens", "20", "--ignore-eos"]
    assert cli.main([*command, "--prompt", "ab ab"]) == 0
    expected = capsys.readouterr().out
    for options in (["--speculate"], ["--draft", path], ["--draft", path, "--draft-tokens", "4"]):
        assert cli.main([*command, "--prompt", "ab ab", *options]) == 0
        out, err = capsys.readouterr()
        assert out == expected and err.startswith("speculation: ") and err.count("\n") == 1
    assert err == "speculation: 16 of 16 drafted tokens accepted (100%), 5.0 tokens per pass\n"
    sharp(BYTES, 1).save_pretrained(tmp_path / "draft")  # a draft needs no tokenizer
    assert cli.main([*command, "--prompt", "ab ab", "--draft", str(tmp_path / "draft")]) == 0
    assert capsys.readouterr().out == expected
    assert cli.main([*command, "--prompt", "ab ab", "--speculate", "--draft", path]) == 1
    assert "give either --speculate or --draft" in capsys.readouterr().err
    assert cli.main([*command, "--prompt", "a", "b"]) == 0
    several = capsys.readouterr().out
    assert cli.main([*command, "--prompt", "a", "b", "--speculate"]) == 0
    assert capsys.readouterr().out == several
    assert cli.main([*command, "--prompt", "a", "--speculate", "--window", "3"]) == 1
    assert "speculative decoding attends to the whole sequence" in capsys.readouterr().err
