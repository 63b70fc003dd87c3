"""Constitutional feedback: answers revised after a critique by principles, and preference pairs that a model judges."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from minillama.data.permutation import derive_keys
from minillama.inference.generate import Completion
from minillama.inference.remote import Teacher
from minillama.inference.sampling import Sampling
from minillama.synthetic.self_instruct import is_cut
from minillama.synthetic.writer import CUT, Made

Turns = list[dict[str, Any]]


@dataclass(frozen=True)
class Constitutional:
    """Constitutional AI (Bai et al. 2022, arXiv 2212.08073).

    §3: an answer, its critique by a principle that is drawn, a revision, and so on from the revision. §4 (RLAIF): of
    two answers a model says with p = P(A) / (P(A) + P(B)) which one follows a principle better; p is the mean over both
    orders, so that position bias cancels.

    Args:
        teacher: that answers, criticizes, revises and judges.
        principles: with `critique`, `revision` and `judge`.
        judge: prompt with {principle}, {question}, {a} and {b}, which asks for A or B.
        sampling: of all that is written.
        rounds: critiques and revisions per answer.
        max_new_tokens: per reply at most.
        certain: least probability of the chosen answer; pairs below are left out.
    """

    teacher: Teacher
    principles: Sequence[Mapping[str, str]]
    judge: str
    sampling: Sampling
    rounds: int = 2
    max_new_tokens: int = 512
    certain: float = 0.5

    def revise(self, questions: Sequence[Turns], first: int) -> Made:
        """Conversations with the last revision, each with its `answer` at first and its `rounds`.

        Args:
            questions: messages, the last of the user.
            first: number of the first.
        """
        left_out: Counter[str] = Counter()
        last = self._write(questions, first, 0)
        answers, rounds = _texts(last), [list[dict[str, str]]() for _ in questions]
        for number in range(self.rounds):
            drawn = [self._principle(first + i, number) for i in range(len(questions))]
            talks = [
                [*question, _said("assistant", answer), _said("user", principle["critique"])]
                for question, answer, principle in zip(questions, _texts(last), drawn, strict=True)
            ]
            critiques = _texts(self._write(talks, first, 2 * number + 1))
            talks = [
                [*talk, _said("assistant", critique), _said("user", principle["revision"])]
                for talk, critique, principle in zip(talks, critiques, drawn, strict=True)
            ]
            last = self._write(talks, first, 2 * number + 2)
            for done, principle, critique, revision in zip(rounds, drawn, critiques, _texts(last), strict=True):
                done.append({"principle": principle["critique"], "critique": critique, "revision": revision})
        lines = []
        for question, answer, done, reply in zip(questions, answers, rounds, last, strict=True):
            final = reply.text.strip()
            if answer and final and all(step["critique"] and step["revision"] for step in done):
                lines.append({"messages": [*question, _said("assistant", final)], "answer": answer, "rounds": done})
                left_out[CUT] += is_cut(reply)
            else:
                left_out["with an empty reply"] += 1
        return lines, left_out

    def compare(self, pairs: Sequence[tuple[Turns, Sequence[str]]], first: int) -> Made:
        """Preferences between two answers each, with the `probability` of the chosen one.

        Args:
            pairs: messages, the last of the user, and two answers; without any the teacher writes them.
            first: number of the first pair.
        """
        left_out: Counter[str] = Counter()
        open_ = [question for question, _ in pairs]
        if not all(answers for _, answers in pairs):
            drawn = list(zip(self._write(open_, first, 0), self._write(open_, first, 1), strict=True))
        both = [tuple(answers) or tuple(_texts(drawn[i])) for i, (_, answers) in enumerate(pairs)]
        cuts = [0 if answers else sum(map(is_cut, drawn[i])) for i, (_, answers) in enumerate(pairs)]
        asked = []
        for i, (question, (one, other)) in enumerate(zip(open_, both, strict=True)):
            principle, text = self._principle(first + i, -1)["judge"], _conversation(question)
            for a, b in ((one, other), (other, one)):
                asked.append([_said("user", self.judge.format(principle=principle, question=text, a=a, b=b))])
        judged = [first_of(*nats) for nats in self.teacher.option_logprobs(asked, ("A", "B"))]
        lines = []
        for question, (one, other), cut, there, back in zip(open_, both, cuts, judged[::2], judged[1::2], strict=True):
            if not one or not other or one == other:
                left_out["without two answers"] += 1
                continue
            if there is None or back is None:
                left_out["not judged"] += 1
                continue
            left_out["judged otherwise in the other order"] += (there > 0.5) != (back < 0.5)
            if max(p := (there + 1 - back) / 2, 1 - p) < self.certain or p == 0.5:
                left_out["undecided"] += 1
            else:
                chosen, rejected = (one, other) if p > 0.5 else (other, one)
                left_out[CUT] += cut
                sides = {"chosen": [_said("assistant", chosen)], "rejected": [_said("assistant", rejected)]}
                lines.append({"prompt": question, **sides, "probability": round(max(p, 1 - p), 6)})
        return lines, left_out

    def _principle(self, unit: int, number: int) -> Mapping[str, str]:
        chance = random.Random(derive_keys("constitutional", self.sampling.seed, unit, number)[0])
        return chance.choice(self.principles)

    def _write(self, talks: Sequence[Turns], first: int, stage: int) -> Sequence[Completion]:
        """Replies; that to a unit has a seed of its own in each stage, whatever the batch."""
        base = derive_keys("constitutional", self.sampling.seed, stage)[0] >> 34
        sampling = replace(self.sampling, seed=base + first)
        return self.teacher(talks, self.max_new_tokens, sampling)


def first_of(a: float, b: float) -> float | None:
    """P(A) / (P(A) + P(B)) of two log-probabilities; None where both are unknown."""
    if max(a, b) == -math.inf:
        return None
    return math.exp(a - max(a, b)) / (math.exp(a - max(a, b)) + math.exp(b - max(a, b)))


def _texts(replies: Sequence[Completion]) -> list[str]:
    return [reply.text.strip() for reply in replies]


def _conversation(messages: Turns) -> str:
    """A question, or the whole of a conversation that ends with one."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
