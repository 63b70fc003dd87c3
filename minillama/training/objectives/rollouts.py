"""Rollouts: the policy's own answers, their rewards and old log-probabilities, kept over several optimizer steps.

Shapes: B answers of a rollout, T time. Rows are prompt and answer, padded on the right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from minillama.data.permutation import derive_keys, permute
from minillama.data.prompts import Prompt, Prompts
from minillama.errors import InputError
from minillama.evaluate.rewards import Rewards, Scored, answer_of, check_context
from minillama.evaluate.rules import Answer, distinct
from minillama.inference.generate import end_ids
from minillama.inference.request import Request
from minillama.inference.rollout import DecodingCopy, answers
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs.feedback import FeedbackConfig
from minillama.training.objectives.advantages import group_advantages, kl_estimate
from minillama.training.objectives.answers import answer_log_probabilities
from minillama.training.objectives.base import Batch, DataObjective, Metrics, rows_of
from minillama.training.objectives.reference import Reference
from minillama.training.objectives.unpadded import is_eager
from minillama.training.ranks import Ranks
from minillama.training.whole_weights import whole_weights

MULTIPLE = 8  # longer rows are padded to a multiple of it, so that compiled code meets few shapes; see `_width`
LOST = 0.5  # share of the first rollout's distinct bigrams below which there is a warning
FLAT = 10  # rollouts in a row without a signal from which on there is a warning
ALARMS = ("kl", "distinct_2", "scored")  # measures of a rollout that the warnings read


@dataclass(eq=False)
class Feedback(DataObjective[Prompts]):
    """Objective of a policy that learns from its own answers; subclasses have the loss.

    A rollout of B = batch_size x minibatches answers, chosen of `oversample` times as many, serves `epochs` x
    `minibatches` steps. It is a pure function of weights, seed and number; the steps read it in an order by (seed,
    number, epoch). Processes share the prompts out.

    Args:
        settings: of `[objective]`.
        rewards: of an answer.
        micro_batch_size: answers per pass.
        dtype: of the passes; the model's unless given.
    """

    settings: FeedbackConfig
    rewards: Rewards
    micro_batch_size: int
    dtype: torch.dtype | None = None
    writes_text = False

    def __post_init__(self, decoder: Decoder) -> None:
        super().__post_init__(decoder)
        self.best = ("val_reward", "max")
        self.compiles = decoder.device.type != "cpu"  # where every length of the answers would be compiled anew
        decoder.stop_ids |= {self.data.end_id}
        self.stop_ids = end_ids(decoder, self.rewards.tokenizer)
        check_context(self.rewards.models, (*self.data.train, *self.data.val), self.settings.max_new_tokens)
        self.reference = Reference(decoder) if self.settings.has_reference else None
        self.companions = {**self.rewards.models, **(self.reference.companions if self.reference else {})}
        self.buffer: dict[str, Tensor] = {}
        self.first_distinct = torch.tensor(torch.nan)
        self.recent: dict[str, float] = {}
        self.flat = 0  # rollouts in a row of which no group had a signal
        self.step = 0
        self.sample: Mapping[str, Any] = {}
        self._copy: DecodingCopy | None = None

    # what a subclass gives

    def judge(self, scores: Tensor) -> Metrics:
        """Advantages into the buffer, from the answers' rewards (B,); what there is to record."""
        raise NotImplementedError

    def read(self, batch: Batch) -> Mapping[str, Tensor]:
        """Further (B, T) tensors of the buffer from the weights of the rollout, such as values."""
        return {}

    # the rollout

    def choose(self, scores: Tensor) -> Tensor:
        """Indices (N,) of the answers by their rewards (N,), those of prompts whose answers differ in reward first."""
        rows, settings = torch.arange(len(scores)), self.settings
        if settings.oversample == 1:  # all are trained on, in the order of the prompts
            return rows
        return rows.view(-1, settings.samples)[(~self._differ(scores)).int().argsort(stable=True)].flatten()

    def prepare(self, step: int) -> Metrics:
        self.step = step
        number, part = divmod(step, self.settings.updates)
        return self._collect(number) if part == 0 else {}

    def _collect(self, number: int) -> Metrics:
        began, settings = time.perf_counter(), self.settings
        rows = self.batch_size * settings.minibatches
        prompts = self._prompts(number)
        keys = [derive_keys("rollout", self.seed, number, i)[0] >> 8 for i in range(len(prompts))]
        requests = self._answers(prompts, settings.samples, Sampling(settings.temperature), keys)
        seconds = time.perf_counter() - began
        asked = [prompt for prompt in prompts for _ in range(settings.samples)]
        found, scores = self._scores(asked, requests)
        chosen = self.choose(scores)[:rows]
        self.buffer = self._rows(*([given[row] for row in chosen.tolist()] for given in (asked, requests)))
        self.buffer["chosen"], scores = chosen, scores[chosen]
        self.buffer["mask"] &= ~scores.isnan()[:, None]  # neither reward nor KL of what cannot be scored
        for name, values in self._passes(number).items():
            self.buffer[name] = values
        if self.first_distinct.isnan():
            self._check_scored(found, prompts)
            self.first_distinct = torch.tensor(found["distinct_2"])
        tokens = sum(len(request.tokens) for request in requests)
        speed = {"rollout_tokens": float(tokens), "rollout_tokens_per_second": tokens / seconds}
        self.recent = {**found, **self._signal(scores), **self._kl(), **self.judge(scores), **speed}
        self.flat = self.flat + 1 if self.recent.get("groups_with_signal") == 0 else 0
        return self.recent

    def _signal(self, scores: Tensor) -> Metrics:
        """Share of the prompts trained on whose answers differ in reward; nothing where there is one answer to each."""
        if self.settings.samples == 1:
            return {}
        return {"groups_with_signal": self._differ(scores).float().mean().item()}

    def _differ(self, scores: Tensor) -> Tensor:
        """Whether the answers to each prompt differ in reward."""
        return (group_advantages(scores.view(-1, self.settings.samples), "mean") != 0).any(1)

    def _prompts(self, number: int) -> list[Prompt]:
        """Prompts of a rollout."""
        kept = self.batch_size * self.settings.minibatches // self.settings.samples
        return self.data.batch(self.seed, number, kept * self.settings.oversample)

    def _check_scored(self, measures: Mapping[str, float], prompts: Sequence[Prompt]) -> None:
        """Refuse rewards that can score no answer of the first rollout: nothing would be learned."""
        if measures["scored"]:
            return
        names = [name.removeprefix("reward_") for name, value in measures.items() if value != value]
        raise InputError(
            "no answer of the first rollout can be scored",
            where="objective.rewards",
            found=f"nothing from {', '.join(name for name in names if name != 'reward')} for {prompts[0].where} ...",
            expected="a number for some: verified needs records with an answer, a function must not give None for all",
            fix="give the records an answer, or take other rewards; one of weight 0 is only shown",
        )

    def _answers(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, keys: Sequence[int]
    ) -> list[Request]:
        """Answers to all prompts, of which each process writes those to its own, with a whole model."""
        if self._copy is None:  # it has the weights as they are, which may be gathered from many processes
            self._copy = DecodingCopy(self.model, whole_weights, self.dtype)
            model = self._copy.model
        else:
            model = self._copy.refresh()
        ranks = Ranks.current()
        own = slice(ranks.index, None, ranks.processes)
        ids = [prompt.ids for prompt in prompts[own]]
        made = answers(model, ids, samples, self.settings.max_new_tokens, sampling, self.stop_ids, keys[own])
        found = ranks.collect(made)
        places = (divmod(i, ranks.processes) for i in range(len(prompts)))
        return [found[index][row * samples + j] for row, index in places for j in range(samples)]

    def _rows(self, prompts: Sequence[Prompt], requests: Sequence[Request]) -> dict[str, Tensor]:
        """Rows of ids, targets one place on, and the mask of targets that are of the answer."""
        ids = [torch.tensor([*prompt.ids, *request.tokens]) for prompt, request in zip(prompts, requests, strict=True)]
        padded = pad_sequence(ids, batch_first=True)
        width = _width(padded.shape[1] - 1, self.model)
        padded = F.pad(padded, (0, width + 1 - padded.shape[1]))
        places = torch.arange(width)
        starts = torch.tensor([len(prompt.ids) - 1 for prompt in prompts])[:, None]
        ends = torch.tensor([len(row) - 1 for row in ids])[:, None]
        return {"tokens": padded[:, :-1], "targets": padded[:, 1:], "mask": (places >= starts) & (places < ends)}

    def _scores(self, prompts: Sequence[Prompt], requests: Sequence[Request]) -> tuple[dict[str, float], Tensor]:
        """Measures of a rollout, and the rewards of its answers."""
        tokenizer = self.rewards.tokenizer
        given = [answer_of(*pair, tokenizer) for pair in zip(prompts, requests, strict=True)]
        scored = Ranks.current().leaders(self.rewards(given))  # a function may not give the same twice
        ended = torch.tensor([answer.ended for answer in given])
        measures = {f"reward_{name}": part.nanmean().item() for name, part in scored.parts.items()}
        measures |= {
            "reward": scored.total.nanmean().item(),  # of what could be scored
            "scored": 1 - scored.total.isnan().float().mean().item(),
            "answer_length": sum(len(answer.ids) for answer in given) / len(given),
            "ended": ended.float().mean().item(),
            "distinct_2": sum(distinct(answer.ids) for answer in given) / len(given),
        }
        self._show(given, scored)
        return measures, scored.signal - self.settings.cut_off * ~ended

    def _show(self, given: Sequence[Answer], scored: Scored) -> None:
        """One of the answers, another at each step, as the sample."""
        row = derive_keys("sample", self.seed, self.step)[0] % len(given)
        answer, reward = given[row], scored.total[row].item()
        parts = {name: _json(values[row].item()) for name, values in scored.parts.items()}
        self.sample = {"question": answer.prompt, "answer": answer.text, "reward": _json(reward), "rewards": parts}

    def _passes(self, number: int) -> dict[str, Tensor]:
        """Log-probabilities of policy and reference, and what a subclass reads, before the weights change.

        They are computed on the micro-batches of the first epoch, and not under `no_grad`, for which some kernels of
        attention are others: so the first ratios are exactly 1, and a policy that is still the reference has its
        log-probabilities to the bit. A single step needs none of its own.
        """
        needs_old, found = self.settings.updates > 1 or self.settings.kl == "k1", dict[str, Tensor]()
        for rows, batch in self._micro_batches(number):
            made = {name: values.detach() for name, values in self.read(batch).items()}  # one graph at a time
            if needs_old and "old" not in made:
                made["old"] = self.log_probabilities(self.model, batch)[0].detach()
            if self.reference is not None:
                with self.reference.of(self.model) as reference:
                    made["reference"] = self.log_probabilities(reference, batch)[0].detach()
            for name, values in made.items():
                whole = found.setdefault(name, torch.zeros(self.buffer["mask"].shape))
                whole[rows, : values.shape[1]] = values.cpu()
        return {name: Ranks.current().sum_tensor(values) for name, values in sorted(found.items())}

    def _micro_batches(self, number: int) -> Iterator[tuple[Tensor, Batch]]:
        """Rows of the buffer and their batches, as this process will read them in the first epoch."""
        ranks = Ranks.current()
        for part in range(self.settings.minibatches):
            own = rows_of(self.batch_size, ranks.rank, ranks.world)
            rows = self._order(number, 0, part)[own.start : own.stop]
            batch = self._batch(rows)
            for start in range(0, len(rows), self.micro_batch_size):
                stop = start + self.micro_batch_size
                yield rows[start:stop], trimmed(batch.rows(start, stop), self.model).to(self.model.device)

    def _kl(self) -> Metrics:
        """Mean KL to the reference per answer, where both log-probabilities are known."""
        if not {"old", "reference"} <= self.buffer.keys():
            return {}
        kl = kl_estimate(self.buffer["old"], self.buffer["reference"], "k1").sum(1)
        return {"kl": kl.sum().item() / max(1, int(self.buffer["mask"].any(1).sum()))}

    # the steps

    def log_probabilities(self, model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, T) of the answers' tokens at the temperature of the rollout, and entropies."""
        return answer_log_probabilities(
            model, batch.tokens, batch.targets, batch.extras["mask"], self.settings.temperature
        )

    def _order(self, number: int, epoch: int, part: int) -> Tensor:
        """Rows of a minibatch, the short answers first."""
        count = self.batch_size * self.settings.minibatches
        keys = derive_keys("minibatches", self.seed, number, epoch)
        places = np.arange(part * self.batch_size, (part + 1) * self.batch_size, dtype=np.uint64)
        rows = torch.from_numpy(permute(places, count, keys).astype(np.int64))
        lengths = self.buffer["mask"].shape[1] - self.buffer["mask"][rows].flip(1).int().argmax(1)
        return rows[lengths.argsort(stable=True)]

    def _batch(self, rows: Tensor) -> Batch:
        parts = {name: values[rows] for name, values in self.buffer.items() if values.dim() == 2}
        tokens, targets, mask = (parts.pop(name) for name in ("tokens", "targets", "mask"))
        return Batch(tokens, targets, mask.float(), extras={**parts, "mask": mask}, totals={"tokens": 1.0})

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The minibatch of a step: a pure function of (seed, step) and the buffer."""
        number, update = divmod(step, self.settings.updates)
        epoch, part = divmod(update, self.settings.minibatches)
        return self.weighted(self._batch(self._order(number, epoch, part))).share(rank, world)

    def weighted(self, batch: Batch) -> Batch:
        """The minibatch with weights of the tokens and totals of the loss's terms."""
        raise NotImplementedError

    def where(self, step: int, rows: Sequence[int]) -> list[str]:
        number, update = divmod(step, self.settings.updates)
        order = self._order(number, *divmod(update, self.settings.minibatches))
        prompts = self._prompts(number)
        chosen = self.buffer.get("chosen", torch.arange(len(self.buffer["mask"])))  # of the last release has none
        return [prompts[int(chosen[order[row]]) // self.settings.samples].where for row in rows]

    # around them

    def validate(self, rows: int, limit: int) -> Metrics:
        """Rewards of greedy answers to held-out prompts, evenly spaced, so many that they fill about `limit` tokens."""
        data = self.data.val
        prompts = data[:: max(1, len(data) * self.settings.max_new_tokens // limit) if limit else 1]
        requests = self._answers(prompts, 1, Sampling(0.0), [0] * len(prompts))
        measures, _ = self._scores(prompts, requests)
        return {f"val_{name}": value for name, value in measures.items()}

    def warnings(self, measures: Metrics) -> list[str]:
        """A policy that left its reference, or repeats itself: signs that it games the rewards."""
        found, known = [], {**self.recent, **measures}
        if (scored := known.get("scored", 1.0)) < 1:
            found.append(f"{1 - scored:.0%} of the answers cannot be scored and teach nothing; see reward_* of metrics")
        if self.flat >= FLAT:
            found.append(
                f"in {self.flat} rollouts no prompt had answers of different rewards: nothing is learned; start from a "
                "model that gets some right and some wrong, or take easier prompts"
            )
        kl, limit = known.get("kl") or 0.0, self.settings.alarm_kl
        if limit and kl > limit:
            fix = "raise objective.beta" if self.settings.has_reference else "add a KL"
            found.append(f"KL of {kl:.1f} nats per answer to the start model, over {limit:g}: {fix}, or lower optim.lr")
        share = known.get("distinct_2", 1.0) / self.first_distinct.item()
        if share < LOST:
            found.append(
                f"answers repeat themselves: {share:.0%} of the distinct bigrams that they had; look at the samples, "
                "the reward may be gamed: bound it, or add the reward repetition"
            )
        return found

    def state_dict(self) -> dict[str, Tensor]:
        known = {name: self.recent[name] for name in ALARMS if name in self.recent}
        recent = {f"recent/{name}": torch.tensor(value, dtype=torch.float64) for name, value in known.items()}
        counts = {"flat": torch.tensor(self.flat), "step": torch.tensor(self.step)}
        return {**self.buffer, "first_distinct": self.first_distinct, **counts, **recent}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        recent = {name: value.item() for name, value in state.items() if name.startswith("recent/")}
        self.recent = {name.removeprefix("recent/"): value for name, value in recent.items()}
        self.buffer = {name: tensor for name, tensor in state.items() if name not in recent}
        self.first_distinct = self.buffer.pop("first_distinct")
        none = torch.tensor(0)  # in a checkpoint of the last release
        self.flat, self.step = (int(self.buffer.pop(name, none)) for name in ("flat", "step"))


def trimmed(batch: Batch, model: Decoder) -> Batch:
    """A micro-batch without the columns behind its longest answer, but for a little padding."""
    places = torch.arange(1, batch.tokens.shape[1] + 1, device=batch.tokens.device)
    width = _width(int((batch.extras["mask"] * places).max()), model)
    return replace(
        batch,
        tokens=batch.tokens[:, :width],
        targets=batch.targets[:, :width],
        weights=batch.weights[:, :width],
        extras={name: values[:, :width] for name, values in batch.extras.items()},
    )


def _width(used: int, model: Decoder) -> int:
    """Columns for so many tokens: a multiple of 8, or for eager code of 2, 4 and 8 from 16, 32 and 64 on."""
    eighth = 1 << max(0, used.bit_length() - 4)  # or less
    multiple = min(MULTIPLE, eighth) if is_eager(model) or used < MULTIPLE else MULTIPLE
    return max(1, -(-used // multiple) * multiple)


def _json(value: float) -> float | None:
    return value if value == value else None
