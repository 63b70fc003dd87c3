"""Rewards of answers: rules, functions and reward models, weighted, each known by itself (Ziya's RBRS)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from minillama.data.prompts import Prompt
from minillama.errors import InputError
from minillama.evaluate.rules import RULES, Answer, Reward, rule
from minillama.formats.open import open_model
from minillama.formats.peft_config import CONFIG
from minillama.inference.engine import evaluating
from minillama.inference.request import Request
from minillama.model import Decoder
from minillama.model.heads import last, open_scores, scores
from minillama.tokenizer import Tokenizer

LLAMA_2 = "llama-2"
ROWS = 16  # texts per pass of a reward model


@dataclass(frozen=True)
class Scored:
    """Rewards of N answers; NaN for one that some reward cannot score.

    Args:
        total: (N,) weighted sums, which compare over batches.
        parts: (N,) by the rewards' names, without their weights.
        trained: (N,) as `total`, with LLaMA 2's reward whitened over the batch; the total unless given.
    """

    total: Tensor
    parts: dict[str, Tensor]
    trained: Tensor | None = None

    @property
    def signal(self) -> Tensor:
        """(N,) what a policy is trained on."""
        return self.total if self.trained is None else self.trained


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
        parts: dict[str, Tensor] = {}
        total = trained = torch.zeros(len(answers))
        for reward in self.settings:
            found = self._parts[reward.title](answers)
            parts |= {reward.title + name: values for name, values in found.items()}
            if reward.weight:  # else what it cannot score would count
                total = total + reward.weight * found[""]
                trained = trained + reward.weight * (whitened(found[""]) if reward.name == LLAMA_2 else found[""])
        return Scored(total, parts, trained)

    def _part(self, reward: Reward) -> Callable[[Sequence[Answer]], dict[str, Tensor]]:
        """Reward, and what it is made of, by the end of their names."""
        if reward.name == LLAMA_2:
            safety, helpful = (self._model(path) for path in (reward.safety, reward.path))

            def both(answers: Sequence[Answer]) -> dict[str, Tensor]:
                tagged = torch.tensor([bool(answer.record.get("safety")) for answer in answers])
                safe, helped = safety(answers), helpful(answers)
                whole = gated(safe, helped, tagged, reward.threshold)
                return {"": whole, "_safety": safe, "_helpfulness": helped}

            return both
        if reward.name not in RULES and Path(reward.name).exists():
            model = self._model(reward.name)
            return lambda answers: {"": model(answers)}
        one = rule(reward)

        def each(answers: Sequence[Answer]) -> dict[str, Tensor]:
            found = (one(answer) for answer in answers)
            return {"": torch.tensor([math.nan if value is None else float(value) for value in found])}

        return each

    def _model(self, path: str) -> Callable[[Sequence[Answer]], Tensor]:
        """Scores by the reward model of a folder, read once."""
        if path not in self.models:
            check_tokenizer(path, self.tokenizer)
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


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Refuse a reward or value model that reads other ids than the policy.

    Raises:
        InputError: another tokenizer.
    """
    is_adapter = (Path(path) / CONFIG).exists()
    own = Tokenizer.load(path if is_adapter else open_model(path).tokenizer_path())
    if own.fingerprint != tokenizer.fingerprint:
        what, fix = "the reward model has another tokenizer", "train it from the same model as the policy"
        raise InputError(what, where=path, found=own.fingerprint[:16], fix=fix)


def check_context(
    models: Mapping[str, nn.Module], prompts: Sequence[Prompt], max_new_tokens: int, end: int = 1
) -> None:
    """Refuse reward or value models whose context is shorter than a prompt and its answer may be.

    Args:
        models: by folder.
        prompts: all that may be asked.
        max_new_tokens: tokens per answer at most.
        end: tokens behind it: the end token, put behind an answer that was cut off.

    Raises:
        InputError: such a model.
    """
    longest = max(len(prompt.ids) for prompt in prompts)
    for name, model in models.items():
        assert isinstance(model, Decoder)
        if model.config.max_seq_len < longest + max_new_tokens + end:
            raise InputError(
                "the context of this model is shorter than a prompt and its answer may be",
                where=name,
                found=f"max_seq_len {model.config.max_seq_len}",
                expected=f"{longest} + {max_new_tokens}{f' + {end}' * (end > 0)} tokens: prompt, answer, end token",
                fix="lower max_new_tokens or the context of the prompts, or take a model of a longer context",
            )


def answer_of(prompt: Prompt, request: Request, tokenizer: Tokenizer, lead: str = "") -> Answer:
    """Answer that a request gave to a prompt, without what the template writes in front of it, `lead`."""
    ended = request.finish_reason == "eos"
    text = tokenizer.decode(request.tokens[: len(request.tokens) - ended]).removeprefix(lead)
    return Answer(prompt.text, request.tokens, text, prompt.record, prompt.ids, ended, prompt.where)


def gated(safety: Tensor, helpful: Tensor, is_safety: Tensor, threshold: float) -> Tensor:
    """LLaMA 2's reward: logit of the safety score where it counts, else of the helpfulness score.

    R_c = R_s for a safety prompt or where R_s < threshold, else R_h, with R = sigmoid(score), whose logit the score is
    (arXiv 2307.09288, §3.2.3). A policy is trained on it `whitened`.

    Args:
        safety: (N,) scores.
        helpful: (N,) scores.
        is_safety: (N,) whether the prompt is of the safety set.
        threshold: probability of being safe below which the safety score counts.
    """
    return torch.where(is_safety | (safety.sigmoid() < threshold), safety, helpful)


def whitened(scores: Tensor) -> Tensor:
    """Scores (N,) of mean 0 and population variance 1, as LLaMA 2's reward is trained on."""
    return (scores - scores.mean()) / (scores.var(correction=0) + 1e-8).sqrt()


def pass_at_k(count: int, right: int, k: int) -> float:
    """Probability that one of k answers is right, unbiased: 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, §2.1).

    Args:
        count: n, answers that were drawn, at least k.
        right: c, right ones among them.
        k: of how many one should be right.
    """
    return 1 - math.comb(count - right, k) / math.comb(count, k)
