"""Continuations of one context against whole forward passes."""

from __future__ import annotations

import pytest
import torch

from minillama import Decoder, ModelConfig
from minillama.errors import InputError
from minillama.evaluate.likelihood import log_likelihoods

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=50, max_seq_len=16)


def model() -> Decoder:
    torch.manual_seed(5)
    decoder = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return decoder.eval()


@pytest.mark.parametrize("context", [[7], [1, 2, 3, 4, 5]])
def test_each_is_scored_as_if_it_were_alone(context: list[int]) -> None:
    decoder = model()
    with torch.inference_mode():
        greedy = list(context)
        for _ in range(3):
            greedy.append(int(decoder(torch.tensor([greedy]))[0, -1].argmax()))
    continuations = [[9, 8, 7, 6], greedy[len(context) :], [9], [3, 3]]
    scores = log_likelihoods(decoder, context, continuations)
    for continuation, (nats, is_greedy) in zip(continuations, scores, strict=True):
        with torch.inference_mode():
            logits = decoder(torch.tensor([context + continuation]))[0].log_softmax(-1)
        rows = range(len(context) - 1, len(context) + len(continuation) - 1)
        want = sum(logits[row, token].item() for row, token in zip(rows, continuation, strict=True))
        assert nats == pytest.approx(want, abs=1e-4)
        assert is_greedy == (continuation == greedy[len(context) :][: len(continuation)])


def test_what_does_not_fit_is_refused() -> None:
    for context, continuations in [([], [[1]]), ([1], [[]])]:
        with pytest.raises(InputError, match="empty"):
            log_likelihoods(model(), context, continuations)
    with pytest.raises(InputError, match="longer than the model's context"):
        log_likelihoods(model(), [1] * 14, [[1], [1] * 3])
