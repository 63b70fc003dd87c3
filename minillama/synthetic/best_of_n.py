"""Rejection sampling: the best of K answers to each prompt, of this round and those before, for fine-tuning."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from minillama.config.loader import to_dict
from minillama.data.permutation import derive_keys
from minillama.data.prompts import Prompt
from minillama.data.reading import read_records
from minillama.data.sources import valid
from minillama.errors import InputError
from minillama.evaluate.rewards import Rewards, answer_of
from minillama.evaluate.rules import RULES, Answer, Reward
from minillama.files import append_lines, complete_lines, stamp
from minillama.inference.rollout import answers
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.synthetic.hindsight import turns

Line = Mapping[str, Any]


@dataclass(frozen=True)
class BestOfN:
    """Rejection sampling (LLaMA 2, arXiv 2307.09288, §3.2.3).

    Args:
        model: that answers.
        rewards: that choose.
        samples: K, answers per prompt.
        max_new_tokens: tokens per answer at most.
        sampling: sampling settings; the answers to a prompt depend on its text and the seed alone.
        stop_ids: tokens that end an answer.
        lead: what the template writes in front of an answer, and the model generates, see `ChatPrompts`.
        batch: prompts that are answered at once.
        model_files: digests by which the model, its tokenizer and its template are known again.
    """

    model: Decoder
    rewards: Rewards
    samples: int
    max_new_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    lead: str = ""
    batch: int = 8
    model_files: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """By which answers are drawn and chosen, the same for all lines of a file."""
        drawn = {"temperature": self.sampling.temperature, "seed": self.sampling.seed, **self.model_files}
        return {"samples": self.samples, "max_new_tokens": self.max_new_tokens, **drawn, "rewards": self._rewards}

    @cached_property
    def _rewards(self) -> list[dict[str, Any]]:
        """Settings of the rewards that are not the default, and a digest of the files that they read."""
        found, default = [], to_dict(Reward())
        for reward in self.rewards.settings:
            own = {key: value for key, value in to_dict(reward).items() if key == "name" or value != default[key]}
            files = [Path(word) for word in (reward.name, reward.name.rpartition(":")[0], reward.path, reward.safety)]
            read = [file for file in files if file.name and file.exists()]
            found.append(own | ({"files": stamp(read)} if read and reward.name not in RULES else {}))
        return json.loads(json.dumps(found))

    def write(self, prompts: Sequence[Prompt], path: Path, earlier: Sequence[Path] = ()) -> Iterator[Line]:
        """Append the best answer to each prompt to a file, but for those that it has already.

        Args:
            prompts: in order.
            path: JSONL of conversations, `messages` with `reward`, `rewards`, `ended`, `round`, `key` and `settings`.
            earlier: files of earlier rounds, whose answers are scored anew and compared.

        Yields:
            The lines that are written; none for a prompt of whose answers none can be scored.

        Raises:
            InputError: a file that cannot be read or written, with other lines, or of other settings.
        """
        before = [line for file in earlier for line in read_lines(file)]
        known = {key: [line for line in before if line["key"] == key] for key in {line["key"] for line in before}}
        number = 1 + max((line["round"] for line in before), default=0)
        complete_lines(path)  # without one that a stopped run left incomplete
        begun = read_lines(path) if path.exists() else []
        for line in begun[:1]:
            if line.get("settings", self.settings) != self.settings:
                found, fix = json.dumps(line["settings"]), "write another file, or go on with the settings of this one"
                what, expected = "this file was written with other settings", json.dumps(self.settings)
                raise InputError(what, where=path, found=found, expected=expected, fix=fix)
        done = {line["key"] for line in begun}
        left = [prompt for key, prompt in {key_of(prompt): prompt for prompt in prompts}.items() if key not in done]
        for start in range(0, len(left), self.batch):
            part = left[start : start + self.batch]
            lines = [line for line in self._best(part, known, number) if line]
            append_lines(path, lines)
            yield from lines

    def _best(self, prompts: Sequence[Prompt], known: Mapping[str, Sequence[Line]], number: int) -> Iterator[Line]:
        seeds = [derive_keys("best-of-n", self.sampling.seed, number, key_of(prompt))[0] >> 8 for prompt in prompts]
        ids, tokenizer = [prompt.ids for prompt in prompts], self.rewards.tokenizer
        sampling = (self.samples, self.max_new_tokens, self.sampling, self.stop_ids, seeds)
        requests = answers(self.model, ids, *sampling)
        candidates: list[tuple[Answer, int]] = []
        groups: list[tuple[Prompt, int, int]] = []
        for i, prompt in enumerate(prompts):
            begun, own = len(candidates), requests[i * self.samples : (i + 1) * self.samples]
            candidates += [(answer_of(prompt, request, tokenizer, self.lead), number) for request in own]
            for line in known.get(key_of(prompt), ()):
                text = line["messages"][-1]["content"]
                written = [*tokenizer.encode_inside(self.lead + text), *[self.rewards.end_id] * line["ended"]]
                old = Answer(prompt.text, written, text, prompt.record, prompt.ids, line["ended"])
                candidates.append((old, line["round"]))
            groups.append((prompt, begun, len(candidates)))
        scored = self.rewards([answer for answer, _ in candidates])
        totals = scored.total.tolist()
        for prompt, begun, end in groups:
            found = [i for i in range(begun, end) if not math.isnan(totals[i])]
            if not found:
                continue
            best = max(found, key=lambda i: totals[i])  # the first of equals
            answer, of = candidates[best]
            yield {
                "messages": [*turns(prompt.conversation), {"role": "assistant", "content": answer.text}],
                "reward": totals[best],
                "rewards": {name: part[best].item() for name, part in scored.parts.items()},
                "ended": answer.ended,
                "mean_reward": sum(totals[i] for i in found) / len(found),
                "round": of,
                "key": key_of(prompt),
                "settings": self.settings,
            }


def key_of(prompt: Prompt) -> str:
    """Name of a prompt in all rounds, by its text."""
    return sha256(prompt.text.encode()).hexdigest()[:16]


def kl_bound(samples: int) -> float:
    """Upper bound ln K - (K - 1) / K, in nats, on the KL of the best of K answers to the model (arXiv 2401.01879)."""
    return math.log(samples) - (samples - 1) / samples


def read_lines(path: Path) -> list[Line]:
    """Lines of a round.

    Raises:
        InputError: no such file, or a line of something else.
    """
    found: list[Line] = []
    for record in valid(read_records(path)):
        line = record.value
        try:
            assert isinstance(line["key"], str) and isinstance(line["round"], int) and "ended" in line
            assert isinstance(line["messages"][-1]["content"], str)
        except (KeyError, IndexError, TypeError, AssertionError):
            shown, expected = ", ".join(line), "a line that best-of-n wrote, with messages, round and key"
            what = "not a line of an earlier round"
            raise InputError(what, where=record.where, found=shown, expected=expected) from None
        found.append(line)
    return found
