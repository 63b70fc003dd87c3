"""Proximal policy optimization with a value model: InstructGPT's, with its pretraining mix and average of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minillama.data.corpus import Corpus
from minillama.errors import InputError
from minillama.evaluate.rewards import check_context, check_tokenizer
from minillama.layers.cross_entropy import linear_log_probabilities
from minillama.model import Decoder
from minillama.model.heads import open_scores, scores, with_score
from minillama.model.linears import linears, refill
from minillama.model.lora import adapter_names, lora_parameters
from minillama.runs.feedback import PPOConfig
from minillama.training.model_folder import ModelFolder
from minillama.training.objectives.advantages import adapted_beta, averaging, gae, token_rewards, value_loss, whiten
from minillama.training.objectives.base import MODEL, Batch, Metrics
from minillama.training.objectives.grpo import policy_terms, policy_totals
from minillama.training.objectives.rollouts import Feedback, trimmed
from minillama.training.ranks import Ranks
from minillama.training.sharded import fill, gathered, is_sharded
from minillama.training.whole_weights import whole_weights

VALUE = "value"
FLAT = 1e-8  # variance of returns in which there is nothing to explain


@dataclass(eq=False)
class PPO(Feedback):
    """Clipped policy and value losses over GAE of token rewards; arXiv 1707.06347, 1909.08593, 2203.02155 (appendix C).

    loss = mean_t [max(-A r_t, -A clip(r_t)) + w_V value_loss_t] + gamma mean over text of -log p(token).

    Args:
        text: pretraining text, mixed in: a row of `context` tokens per answer.
        context: T of these.
    """

    settings: PPOConfig
    text: Corpus | None = None
    context: int = 0

    def __post_init__(self, decoder: Decoder) -> None:
        super().__post_init__(decoder)
        self.beta = torch.tensor(self.settings.beta)
        self.models = {**self.models, VALUE: self._critic(decoder)}
        self.rates = {VALUE: self.settings.critic_rate}
        average = self._averaged(decoder) if self.settings.average_decay else {}
        self.average = {name: weight.detach().float().clone() for name, weight in average.items()}

    def _critic(self, decoder: Decoder) -> nn.Module:
        settings, generator = self.settings, torch.Generator().manual_seed(self.seed)
        if settings.critic == "shared":
            head = nn.Linear(decoder.config.dim, 1, bias=False, device=decoder.device)
            nn.init.zeros_(head.weight)
            return head
        if settings.critic_from:
            check_tokenizer(settings.critic_from, self.rewards.tokenizer)
            made = open_scores(settings.critic_from, torch.float32, decoder.device)
            prompts = (*self.data.train, *self.data.val)
            check_context({settings.critic_from: made}, prompts, settings.max_new_tokens, end=0)
        else:
            made = with_score(_plain(decoder), generator)
        return made.float().requires_grad_(True).train()

    def values(self, batch: Batch) -> Tensor:
        """Values (B, T) of the states in which the targets were chosen, by a critic of its own."""
        model = self.models[VALUE]
        assert isinstance(model, Decoder)
        return scores(model, batch.tokens)

    def both(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities, entropies and values (B, T); of a shared backbone in one pass."""
        if self.settings.critic == "own":
            return *self.log_probabilities(self.model, batch), self.values(batch)
        model, chosen = self.model, batch.extras["mask"]
        hidden = model.hidden(batch.tokens)[chosen]
        scaled = hidden * (model.config.logit_scale / self.settings.temperature)
        found = linear_log_probabilities(scaled, model.output_weight, batch.targets[chosen], model.loss_kernel)
        values = self.models[VALUE](hidden)[:, 0].float()
        empty = torch.zeros(chosen.shape, device=chosen.device)
        log_probs, entropies, spread = (empty.masked_scatter(chosen, part) for part in (*found, values))
        return log_probs, entropies, spread

    def read(self, batch: Batch) -> Mapping[str, Tensor]:
        log_probs, _, values = self.both(batch)
        return {"old": log_probs, "values": values}

    def judge(self, scores: Tensor) -> Metrics:
        """Whitened advantages and returns; an adaptive KL coefficient changes for the next rollout."""
        settings, buffer = self.settings, self.buffer
        mask, beta = buffer["mask"], self.beta.item()
        kl = buffer["old"] - buffer["reference"] if self.reference else torch.zeros(mask.shape)
        rewards = token_rewards(kl, scores, mask, beta if settings.kl == "k1" else 0.0)
        advantages, buffer["returns"] = gae(rewards, buffer["values"], mask, settings.gamma, settings.lam)
        buffer["advantages"] = whiten(advantages, mask)
        if settings.kl_target:
            how = settings.kl_target, settings.kl_horizon, len(mask)
            self.beta = torch.tensor(adapted_beta(beta, self._kl()["kl"], *how))
        measures, returns = {"beta": beta} if self.reference else {}, buffer["returns"][mask]
        if len(returns) > 1 and (spread := returns.var().item()) > FLAT:
            measures["value_explained"] = 1 - advantages[mask].var().item() / spread
        return measures

    def _averaged(self, model: Decoder) -> Mapping[str, Tensor]:
        return lora_parameters(model) if adapter_names(model) else model.state_dict()

    def updated(self, masters: Mapping[str, nn.Module]) -> None:
        """Average decay x average + (1 - decay) x weights, of the float32 weights after the update."""
        model, weights = masters[MODEL], dict[str, Tensor]()
        if self.average:
            assert isinstance(model, Decoder)
            weights = dict(self._averaged(model))
        for name, average in self.average.items():
            weight = weights[name].detach().float()
            if is_sharded(weight) and not is_sharded(average):  # from before the model was divided
                average, before = torch.empty_like(weight), average
                fill(average, before)
            elif average.device != weight.device:  # of a checkpoint
                average = average.to(weight.device)
            self.average[name] = average
            average.lerp_(weight, 1 - self.settings.average_decay)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The minibatch, and a row of text per answer."""
        whole = super().batch(step)
        if self.text is not None:
            rows = self.text.batch(self.seed, step, self.batch_size, self.context, 0, self.batch_size)
            whole = replace(
                whole,
                extras=whole.extras | {"text": torch.from_numpy(rows)},
                totals={**whole.totals, "text": float(self.batch_size * self.context)},
            )
        return whole.share(rank, world)

    def weighted(self, batch: Batch) -> Batch:
        mask = batch.extras["mask"]
        weights, total = averaging(mask, "tokens", 0)
        return replace(batch, weights=weights, totals={**policy_totals(mask, total), "value": total})

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Sums over the answers' tokens, and over those of the text."""
        text = batch.extras.get("text")
        extras = {name: part for name, part in batch.extras.items() if name != "text"}
        batch = trimmed(replace(batch, extras=extras), self.model)
        parts, (log_probs, entropies, values) = batch.extras, self.both(batch)
        terms, metrics = policy_terms(self.settings, batch, log_probs, entropies)
        losses = value_loss(values, parts["values"], parts["returns"], self.settings.value_clip)
        terms["value"] = self.settings.value_weight * (losses * batch.weights).sum()
        if text is not None:
            terms["text"] = self.settings.text_weight * self.model.loss(self.model.hidden(text[:, :-1]), text[:, 1:])
        return terms, metrics

    def folders(self, masters: Mapping[str, nn.Module], saved: ModelFolder) -> Mapping[str, Callable[[Path], object]]:
        """The value model, with `score.weight`, and the average of the weights."""
        critic, leads, found = masters[VALUE], Ranks.current().leads, dict[str, Callable[[Path], object]]()
        if isinstance(critic, Decoder):
            shape, values = critic, gathered(critic.state_dict(), leads)

            def write(path: Path) -> None:
                with torch.device("meta"):
                    made = Decoder(shape.config)
                made.load_state_dict(values, assign=True)
                made.stop_ids, made.sampling = shape.stop_ids, shape.sampling
                made.save_pretrained(path)
                saved.tokenizer.save(path)

            found["value"] = write
        if self.average:
            average = gathered(self.average, leads)
            found["average"] = lambda path: saved.write(path, average)
        return found

    def state_dict(self) -> dict[str, Tensor]:
        average = {f"average/{name}": weight for name, weight in self.average.items()}
        return {**super().state_dict(), "beta": self.beta, **average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average = {n.removeprefix("average/"): w for n, w in state.items() if n.startswith("average/")}
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("average/")}
        self.beta = rest.pop("beta")
        super().load_state_dict(rest)


def _plain(policy: Decoder) -> Decoder:
    """Copy of a policy, its active adapter merged: a critic trains all of its weights.

    Raises:
        InputError: quantized layers, which cannot be trained.
    """
    if not all(isinstance(layer, nn.Linear) for layer in linears(policy).values()):
        what, fix = "a value model of its own cannot start from quantized weights", "--objective.critic shared"
        raise InputError(what, where="objective.critic", found="own", expected="shared, or critic_from", fix=fix)
    made = Decoder(policy.config).to(policy.device, policy.dtype)
    refill(made, whole_weights(policy))
    made.stop_ids, made.sampling = policy.stop_ids, policy.sampling
    return made
