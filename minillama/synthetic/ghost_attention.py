"""Ghost attention: dialogues in which a system instruction still counts after several turns."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from minillama.data.permutation import derive_keys
from minillama.inference.remote import Teacher
from minillama.inference.sampling import Sampling
from minillama.synthetic.self_instruct import is_cut
from minillama.synthetic.wording import Language, wording
from minillama.synthetic.writer import CUT, Made


@dataclass(frozen=True)
class GhostAttention:
    """GAtt (LLaMA 2, arXiv 2307.09288, §3.3).

    The teacher reads the instruction in every question and answers turn by turn. The dialogue that is written has it
    once, as the system message, and weight 0 on all answers but the last.

    Args:
        instructions: one is drawn for each dialogue; without any a role and a style of the package's, joined.
        sampling: of the answers.
        language: of the package's instructions.
        max_new_tokens: per answer at most.
    """

    teacher: Teacher
    instructions: Sequence[str]
    sampling: Sampling
    language: Language = "en"
    max_new_tokens: int = 256

    def write(self, dialogues: Sequence[Sequence[str]], first: int) -> Made:
        """Conversations of the questions of dialogues, the first of which has a number."""
        drawn = [self._instruction(first + i) for i in range(len(dialogues))]
        talks: list[list[dict[str, Any]]] = [[] for _ in dialogues]
        cuts = [False] * len(dialogues)  # of the last answers, which are trained
        for turn in range(max(map(len, dialogues), default=0)):
            for talk, questions, instruction in zip(talks, dialogues, drawn, strict=True):
                if turn < len(questions):
                    talk.append({"role": "user", "content": f"{questions[turn]}\n\n{instruction}"})
            base = derive_keys("ghost-attention", self.sampling.seed, turn)[0] >> 34
            is_open = [turn < len(questions) for questions in dialogues]
            for asks, group in groupby(range(len(talks)), key=is_open.__getitem__):
                if asks:
                    rows = list(group)
                    sampling = replace(self.sampling, seed=base + first + rows[0])
                    replies = self.teacher([talks[i] for i in rows], self.max_new_tokens, sampling)
                    for i, reply in zip(rows, replies, strict=True):
                        talks[i].append({"role": "assistant", "content": reply.text.strip()})
                        cuts[i] = is_cut(reply)
        lines, left_out = [], Counter[str]()
        for talk, questions, instruction, cut in zip(talks, dialogues, drawn, cuts, strict=True):
            answers = [message["content"] for message in talk[1::2]]
            if not all(answers):
                left_out["with an empty answer"] += 1
                continue
            messages: list[dict[str, Any]] = [{"role": "system", "content": instruction}]
            for number, (question, answer) in enumerate(zip(questions, answers, strict=True), 1):
                weight = 1 if number == len(questions) else 0
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer, "weight": weight})
            lines.append({"messages": messages})
            left_out[CUT] += cut
        return lines, left_out

    def _instruction(self, unit: int) -> str:
        chance = random.Random(derive_keys("ghost-attention", self.sampling.seed, "instruction", unit)[0])
        if self.instructions:
            return chance.choice(self.instructions)
        words = wording(self.language)
        parts = [chance.choice(words["persona"]).format(who=chance.choice(words["who"])), chance.choice(words["style"])]
        return " ".join(parts) if self.language == "en" else "".join(parts)
