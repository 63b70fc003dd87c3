"""Two processes with halves of a batch against one with all of it: losses, metrics, norms and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from minillama.config import ModelConfig
from minillama.model import Decoder
from minillama.training.gradients import accumulate, clip
from minillama.training.objectives.base import Batch
from minillama.training.objectives.compared import Compared
from minillama.training.ranks import Ranks

from .test_preferences import moved, objective

CONFIG = ModelConfig(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24, vocab_size=37, max_seq_len=12)


class Weighted:
    """Next tokens with unequal weights, whose sum differs from rank to rank."""

    def __init__(self) -> None:
        model = Decoder(CONFIG)
        model.init_weights(torch.Generator().manual_seed(3))
        self.models: Mapping[str, nn.Module] = {"model": model, "unused": nn.Linear(2, 3)}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(11 + step)
        ids = torch.randint(CONFIG.vocab_size, (4, 13), generator=generator)
        weights = torch.rand(4, 12, generator=generator) * torch.tensor([[0.0], [1.0], [5.0], [9.0]])
        return Batch(ids[:, :-1], ids[:, 1:], weights).share(rank, world)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        model = self.models["model"]
        assert isinstance(model, Decoder)
        hidden = model.hidden(batch.tokens)
        return {"loss": model.loss(hidden, batch.targets, batch.weights)}, {"weight": batch.weights.sum()}


def preferences(ranks: Ranks) -> dict[str, Tensor]:
    """The reference's log-probabilities and the KL are of all ranks, and so is the loss."""
    found: dict[str, Tensor] = {}
    for kind in ("dpo + sft", "kto"):
        made = moved(objective(kind, 2))
        assert isinstance(made, Compared)
        found[f"{kind} prepared"] = torch.tensor(list(made.prepare(0).values()))
        losses = accumulate(made, made.batch(0, ranks.rank, ranks.world), 2, torch.device("cpu"), ranks)
        found |= {f"{kind} loss": torch.tensor(losses.loss), f"{kind} known": made.known}
    return found


def step(ranks: Ranks) -> dict[str, Tensor]:
    objective = Weighted()
    batch = objective.batch(5, ranks.rank, ranks.world)
    losses = accumulate(objective, batch, 2, torch.device("cpu"), ranks)  # type: ignore[arg-type]
    if ranks.rank == 0:  # the others have no gradient of it, and take part all the same
        objective.models["unused"](torch.ones(1, 2)).sum().backward()
    ranks.sum_gradients(p for model in objective.models.values() for p in model.parameters())
    norms = clip(objective.models, 0.5)
    figures = {"loss": losses.loss, **losses.metrics, **norms}
    found = {name: torch.tensor(value) for name, value in figures.items()}
    found |= {name: p.grad for name, p in objective.models["model"].named_parameters() if p.grad is not None}
    return found | preferences(ranks)


def work(rank: int, folder: str) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    ranks = Ranks.current()
    assert (ranks.rank, ranks.world) == (rank, 2)
    torch.save(step(ranks), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_are_one(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    alone = step(Ranks.current())
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            atol = 1e-4 if "known" in name or "prepared" in name else 1e-6  # sums over up to 200 tokens
            torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-5)
