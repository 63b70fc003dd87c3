"""Two processes with halves of a batch against one with all of it: losses, metrics, norms and gradients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.evaluate.perplexity import score
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.runs.sections import DataConfig
from minillama.training.gradients import accumulate, clip
from minillama.training.objectives.base import Batch
from minillama.training.objectives.compared import Compared
from minillama.training.pace import Pace
from minillama.training.parallel import _check_same_settings
from minillama.training.ranks import Ranks, check_same_weights

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
        losses = accumulate(made, made.batch(0, ranks.rank, ranks.world), 2, torch.device("cpu")).summed(ranks)
        found |= {f"{kind} loss": torch.tensor(losses.loss), f"{kind} known": made.known}
    return found


def step(ranks: Ranks) -> dict[str, Tensor]:
    objective = Weighted()
    batch = objective.batch(5, ranks.rank, ranks.world)
    losses = accumulate(objective, batch, 2, torch.device("cpu")).summed(ranks)  # type: ignore[arg-type]
    if ranks.rank == 0:  # the others have no gradient of it, and take part all the same
        objective.models["unused"](torch.ones(1, 2)).sum().backward()
    ranks.sum_gradients(p for model in objective.models.values() for p in model.parameters())
    norms = clip(objective.models, 0.5)
    figures = {"loss": losses.loss, **losses.metrics, **norms}
    found = {name: torch.tensor(value) for name, value in figures.items()}
    found |= {name: p.grad for name, p in objective.models["model"].named_parameters() if p.grad is not None}
    return found | preferences(ranks) | measures(ranks)


def measures(ranks: Ranks) -> dict[str, Tensor]:
    """What is measured on held-out data that the ranks share."""
    found: dict[str, Tensor] = {}
    for kind in ("reward", "dpo + sft", "kto"):
        made = moved(objective(kind, 2))
        found |= {f"{kind} {name}": torch.tensor(value) for name, value in made.validate(2, 0).items()}
    model = Decoder(CONFIG)
    model.init_weights(torch.Generator().manual_seed(3))
    windows = [*np.random.default_rng(5).integers(CONFIG.vocab_size, size=(7, 12))]
    text = [*windows, windows[0][:5], windows[1][:3]]  # two processes: 4 rows, then 3, and single ones of other lengths
    own = score(model, iter(text), 2.0, 2, rank=ranks.rank, world=ranks.world)
    assert own.tokens == (7 * 11 + 4 + 2 if ranks.world == 1 else [4 * 11 + 4 + 2, 3 * 11][ranks.rank])
    summed = ranks.sum({"nats": own.nats, "tokens": own.tokens, "bytes": own.bytes})
    return found | {f"text {name}": torch.tensor(float(value)) for name, value in summed.items()}


def pace(ranks: Ranks) -> str:
    made = Pace(ranks)
    made.add(1.0 + ranks.rank)
    made.add(1.0 + 3 * ranks.rank)
    return made.slowest()


def work(rank: int, folder: str) -> None:
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    ranks = Ranks.current()
    assert (ranks.rank, ranks.world) == (rank, 2)
    with pytest.raises(InputError, match=r"other settings\n  where: seed\n  found: 1 in process 1"):
        _check_same_settings(RunConfig(seed=rank))
    _check_same_settings(RunConfig(data=DataConfig(cache=f"of machine {rank}")))
    model = nn.Linear(2, 3)
    nn.init.constant_(model.weight, 1.0)
    nn.init.constant_(model.bias, rank)
    with pytest.raises(InputError, match=r"other weights\n  where: model, bias\n  found: those of process 1"):
        check_same_weights({"model": model}, ranks)
    nn.init.constant_(model.bias, 0.0)
    check_same_weights({"model": model}, ranks)
    torch.save(step(ranks), f"{folder}/{rank}.pt")
    line = r"the others wait for process 1 of 2 on \S+: 3 s per step, where the median is 1 s"
    assert re.fullmatch(line, pace(ranks))
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_are_one(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    alone = step(Ranks.current())
    assert pace(Ranks.current()) == ""
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            sums = ("known", "prepared", "val_")  # over up to 200 tokens
            atol = 1e-4 if any(part in name for part in sums) else 1e-6
            torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-5)
