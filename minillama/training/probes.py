"""Training diagnostics: update-to-weight ratio, largest attention logit, accuracy on evaluation sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os.path import expanduser
from pathlib import Path

import torch
from torch import Tensor, nn

from minillama.evaluate.multiple_choice import outcomes
from minillama.evaluate.tasks import named
from minillama.inference.engine import evaluating
from minillama.layers.attention import Attention
from minillama.layers.mask import KernelMask
from minillama.model import Decoder
from minillama.runs.validation import ValidateConfig
from minillama.tokenizer import Tokenizer
from minillama.training.evaluation import share
from minillama.training.objectives import MODEL, Batch, Objective
from minillama.training.ranks import Ranks
from minillama.training.sharded import whole

Kernel = Callable[[Tensor, Tensor, Tensor, KernelMask], Tensor]
QUERIES = 256  # per chunk of scores


class TaskAccuracy:
    """Accuracy on the first items of evaluation sets, by the harness's prompts and without examples.

    Args:
        ranks: processes that share the items; of a sharded model, which all must read alike, this one alone.

    Raises:
        InputError: a set that is not there.
    """

    def __init__(self, config: ValidateConfig, tokenizer: Tokenizer, ranks: Ranks) -> None:
        self.tokenizer, self.ranks = tokenizer, ranks
        tasks = named(config.tasks, "validate.tasks") if config.tasks else {}
        folder = Path(expanduser(config.data))
        self.sets = {name: task.load(folder, "lm-eval", 0, config.items) for name, task in tasks.items()}
        self.metrics = {name: task.forms["lm-eval"].metric for name, task in tasks.items()}

    def __call__(self, model: Decoder) -> dict[str, float]:
        """Accuracies under their names in metrics.jsonl, such as piqa_acc_norm.

        And piqa_truncated, where there are any: items that lost tokens on the left, for the model's context.
        """
        found = {}
        with torch.compiler.set_stance("force_eager"):  # compiled blocks would be made anew for every length
            for name, items in self.sets.items():
                metric = self.metrics[name]
                own = share(items, self.ranks.rank, self.ranks.world)
                known = [*outcomes(model, self.tokenizer, name, own)] if own else []
                right, cut = sum(one.is_right(metric) for one in known), sum(one.truncated for one in known)
                sums = self.ranks.sum({"right": right, "truncated": cut})
                found[f"{name}_{metric}"] = sums["right"] / len(items)
                found |= {f"{name}_truncated": sums["truncated"]} if sums["truncated"] else {}
        return found


def matrices(model: nn.Module) -> list[Tensor]:
    """Weights of two dimensions or more."""
    return [parameter.detach() for parameter in model.parameters() if parameter.dim() > 1]


def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Update-to-weight ratio ||after - before|| / ||before|| over all tensors; about 1e-3 in a healthy run."""
    moved = [whole(torch.linalg.vector_norm(new - old)) for old, new in zip(before, after, strict=True)]
    size = [whole(torch.linalg.vector_norm(old)) for old in before]
    return float(torch.stack(moved).norm() / torch.stack(size).norm())


def attention_logit_max(model: Decoder, objective: Objective, batch: Batch) -> float:
    """Largest attention logit q k^T / sqrt(E) within the mask, over heads and layers; NaN without attention.

    It grows without bound in runs that are about to diverge (Dehghani et al. 2023, arXiv 2302.05442, §2.1).

    Args:
        model: float32 weights, on which the objective reads the batch.
        batch: a step's first micro-batch.
    """
    found: list[float] = []

    def measured(kernel: Kernel) -> Kernel:
        def run(q: Tensor, k: Tensor, v: Tensor, mask: KernelMask) -> Tensor:
            found.append(_logit_max(q, k, mask))
            return kernel(q, k, v, mask)

        return run

    before, objective.models = objective.models, {**objective.models, MODEL: model}
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    kernels = [layer.kernel for layer in layers]
    for layer in layers:
        layer.kernel = measured(layer.kernel)
    try:
        with evaluating(model), torch.compiler.set_stance("force_eager"):  # compiled blocks have the other kernels
            objective.loss(batch)
    finally:
        objective.models = before
        for layer, kernel in zip(layers, kernels, strict=True):
            layer.kernel = kernel
    return max(found, default=math.nan)


def _logit_max(q: Tensor, k: Tensor, mask: KernelMask) -> float:
    """Largest logit of queries (B, H, T, E) and keys (B, K, S, E) within a mask."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    most = []
    for start in range(0, q.shape[2], QUERIES):
        part = slice(start, start + QUERIES)
        scores = (q[:, :, part] @ k.mT) / q.shape[-1] ** 0.5
        if mask.is_causal:
            unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1 + start)
            scores.masked_fill_(unseen, -torch.inf)
        elif mask.allowed is not None and mask.allowed.is_floating_point():
            scores += mask.allowed[..., part, :]
        elif mask.allowed is not None:
            scores.masked_fill_(~mask.allowed[..., part, :], -torch.inf)
        most.append(scores.max().item())
    return max(most)
