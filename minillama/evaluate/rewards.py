"""Rewards of answers: rules, functions and reward models, weighted, each known by itself (Ziya's RBRS)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minillama.data.prompts import Prompt
from minillama.errors import InputError
from minillama.evaluate.rules import RULES, Answer, Reward, rule
from minillama.formats.open import open_model
from minillama.inference.engine import evaluating
from minillama.inference.request import Request
from minillama.model import Decoder
from minillama.model.heads import last, open_scores, scores
from minillama.tokenizer import Tokenizer

ROWS = 16  # texts per pass of a reward model


@dataclass(frozen=True)
class Scored:
    """Rewards of N answers; NaN for one that some reward cannot score.

    Args:
        total: (N,) weighted sums.
        parts: (N,) by the rewards' names, without their weights.
    """

    total: Tensor
    parts: dict[str, Tensor]


class Rewards:
    """Weighted sum of rewards.

    Args:
        tokenizer: of the model that answers, which reward models must share.
        end_id: token that ends an answer, for reward models; put behind one that was cut off.
        device: of reward models.

    Attributes:
        models: reward models by folder, frozen, as in `Objective.companions`.

    Raises:
        InputError: an unknown reward, two of one name, a folder without a reward model or with another tokenizer.
    """

    def __init__(
        self, settings: Sequence[Reward], tokenizer: Tokenizer, end_id: int, device: torch.device | str = "cpu"
    ) -> None:
        titles = [reward.title for reward in settings]
        if len(set(titles)) < len(titles) or not titles:
            what = "two rewards have the same name" if titles else "no reward"
            raise InputError(what, where="objective.rewards", found=", ".join(titles) or None, fix="add label")
        self.settings, self.tokenizer, self.end_id, self.device = list(settings), tokenizer, end_id, device
        self.models: dict[str, nn.Module] = {}
        self._parts = {reward.title: self._part(reward) for reward in settings}

    def __call__(self, answers: Sequence[Answer]) -> Scored:
        """Rewards of the answers of one batch, over which LLaMA 2's are whitened."""
        parts = {name: part(answers) for name, part in self._parts.items()}
        total = sum((reward.weight * parts[reward.title] for reward in self.settings), torch.zeros(len(answers)))
        return Scored(total, parts)

    def _part(self, reward: Reward) -> Callable[[Sequence[Answer]], Tensor]:
        if reward.name == "llama-2":
            safety, helpful = (self._model(path) for path in (reward.safety, reward.path))
            return lambda answers: gated(
                safety(answers),
                helpful(answers),
                torch.tensor([bool(answer.record.get("safety")) for answer in answers]),
                reward.threshold,
            )
        if reward.name not in RULES and Path(reward.name).exists():
            return self._model(reward.name)
        one = rule(reward)

        def each(answers: Sequence[Answer]) -> Tensor:
            found = (one(answer) for answer in answers)
            return torch.tensor([math.nan if value is None else float(value) for value in found])

        return each

    def _model(self, path: str) -> Callable[[Sequence[Answer]], Tensor]:
        """Scores by the reward model of a folder, read once."""
        if path not in self.models:
            own = Tokenizer.load(open_model(path).tokenizer_path())
            if own.fingerprint != self.tokenizer.fingerprint:
                what, fix = "the reward model has another tokenizer", "train it from the same model as the policy"
                raise InputError(what, where=path, found=own.fingerprint[:16], fix=fix)
            self.models[path] = open_scores(path, torch.float32, self.device)
        return lambda answers: self._scores(self.models[path], answers)

    def _scores(self, model: nn.Module, answers: Sequence[Answer]) -> Tensor:
        """Reward at the last token of prompt and answer, which is the end token, as in training."""
        assert isinstance(model, Decoder)
        texts = [[*answer.prompt_ids, *self._without_end(answer), self.end_id] for answer in answers]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = torch.empty(len(texts))
        with evaluating(model):
            for start in range(0, len(order), ROWS):
                rows = order[start : start + ROWS]
                tokens = pad_sequence([torch.tensor(texts[i]) for i in rows], batch_first=True).to(model.device)
                lengths = torch.tensor([len(texts[i]) for i in rows], device=model.device)
                found[rows] = last(scores(model, tokens), lengths).float().cpu()
        return found

    def _without_end(self, answer: Answer) -> Sequence[int]:
        """Ids of an answer without the token that ended it: a chat model may end its turn with EOS, too."""
        ends = {self.end_id} | (self.tokenizer.special_ids if answer.ended else frozenset())
        return answer.ids[:-1] if answer.ids and answer.ids[-1] in ends else answer.ids


def answer_of(prompt: Prompt, request: Request, tokenizer: Tokenizer, lead: str = "") -> Answer:
    """Answer that a request gave to a prompt, without what the template writes in front of it, `lead`."""
    ended = request.finish_reason == "eos"
    text = tokenizer.decode(request.tokens[: len(request.tokens) - ended]).removeprefix(lead)
    return Answer(prompt.text, request.tokens, text, prompt.record, prompt.ids, ended)


def gated(safety: Tensor, helpful: Tensor, is_safety: Tensor, threshold: float) -> Tensor:
    """LLaMA 2's reward: whitened logits of the safety score where it counts, else of the helpfulness score.

    R_c = R_s for a safety prompt or where R_s < threshold, else R_h; whiten(logit(R_c)) with R = sigmoid(score), whose
    logit the score is; population variance (arXiv 2307.09288, §3.2.3).

    Args:
        safety: (N,) scores.
        helpful: (N,) scores.
        is_safety: (N,) whether the prompt is of the safety set.
        threshold: probability of being safe below which the safety score counts.
    """
    chosen = torch.where(is_safety | (safety.sigmoid() < threshold), safety, helpful)
    return (chosen - chosen.mean()) / (chosen.var(correction=0) + 1e-8).sqrt()


def pass_at_k(count: int, right: int, k: int) -> float:
    """Probability that one of k answers is right, unbiased: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, §2.1).

    Args:
        count: n, answers that were drawn, at least k.
        right: c, right ones among them.
        k: of how many one should be right.
    """
    return 1 - math.comb(count - right, k) / math.comb(count, k)
