"""Rejection sampling: write the best of K answers to each prompt, for fine-tuning."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import tyro

from minillama.config.loader import check
from minillama.data.sources import Source
from minillama.inference.load import ModelArgs


@dataclass(frozen=True)
class BestOfN(ModelArgs):
    """Write the best of K answers of a model, of this round and earlier ones, as conversations for `train.py sft`.

    All prompts are answered: fine-tuning on the file holds the same questions out. A file that is there is continued.
    """

    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")] = "python-qa"
    """Prompts: conversations, of which the last answer is written anew, or records with a prompt alone."""
    out: Annotated[str, tyro.conf.arg(metavar="FILE.jsonl")] = "best.jsonl"
    """The file."""
    rewards: tuple[str, ...] = ("verified",)
    """NAME or WEIGHT*NAME, as in objective.rewards: rules, reward models' folders, MODULE:NAME; or FILE.toml with
    tables [[objective.rewards]], such as a run's config.toml, for rewards with settings."""
    samples: int = field(default=16, metadata={"min": 1})
    """Answers per prompt, K."""
    earlier: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE.jsonl")] = ()
    """Files of earlier rounds, whose answers are scored anew and compared."""
    max_new_tokens: int = field(default=128, metadata={"min": 1})
    """Tokens per answer at most."""
    temperature: float = field(default=1.0, metadata={"min": 0})
    """Sampling temperature."""
    template: str = ""
    """Chat template; the tokenizer's own unless given."""
    limit: int = field(default=0, metadata={"min": 0})
    """Number of prompts; 0: all."""
    val_fraction: float = field(default=0.0, metadata={"min": 0, "below": 1})
    """Share of prompts that are left out, those that training with this data.val_fraction holds out."""
    seed: int = 1
    """Random seed."""

    def run(self) -> int:
        """Write."""
        from minillama.data.prompts import Prompts, longest_prompt
        from minillama.evaluate.rewards import Rewards, check_context
        from minillama.evaluate.rules import read_rewards
        from minillama.inference.chat import ChatPrompts
        from minillama.inference.generate import end_ids
        from minillama.inference.sampling import Sampling
        from minillama.synthetic import best_of_n

        check(self)
        model, tokenizer = self.load()
        longest = longest_prompt(model.config.max_seq_len, self.max_new_tokens)
        chat = ChatPrompts(tokenizer, self.template)
        data = Prompts.load([Source(self.source)], chat.template, tokenizer, longest, self.val_fraction)
        rewards = Rewards(read_rewards(self.rewards), tokenizer, data.end_id, model.device)
        check_context(rewards.models, (*data.train, *data.val), self.max_new_tokens)
        stop_ids = end_ids(model, tokenizer) | {data.end_id}
        sampling = Sampling(self.temperature, seed=self.seed)
        how = self.samples, self.max_new_tokens, sampling, stop_ids, chat.lead
        template = sha256(chat.template.source.encode()).hexdigest()[:16]
        files = {"files": self.files, "template": template, "dtype": self.dtype}
        task = best_of_n.BestOfN(model, rewards, *how, model_files=files)
        prompts, path = data.train[: self.limit or None], Path(self.out)
        lines: list[Mapping[str, Any]] = []
        for line in task.write(prompts, path, list(map(Path, self.earlier))):
            lines.append(line)
            if len(lines) % 50 == 0:
                print(f"{len(lines)} of {len(prompts)}: {_summary(lines)}", file=sys.stderr)
        print(f"{path}: {len(lines)} answers; {_summary(lines)}" if lines else f"{path} is complete", file=sys.stderr)
        return 0


def _summary(lines: Sequence[Mapping[str, Any]]) -> str:
    best, mean = (sum(line[key] for line in lines) / len(lines) for key in ("reward", "mean_reward"))
    return f"mean reward {mean:.3f}, of the best {best:.3f}"
