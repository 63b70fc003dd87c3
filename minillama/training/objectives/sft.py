"""Next-token prediction over conversations, the answers weighted: supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minillama.data.instructions import Instructions, Rows
from minillama.inference.engine import evaluating
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.training.objectives.base import Batch, DataObjective, Metrics
from minillama.training.objectives.unpadded import unpadded
from minillama.training.ranks import Ranks


@dataclass(eq=False)
class FineTuning(DataObjective[Instructions]):
    """Supervised fine-tuning: loss = -sum_t w_t log p(token_t | token_1..t-1) over a conversation, w = 0 on prompts.

    Ouyang et al. 2022, arXiv 2203.02155, §3.5. Packed conversations do not see one another.

    Args:
        z_loss: weight of PaLM's z-loss.
    """

    z_loss: float = 0.0

    def __post_init__(self, decoder: Decoder) -> None:
        super().__post_init__(decoder)
        self.compiles = decoder.device.type != "cpu"  # where `unpadded` needs eager blocks
        self.prompts = [example.prompt for example in self.data.val[:1]]
        decoder.stop_ids |= self.data.stop_ids

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        return _batch(self.data.rows(self.seed, step, self.batch_size)).share(rank, world)

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Sum of weighted nats over the answers, and their number of tokens."""
        model, batch = self.model, unpadded(batch, self.model)
        chosen = batch.weights != 0  # the head is the costliest layer, and prompts have no target
        hidden = model.hidden(batch.tokens, positions=batch.positions, mask=batch.mask)[chosen]
        z_loss = self.z_loss if model.training else 0.0
        loss = model.loss(hidden, batch.targets[chosen], batch.weights[chosen], z_loss)
        return {"loss": loss}, {"answer_tokens": chosen.sum()}

    def validate(self, rows: int, limit: int) -> Metrics:
        """Weighted nats per answer token of held-out conversations, by the mask and positions of training.

        Packing `wrap` joins conversations in training; here each begins at position 0, alone, as at inference.
        """
        nats, weight, ranks = 0.0, 0.0, Ranks.current()
        with evaluating(self.model):
            for part in self.data.held_out(rows * ranks.world, limit):
                batch = _batch(part)
                own, counts = ranks.part(len(batch.tokens), rows)
                nats += counts * self.loss(batch.rows(own.start, own.stop).to(self.model.device))[0]["loss"].item()
                weight += batch.total("loss")
        return {"val_loss": ranks.sum({"nats": nats})["nats"] / weight}


def _batch(rows: Rows) -> Batch:
    tokens, targets, weights = map(torch.from_numpy, rows[:3])
    totals = {"loss": weights.sum().item(), "answer_tokens": 1.0}
    if rows.documents is None or rows.positions is None:
        return Batch(tokens, targets, weights, totals=totals)
    mask = Mask(documents=torch.from_numpy(rows.documents))
    return Batch(tokens, targets, weights, mask, torch.from_numpy(rows.positions), totals=totals)
