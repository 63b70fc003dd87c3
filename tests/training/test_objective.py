"""The batch of a language model, and its loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.data.corpus import Corpus, Split
from minillama.data.shards import Shard
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.training.gradients import accumulate
from minillama.training.objectives.base import Batch
from minillama.training.objectives.lm import LanguageModel

MODEL = ModelConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=24, vocab_size=50, max_seq_len=16)


@pytest.fixture
def corpus() -> Corpus:
    ids = np.arange(1, 2001) % 50
    ids[::7] = 0  # a separator every seven tokens
    splits = [Split([Shard(Path("x"), ids.astype(np.uint16))], 50, 2000, "test")]
    return Corpus(splits, splits, separator=0)


def test_targets_are_the_next_tokens(corpus: Corpus) -> None:
    batch = LanguageModel(Decoder(MODEL), corpus, 1, 3, 8).batch(4)
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (3, 8)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert batch.mask == Mask() and batch.positions is None


def test_loss_is_the_sum_of_nats(corpus: Corpus) -> None:
    model = Decoder(MODEL)
    objective = LanguageModel(model, corpus, 1, 3, 8)
    batch = objective.batch(0)
    loss, weight = objective.loss(batch)[0]["loss"], batch.total("loss")
    expected = F.cross_entropy(model(batch.tokens).flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss, expected)
    assert weight == 24


def test_weights_leave_targets_out(corpus: Corpus) -> None:
    model = Decoder(MODEL)
    objective = LanguageModel(model, corpus, 1, 2, 8)
    batch = objective.batch(0)
    weights = torch.zeros(2, 8)
    weights[1, 3] = 2.0
    weighted = Batch(batch.tokens, batch.targets, weights)
    loss, weight = objective.loss(weighted)[0]["loss"], weighted.total("loss")
    one = F.cross_entropy(model(batch.tokens)[1, 3], batch.targets[1, 3])
    torch.testing.assert_close(loss / weight, one)


def test_parts_of_a_batch_sum_to_the_whole(corpus: Corpus) -> None:
    objective = LanguageModel(Decoder(MODEL), corpus, 1, 5, 8, separator=0)
    batch = objective.batch(0)
    whole = objective.loss(batch)[0]["loss"]
    parts = [batch.rows(i, i + 2) for i in range(0, 5, 2)]
    torch.testing.assert_close(sum(objective.loss(part)[0]["loss"] for part in parts), whole)
    assert all(part.totals == batch.totals == {"loss": 40.0} for part in parts)
    assert sum(part.weights.sum().item() for part in parts) == 40


@pytest.mark.parametrize("separator", [None, 0])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_have_the_gradients_of_the_whole(corpus: Corpus, separator: int | None, micro: int) -> None:
    found = []
    for size in (micro, 5):
        torch.manual_seed(0)
        objective = LanguageModel(Decoder(MODEL), corpus, 1, 5, 8, separator=separator, z_loss=0.1)
        losses = accumulate(objective, objective.batch(0), size, torch.device("cpu"))
        found.append((losses.loss, {name: p.grad for name, p in objective.model.named_parameters()}))
    (loss, gradients), (whole, expected) = found
    assert loss == pytest.approx(whole, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def test_documents_are_masked_and_positions_start_anew(corpus: Corpus) -> None:
    batch = LanguageModel(Decoder(MODEL), corpus, 1, 2, 16, separator=0).batch(0)
    assert batch.positions is not None and batch.mask.documents is not None
    for row in range(2):
        starts = [i for i in range(16) if batch.tokens[row, i] == 0]
        assert starts
        for i in starts:
            assert batch.positions[row, i] == 0
        first = starts[0]
        assert batch.positions[row, :first].tolist() == list(range(first))
        ids = batch.mask.documents[row]
        assert ids[first] != ids[first - 1] if first else True
    model = Decoder(MODEL)
    changed = batch.tokens.clone()
    start = next(i for i in range(16) if changed[0, i] == 0)
    assert start > 0
    changed[0, start - 1] = (changed[0, start - 1] + 1) % 49 + 1
    a = model(batch.tokens, positions=batch.positions, mask=batch.mask)[0, start:]
    b = model(changed, positions=batch.positions, mask=batch.mask)[0, start:]
    torch.testing.assert_close(a, b)


def test_processes_share_a_batch(corpus: Corpus) -> None:
    objective = LanguageModel(Decoder(MODEL), corpus, 1, 6, 8, separator=0)
    whole, parts = objective.batch(3), [objective.batch(3, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert [part.totals for part in parts] == [whole.totals] * 3
    for rank, part in enumerate(parts):
        assert torch.equal(whole.share(rank, 3).tokens, part.tokens)
