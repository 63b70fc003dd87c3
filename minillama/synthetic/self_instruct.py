"""Self-instruct: new instructions, inputs and outputs from a few human ones, by a teacher model."""

from __future__ import annotations

import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from minillama.data.conversations import conversations
from minillama.data.permutation import derive_keys
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.evaluate.rouge import Similar, rouge_tokens
from minillama.inference.generate import Completion
from minillama.inference.remote import Teacher
from minillama.inference.sampling import Sampling
from minillama.synthetic.wording import Language, wording
from minillama.synthetic.writer import Generated, summary

Method = Literal["alpaca", "steps"]
_BARREN = 30  # rounds without a new instruction, after which it stops
_SHOWN, _LISTED = 8, 16  # instructions of a list of the four steps


class Task(NamedTuple):
    """Instruction, the input that it applies to, and an output."""

    instruction: str
    input: str
    output: str


Found = Iterator[tuple[Task, dict[str, Any]]]


def read_seeds(file: str) -> list[Task]:
    """First exchange of each instruction of a file of conversations, Self-Instruct's tasks among them.

    Raises:
        InputError: not such a file, or fewer than ten instructions.
    """
    found: dict[str, Task] = {}
    for conversation in conversations(Source(file)):
        asked = next((message for message in conversation.messages if message.role == "user"), None)
        answer = next(message.content for message in conversation.messages if message.is_answer)
        if asked is not None:
            found.setdefault(asked.content, Task(asked.content.strip(), asked.input.strip(), answer.strip()))
    if len(found) < 10:
        raise InputError("too few seed tasks", where=file, found=len(found), expected="10 or more")
    return list(found.values())


@dataclass
class SelfInstruct:
    """Self-instruct (Wang et al. 2023, arXiv 2212.10560), as it is there or in Alpaca's form.

    alpaca: a request shows 3 seed tasks and asks for a list of 20 with inputs and outputs. steps: instructions from 6
    seed tasks and 2 new ones; whether they classify; instances, for classification labels first; filters.

    Args:
        teacher: that writes.
        seeds: human tasks.
        count: new instructions.
        sampling: for lists; what the four steps ask about one instruction is greedy.
        method: as above.
        language: of prompts and filters.
        requests: per round, asked at once; their replies are filtered one after the other.
        listed: tasks per list of Alpaca's form, the shown ones among them.
        max_new_tokens: per reply at most; 300 for the instances of the four steps.
        similarity: ROUGE-L with a seed or kept instruction, above which one is left out.
        chat: whether prompts are questions for a chat template; otherwise texts to be continued.
    """

    teacher: Teacher
    seeds: Sequence[Task]
    count: int
    sampling: Sampling
    method: Method = "alpaca"
    language: Language = "en"
    requests: int = 4
    listed: int = 20
    max_new_tokens: int = 2048
    similarity: float = 0.7
    chat: bool = False
    pool: Similar = field(default_factory=Similar, init=False)
    kept: list[str] = field(default_factory=list, init=False)

    def write(self, out: Generated) -> None:
        """Append rounds until there are enough instructions.

        Raises:
            InputError: the teacher writes nothing that is kept.
        """
        self.kept += [line["instruction"] for line in out.lines()]
        for instruction in (*(seed.instruction for seed in self.seeds), *self.kept):
            self.pool.add(instruction)
        before, barren = len(self.kept), 0
        while len(self.kept) < self.count and barren < _BARREN:
            left_out: Counter[str] = Counter()
            lines, more = list(self._round(out.done, left_out)), self.count - len(self.kept)
            left_out["more than asked for"] += len(lines[more:])
            lines = lines[:more]
            out.commit(lines, out.done + 1, left_out)
            self.kept += [line["instruction"] for line in lines]
            barren = 0 if lines else barren + 1
            out.say(len(self.kept), self.count, before)
        if len(self.kept) < self.count:
            what = f"{_BARREN} rounds without a new instruction"
            fix = "give another teacher, another --method, more seeds"
            raise InputError(what, where=out.path, found=summary(out.counts), fix=fix)

    def _round(self, number: int, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
        seeds = [derive_keys("self-instruct", self.sampling.seed, number, i)[0] for i in range(self.requests)]
        make = self._alpaca if self.method == "alpaca" else self._steps
        for task, line in make([*map(random.Random, seeds)], replace(self.sampling, seed=seeds[0] >> 34), left_out):
            reason, similar = self._verdict(task)
            if reason:
                left_out[reason] += 1
                continue
            self.pool.add(task.instruction)
            yield {**line, "most_similar": [[round(score, 4), text] for score, text in similar]}

    def _alpaca(self, chances: Sequence[random.Random], sampling: Sampling, left_out: Counter[str]) -> Found:
        words, shown = wording(self.language), min(3, self.listed - 1)
        asked, given, output = words["labels"]
        heads = []
        for chance in chances:
            head = words["request"].format(count=self.listed)
            for n, task in enumerate(chance.sample(self.seeds, shown), 1):
                head += f"###\n{n}. {asked}: {task.instruction}\n{n}. {given}:\n{task.input or words['none']}\n"
                head += f"{n}. {output}:\n{task.output}\n"
            heads.append(f"{head}###\n{shown + 1}. {asked}:")
        for reply in self.teacher(heads, self.max_new_tokens, sampling, (f"\n{self.listed + 1}.",), self.chat):
            for task in parse_tasks(reply, self.language, left_out):
                yield task, task._asdict()

    def _steps(self, chances: Sequence[random.Random], sampling: Sampling, left_out: Counter[str]) -> Found:
        words, human = wording(self.language), [seed.instruction for seed in self.seeds]
        heads = []
        for chance in chances:
            own = chance.sample(self.kept, min(2, len(self.kept)))
            shown = chance.sample([*chance.sample(human, _SHOWN - len(own)), *own], _SHOWN)
            heads.append(
                words["tasks"] + "".join(f"{n}. {' '.join(t.split())}\n" for n, t in enumerate(shown, 1)) + "9."
            )
        found: list[str] = []
        for reply in self.teacher(heads, self.max_new_tokens, sampling, (f"\n{_LISTED + 1}.",), self.chat):
            for instruction in parse_list(reply, left_out):
                reason = "similar" if instruction in found else self._verdict(Task(instruction, "", "-"))[0]
                if reason:
                    left_out[reason] += 1
                else:
                    found.append(instruction)
        greedy = Sampling(temperature=0)
        asked = [words["classify"].format(task=task) for task in found]
        classes = [reply.text.strip().casefold() for reply in self._ask(asked, 4, greedy, "\n")]
        flags = [text.startswith(words["yes"]) for text in classes]
        asked = [
            words["output_first" if f else "input_first"].format(task=t) for t, f in zip(found, flags, strict=True)
        ]
        replies = self._ask(asked, min(300, self.max_new_tokens), greedy, f"\n{words['task']}")
        for instruction, flag, reply in zip(found, flags, replies, strict=True):
            instances = parse_instances(reply, self.language, flag, left_out)
            if not instances:
                left_out["without an instance"] += 1
                continue
            line = {"instruction": instruction, "instances": instances, "is_classification": flag}
            yield Task(instruction, instances[0]["input"], instances[0]["output"]), line

    def _ask(self, prompts: Sequence[str], count: int, sampling: Sampling, stop: str) -> Sequence[Completion]:
        return self.teacher(prompts, count, sampling, (stop,), self.chat) if prompts else []

    def _verdict(self, task: Task) -> tuple[str | None, list[tuple[float, str]]]:
        """Why a task is left out, or None, and the most similar instruction."""
        reason = unfit(task, self.language)
        similar = self.pool.search(task.instruction) if reason is None else []
        return ("similar" if similar and similar[0][0] > self.similarity else reason), similar


def unfit(task: Task, language: Language) -> str | None:
    """Alpaca's filters of an instruction, in its order: length, unwanted words, programs, the first character.

    Chinese is counted in tokens of ROUGE, that is characters, and begins with one of them or an ASCII letter or digit.
    """
    words, text, first = wording(language), task.instruction, task.instruction[:1]
    length = len(text.split()) if language == "en" else len(rouge_tokens(text))
    if length <= 3 or length > 150:
        return "too short" if length <= 3 else "too long"
    if re.search(words["unwanted"], text, re.I):
        return "unwanted words"
    if re.match(words["program"], text, re.I):
        return "programs"
    if unicodedata.category(first)[0] in "PS":
        return "first character punctuation"
    if not (first.isascii() if language == "en" else rouge_tokens(first)):
        return "first character of another script"
    return None if task.output.strip() else "without an output"


def parse_tasks(reply: Completion, language: Language, left_out: Counter[str]) -> Iterator[Task]:
    """Tasks of a numbered list: each has its three labels, once and in their order, or is counted in `left_out`.

    The first number and label may be missing, as the prompt ends with them; the last task is left out where the reply
    was cut off.
    """
    labels, none = wording(language)["labels"], wording(language)["none"]
    (_, lead), *rest = _labeled(reply.text, labels)
    pairs = [(labels[0], lead)] if lead.strip(" \n#0123456789.") else []
    groups: list[list[tuple[str, str]]] = []
    for label, text in [*pairs, *rest]:
        if label == labels[0] or not groups:
            groups.append([])
        groups[-1].append((label, re.sub(r"\s*###[\s\S]*", "", text).strip()))
    if is_cut(reply):
        left_out[_cut(reply)] += 1
        del groups[-1:]
    elif not groups:
        left_out["empty"] += 1
    for group in groups:
        if [label for label, _ in group] != labels:
            left_out["malformed"] += 1
        else:
            instruction, given, output = (text for _, text in group)
            yield Task(instruction, "" if given.casefold() in (none, none.strip("<>")) else given, output)


def _labeled(text: str, labels: Sequence[str]) -> list[tuple[str, str]]:
    """Parts of a text by label, the first of which has none.

    A label is at the beginning of a line, behind a number or ###, or it is the one that comes next: elsewhere it is a
    word of the text.
    """
    found, label, begun = list[tuple[str, str]](), "", 0
    number = r"(?:\d+\s*\.\s*)?"
    for mark in re.finditer(rf"((?:^|\n)[^\S\n]*{number}|(?<=[\s#]){number})({'|'.join(labels)})\s*[:：]", text):
        comes_next = (label or labels[0], mark[2]) in pairwise(labels)
        if mark[1] or comes_next or text[: mark.start()][-1:] in ("", "#"):
            found.append((label, text[begun : mark.start()]))
            label, begun = mark[2], mark.end()
    return [*found, (label, text[begun:])]


def parse_list(reply: Completion, left_out: Counter[str]) -> list[str]:
    """Instructions of a numbered list, whose first number is in the prompt; words before that number are none."""
    first, *rest = re.split(r"(?:^|\n)\s*(\d+)\s*[.、]", reply.text)
    begins_anew = bool(rest) and int(rest[0]) <= _SHOWN + 1
    left_out["malformed"] += begins_anew and bool(first.strip())
    found = [" ".join(text.split()) for text in (["" if begins_anew else first, *rest[1::2]])]
    if is_cut(reply):
        found.pop()
        left_out[_cut(reply)] += 1
    elif not any(found):
        left_out["empty"] += 1
    return [text for text in found if text]


def parse_instances(reply: Completion, language: Language, flag: bool, left_out: Counter[str]) -> list[dict[str, str]]:
    """Instances of one task: outputs that are empty, equal to the input, or contradict an earlier one are left out."""
    _, given, output = wording(language)["labels"]
    first, second = (wording(language)["label"], given) if flag else (given, output)
    text = f"{first}:{reply.text}" if flag else reply.text
    marks = re.split(rf"(?:^|\n)\s*({first}|{second})\s*[:：]", text)
    parts = list(zip(marks[1::2], (part.strip() for part in marks[2::2]), strict=True))
    if is_cut(reply):
        del parts[-1:]
        left_out[_cut(reply)] += 1
    found: dict[str, str] = {}
    before = None
    for name, text in parts:
        if name == first:
            before, lost = text, before
            left_out["instances"] += lost is not None
            continue
        asked, answer = (text, before or "") if flag else (before or "", text)
        before, asked = None, "" if _is_nothing(asked) else asked
        answer = "" if _is_nothing(answer) and not flag else answer  # a label may be "none"
        if not answer or answer == asked or found.get(asked, answer) != answer:
            left_out["instances"] += 1
        else:
            found[asked] = answer
    return [{"input": asked, "output": answer} for asked, answer in found.items()]


def _is_nothing(text: str) -> bool:
    return text.casefold().rstrip(".。") in ("none", "n/a", "-", "无")


def is_cut(reply: Completion) -> bool:
    """Whether a reply ends before its end."""
    return reply.reason in ("length", "context", "cancelled")


def _cut(reply: Completion) -> str:
    return "too long for the context" if reply.reason == "context" and not reply.text else "cut off"


_POLITE = re.compile(r"^(?:please|kindly|can you|could you|would you)\s+|^请(?:你|您)?(?:帮我)?")
_NO_NOUN = re.compile(
    r"(?:an?|the|this|that|these|those|some|any|each|all|two|three|four|five|ten|one|of|in|on|at|to|for|from|with|by|into|"
    r"about|as|and|or|me|us|you|him|her|it|them|my|your|his|its|our|their|is|are|was|be|if|what|which|how|why|when|"
    r"following|given|short|new|good|simple|different|possible|best|main)"
)


def verbs_and_nouns(instructions: Sequence[str]) -> Counter[tuple[str, str]]:
    """Diversity of instructions: the word that each begins with, and the first behind it that may be its object.

    Without a parser: words of a short list (articles, prepositions, common adjectives) are passed over, and Chinese
    gives its first two characters, or the one in front of a number, as the verb and nothing as the object.
    """
    found: Counter[tuple[str, str]] = Counter()
    for text in instructions:
        plain = _POLITE.sub("", text.strip().casefold())
        if chinese := re.match(r"[一-鿿](?=[一两三几])|[一-鿿]{2}", plain):
            found[chinese[0], ""] += 1
        else:
            verb, *rest = re.findall(r"[a-z]+", plain) or [""]
            found[verb, next((word for word in rest if not _NO_NOUN.fullmatch(word)), "")] += 1
    return found
