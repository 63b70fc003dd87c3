"""Continuations against whole forward passes, whatever is shared, batched, truncated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
import torch

from minillama import Decoder, ModelConfig
from minillama.errors import InputError
from minillama.evaluate import likelihood
from minillama.evaluate.likelihood import Likelihood, Pair, log_likelihoods, score
from minillama.layers.mask import Mask
from minillama.tokenizer.blanks import Blanks, Layout

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=50, max_seq_len=16)
BLANKS = Blanks(token=45, sentence=46, document=47, start=48, end=49)


def model(config: ModelConfig = CONFIG) -> Decoder:
    torch.manual_seed(5)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return decoder.eval()


def items(rng: Random) -> list[list[Pair]]:
    """Choices of one context, contexts of one prompt, contexts that differ, one-token answers, too long ones."""

    def ids(count: int) -> list[int]:
        return [rng.randrange(45) for _ in range(count)]

    prompt, stem = ids(14), ids(6)
    found: list[list[Pair]] = []
    for i in range(9):
        context = prompt + ids(1 + i % 4) if i < 5 else ids(1 + i)
        found.append([(context, ids(rng.randint(1, 6))) for _ in range(3)])
    tail = ids(3)
    found.append([([*stem, 1], tail), ([*stem, 2], tail)])  # what differs lies in the contexts
    found.append([([3], tail), ([4], tail)])
    found.append([(prompt, [answer]) for answer in (1, 2, 3)])
    found.append([(ids(60), ids(5)), (ids(40), ids(30))])
    return found


def whole(decoder: Decoder, pair: Pair) -> Likelihood:
    """One forward pass over the last tokens that the model takes, and the sum by hand."""
    ids = [*pair[0], *pair[1]][-(decoder.config.max_seq_len + 1) :]
    with torch.inference_mode():
        logits = decoder(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    rows = range(len(ids) - len(pair[1]) - 1, len(ids) - 1)
    nats = sum(logits[row, ids[row + 1]].item() for row in rows)
    return Likelihood(nats, all(int(logits[row].argmax()) == ids[row + 1] for row in rows))


def same(found: dict[int, list[Likelihood]], expected: list[list[Likelihood]]) -> None:
    assert sorted(found) == [*range(len(expected))]
    for i, row in enumerate(expected):
        assert [one.nats for one in found[i]] == pytest.approx([one.nats for one in row], abs=1e-4)
        assert [one.is_greedy for one in found[i]] == [one.is_greedy for one in row]


@pytest.mark.parametrize("name", ["llama-tiny", "rwkv-tiny", "bloom-tiny", "palm-tiny", "chatglm2-tiny"])
def test_sums_are_those_of_whole_passes(name: str) -> None:
    """For every relative, and for batches of one, of a few and of all."""
    decoder = model(replace(ModelConfig.load(name), vocab_size=50, max_seq_len=40, n_layers=2))
    asked = items(Random(3))
    expected = [[whole(decoder, pair) for pair in row] for row in asked]
    for tokens in (1, 40, 0):
        same(dict(score(decoder, asked, tokens=tokens)), expected)
    order = Random(1).sample(range(len(asked)), len(asked))
    found = dict(score(decoder, [asked[i] for i in order]))
    same({old: found[new] for new, old in enumerate(order)}, expected)


@pytest.mark.parametrize("name", ["glm-tiny", "chatglm-tiny"])
def test_an_infilling_model_reads_contexts_in_both_directions(name: str) -> None:
    decoder = model(replace(ModelConfig.load(name), vocab_size=50, max_seq_len=40, n_layers=2))
    asked = items(Random(3))[:-1]
    expected = []
    for row in asked:
        sums = []
        for context, continuation in row:
            layout = Layout.of([*context, 47]).fill(len(context), [48, *continuation[:-1]])
            positions, mask = torch.tensor([layout.positions]).mT, Mask(prefix=torch.tensor([layout.prefix]))
            with torch.inference_mode():
                logits = decoder(torch.tensor([layout.tokens]), positions=positions, mask=mask)[
                    0, layout.prefix :
                ].log_softmax(-1)
            wanted = torch.tensor(continuation)
            nats = logits.gather(-1, wanted[:, None]).sum().item()
            sums.append(Likelihood(nats, bool((logits.argmax(-1) == wanted).all())))
        expected.append(sums)
    same(dict(score(decoder, asked, BLANKS)), expected)
    same(dict(score(decoder, asked, BLANKS, tokens=7)), expected)


def test_greedy_continuations_are_known() -> None:
    decoder, context = model(), [1, 2, 3, 4, 5]
    with torch.inference_mode():
        greedy = list(context)
        for _ in range(3):
            greedy.append(int(decoder(torch.tensor([greedy]))[0, -1].argmax()))
    found = log_likelihoods(decoder, context, [greedy[5:], greedy[5:7], [*greedy[5:7], (greedy[7] + 1) % 50], [9]])
    assert [one.is_greedy for one in found] == [True, True, False, greedy[5] == 9]
    assert log_likelihoods(decoder, context, []) == []


def count_passes(decoder: Decoder) -> list[tuple[int, int]]:
    """Shapes of the forward passes from now on."""
    shapes: list[tuple[int, int]] = []
    hidden: Callable[..., torch.Tensor] = decoder.hidden

    def record(ids: torch.Tensor, **rest: object) -> torch.Tensor:
        shapes.append((ids.shape[0], ids.shape[1]))
        return hidden(ids, **rest)

    decoder.hidden = record  # type: ignore[method-assign]
    return shapes


def passes(decoder: Decoder, asked: list[list[Pair]], tokens: int) -> list[tuple[int, int]]:
    """Shapes of the forward passes."""
    shapes = count_passes(decoder)
    list(score(decoder, asked, tokens=tokens))
    return shapes


def test_what_is_shared_is_read_once() -> None:
    """A prompt of 14 tokens, five questions of 2, each with three answers of 3 tokens, the last of which predict."""
    prompt = [*range(14)]
    asked = [[([*prompt, 20 + i, 30], [7, 8 + k, 9]) for k in range(3)] for i in range(5)]
    decoder = model(replace(CONFIG, max_seq_len=40))
    assert passes(decoder, asked, 1000) == [(1, 14), (5, 3), (15, 1)]  # all answers begin with the same token


def test_items_are_complete_while_others_of_their_prefix_are_still_to_be_read() -> None:
    """All 96 share a prompt, 32 a longer one; the model is free between two of them, and what came so far is right."""
    prompt, decoder = [*range(14)], model(replace(CONFIG, max_seq_len=40))
    asked: list[list[Pair]] = []
    for i in range(96):
        context = [*prompt, *(range(20, 30) if i % 3 else ()), 30 + i % 7, i % 11, i % 13]
        asked.append([(context, [40 + k, i % 5, 3]) for k in range(2 + i % 2)])
    shapes = count_passes(decoder)
    found, after = {}, []
    for item, likelihoods in score(decoder, asked, tokens=24):
        assert not torch.is_inference_mode_enabled()
        found[item] = likelihoods
        after.append(len(shapes))
    assert after[0] < len(shapes) / 4 and after[47] < 3 * len(shapes) / 4
    assert sum(now > before for before, now in pairwise(after)) > 8  # a few at a time
    same(found, [[whole(decoder, pair) for pair in row] for row in asked])


def test_a_batch_is_as_large_as_its_length_allows() -> None:
    """Whatever short items would allow is not taken for long ones."""
    asked = [[([i], [1, 2])] for i in range(20)] + [[([i] * 30, [1, 2])] for i in range(20)]
    shapes = passes(model(replace(CONFIG, max_seq_len=40)), asked, 70)
    assert all(rows * length <= 70 for rows, length in shapes)
    assert {length for _, length in shapes} == {31, 2} and max(rows for rows, _ in shapes) > 9


def test_what_cannot_be_scored_is_refused() -> None:
    for context, continuations in [([], [[1]]), ([1], [[]])]:
        with pytest.raises(InputError, match="empty"):
            log_likelihoods(model(), context, continuations)
    with pytest.raises(InputError, match="longer than the model's context"):
        log_likelihoods(model(), [1] * 14, [[1], [1] * 3])
    with pytest.raises(InputError, match="longer than the model's context"):
        list(score(model(), [[([1], [1] * 17)]]))
    for context, continuations, wrong in [([1], [[-1], [2]], -1), ([1], [[10**6]], 10**6), ([-3], [[1]], -3)]:
        with pytest.raises(InputError, match=rf"a token id outside the vocabulary\n  found: {wrong}\n"):
            log_likelihoods(model(), context, continuations)
    broken = model()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="NaN or infinite"):
        list(score(broken, [[([1], [1])]]))
    assert likelihood.SHARED > 1  # below, a prefill of its own would be made for a bos token
