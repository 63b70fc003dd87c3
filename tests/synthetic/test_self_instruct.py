"""Self-instruct: both methods, every filter, a stop at any byte, the same bytes again."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minillama.data.conversations import conversations
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.inference.generate import Completion
from minillama.inference.sampling import Sampling
from minillama.synthetic.self_instruct import (
    SelfInstruct,
    Task,
    parse_instances,
    parse_list,
    parse_tasks,
    read_seeds,
    unfit,
    verbs_and_nouns,
)
from minillama.synthetic.writer import Generated

VERBS = ["describe", "compare", "sort", "invent", "translate", "explain", "rewrite", "count", "list", "name", "plan"]
NOUNS = ["rivers", "stars", "recipes", "letters", "birds", "engines", "poems", "laws", "games", "cities", "clouds"]
SEEDS = [Task(f"{verb} old {noun} near home {len(noun)}", "", "Done.") for verb, noun in zip(VERBS, NOUNS, strict=True)]


class Writer:
    """Teacher that writes lists of random tasks, one in five of them wrong, from the seed alone."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.about = {"model": "writer"}

    def __call__(
        self,
        prompts: Sequence[Any],
        count: int = 0,
        sampling: Sampling | None = None,
        stop: Any = (),
        chat: bool = False,
    ) -> list[Completion]:
        self.asked += prompts
        assert sampling is not None
        return [self.reply(p, random.Random(f"{sampling.seed + i} {p}")) for i, p in enumerate(prompts)]

    def reply(self, prompt: str, chance: random.Random) -> Completion:
        def task() -> str:
            return " ".join([chance.choice(VERBS), "the", *chance.sample(NOUNS, 4), str(chance.randrange(999))])

        if prompt.endswith("Few answers:"):
            return Completion(" yes" if "rivers" in prompt.rsplit("Task:", 1)[1] else " no", (), "stop")
        if prompt.endswith("Label:"):
            return Completion(" left\nInput: a\nLabel: right\nInput: b\nLabel: up\nInput: a", (), "stop")
        if "\nOutput: Cork" in prompt:
            return Completion(chance.choice(("Input: none\nOutput: Yes.", "Output: Yes.")), (), "stop")
        if prompt.endswith("9."):
            return Completion(f" {task()}\n10. {task()}\n11. a b\n12. half of", (), "length")
        parts = [f" {task()}\n4. Input:\n<noinput>\n4. Output:\nYes.\n"]
        for number in range(5, 10):
            bad = chance.random() < 0.2
            text = "Draw a picture of the sea" if bad else task()
            parts.append(f"{number}. Instruction: {text}\n{number}. Input:\nthe sea\n{number}. Output:\nIt is so.\n")
        return Completion("###\n".join(parts), (), "stop")

    def option_logprobs(self, prompts: Any, options: Any) -> Any:
        raise AssertionError


def write(path: Path, count: int, **options: Any) -> tuple[list[dict[str, Any]], Generated]:
    out = Generated(path, {"seed": 1})
    SelfInstruct(Writer(), SEEDS, count, Sampling(1.0, seed=1), **options).write(out)
    return [json.loads(line) for line in path.read_text().splitlines()], out


@pytest.mark.parametrize("method", ["alpaca", "steps"])
def test_new_instructions_are_read_by_fine_tuning(tmp_path: Path, method: str) -> None:
    lines, out = write(tmp_path / "a.jsonl", 30, method=method)
    instructions = [line["instruction"] for line in lines]
    assert len(lines) == len(set(instructions)) == 30 and out.counts["lines"] == 30
    assert all(json.loads((tmp_path / "a.jsonl.provenance.json").read_text())["counts"])  # each reason has a name
    assert all(line["most_similar"][0][0] <= 0.7 for line in lines)
    found = list(conversations(Source(path=str(tmp_path / "a.jsonl"))))
    assert next(c.messages[0].content for c in found if not c.messages[0].input) in instructions
    if method == "alpaca":
        assert out.counts["unwanted words"] and {line["input"] for line in lines} == {"", "the sea"}
    else:
        assert out.counts["cut off"] and out.counts["too short"]
        kinds = {line["is_classification"]: line["instances"] for line in lines}
        assert kinds[False] == [{"input": "", "output": "Yes."}]
        assert kinds[True] == [{"input": "a", "output": "left"}, {"input": "b", "output": "right"}]
        assert out.counts["instances"]  # another label for the same input


@pytest.mark.parametrize("method", ["alpaca", "steps"])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, method: str) -> None:
    path = tmp_path / "cut.jsonl"
    write(tmp_path / "whole.jsonl", 20, method=method, requests=1)
    write(path, 7, method=method, requests=1)
    state = json.loads((tmp_path / "cut.jsonl.provenance.json").read_text())
    assert len(path.read_bytes()) == state["bytes"]
    path.unlink()
    (tmp_path / "cut.jsonl.provenance.json").unlink()
    stopping(path, method, 2)
    stopping(path, method, 3)
    with path.open("ab") as file:
        file.write(b'{"instruction": "torn')
    write(path, 20, method=method, requests=1)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def stopping(path: Path, method: Any, stop: int) -> None:
    """Stop behind the lines of a commit, the first for 2, and before its provenance."""
    from minillama.synthetic import writer

    real, calls = writer.replace_text, []

    def fail(*words: Any) -> Any:
        calls.append(0)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*words)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer, "replace_text", fail)
        write(path, 20, method=method, requests=1)


def test_the_filters_in_their_order() -> None:
    cases = {
        "Too short here": "too short",
        "word " * 151: "too long",
        "Draw the map of a town": "unwanted words",
        "Write a program that sorts numbers": "programs",
        "(Think) about all of it": "first character punctuation",
        "Über alles kann man reden": "first character of another script",
        "Describe the profile of mapmakers today": None,
    }
    assert {text: unfit(Task(text, "", "x"), "en") for text in cases} == cases
    assert unfit(Task("Tell me about the sea", "", " "), "en") == "without an output"
    chinese = {"写诗吧": "too short", "请为这张图片写一个标题": "unwanted words", "请写一首关于春天的诗": None}
    assert {text: unfit(Task(text, "", "x"), "zh") for text in chinese} == chinese


def test_lists_of_tasks() -> None:
    left_out: Counter[str] = Counter()
    text = (
        " One\n4. Input:\n<noinput>\n4. Output:\nA\n###\n5. Instruction: Two\n5. Output: B\n###\n6. Instruction: Three"
    )
    text += "\n6. Input: x: y\n6. Output: C\nInput and more\n###\n7. Instruction: Four\n7. Input: z\n7. Output: cu"
    found = list(parse_tasks(Completion(text, (), "length"), "en", left_out))
    assert found == [Task("One", "", "A"), Task("Three", "x: y", "C\nInput and more")]
    assert left_out == {"malformed": 1, "cut off": 1}
    again = "4. Instruction: One\n4. Input: <noinput>\n4. Output: A"  # a chat model begins anew
    assert list(parse_tasks(Completion(again, (), "stop"), "en", left_out)) == [Task("One", "", "A")]
    chinese = "写诗\n4. 输入：<无输入>\n4. 输出：床前明月光\n###\n5. 指令：翻译\n5. 输入：海\n5. 输出：sea"
    assert list(parse_tasks(Completion(chinese, (), "stop"), "zh", left_out)) == [
        Task("写诗", "", "床前明月光"),
        Task("翻译", "海", "sea"),
    ]
    inside = " Ask\n4. Input: <noinput>\n4. Output: Two parts. Instruction: mix. Then Output: cake"  # words of a text
    assert list(parse_tasks(Completion(inside, (), "stop"), "en", left_out)) == [
        Task("Ask", "", "Two parts. Instruction: mix. Then Output: cake")
    ]
    line = "One 4. Input: a 4. Output: b ### 5. Instruction: Two 5. Input: c 5. Output: d"
    assert list(parse_tasks(Completion(line, (), "stop"), "en", left_out)) == [
        Task("One", "a", "b"),
        Task("Two", "c", "d"),
    ]
    left_out.clear()
    assert list(parse_tasks(Completion("", (), "stop"), "en", left_out)) == []
    assert list(parse_tasks(Completion("", (), "context"), "en", left_out)) == []
    assert (
        parse_list(Completion("", (), "context"), left_out) == parse_list(Completion(" \n", (), "stop"), left_out) == []
    )
    assert left_out == {"empty": 2, "too long for the context": 2, "malformed": 0}
    chatty = "Sure, here are some more tasks:\n9. One two\n10. Three"
    assert parse_list(Completion(chatty, (), "stop"), left_out) == ["One two", "Three"] and left_out["malformed"] == 1
    assert parse_list(Completion(" One two\n10. Three\n  four\n11. fi", (), "length"), left_out) == [
        "One two",
        "Three four",
    ]
    nothing = ("Input: a\nOutput: a", "Input: None\nOutput: None.", "Output: -", "Well", "Input: a")
    for text in nothing:  # what a small model copies from the examples, or begins and does not end
        assert parse_instances(Completion(text, (), "stop"), "en", False, left_out) == []
    pairs = "Output: b\nOutput: c\nInput: d\nInput: e\nOutput: f\nOutput: hal"
    assert parse_instances(Completion(pairs, (), "length"), "en", False, left_out) == [
        {"input": "", "output": "b"},
        {"input": "e", "output": "f"},
    ]


def test_a_teacher_that_gives_nothing_is_left(tmp_path: Path) -> None:
    class Silent(Writer):
        def reply(self, prompt: str, chance: random.Random) -> Completion:
            return Completion("I am sorry.", (), "stop")

    lines, whole = write(tmp_path / "few.jsonl", 3)
    assert len(lines) == 3 and whole.counts["more than asked for"]  # of a round that gives more
    out = Generated(tmp_path / "a.jsonl", {})
    with pytest.raises(InputError, match=r"30 rounds without a new instruction[\s\S]*malformed"):
        SelfInstruct(Silent(), SEEDS, 5, Sampling(), requests=1).write(out)
    with pytest.raises(InputError, match=r"too few seed tasks[\s\S]*found: 1"):
        (tmp_path / "few.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
        read_seeds(str(tmp_path / "few.jsonl"))


def test_verbs_and_nouns() -> None:
    found = verbs_and_nouns(
        ["Write a short story about it", "Please write the story", "请写一首关于海的诗", "把它翻译成英文"]
    )
    assert found[("write", "short")] == 0 and sum(found.values()) == 4
    assert found[("write", "story")] == 2 and found[("写", "")] == found[("把它", "")] == 1


def test_the_time_left_is_said_once_a_speed_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Generated(tmp_path / "out.jsonl", {})
    made.say(0, 5, 0)
    assert "0 of 5, time left not known yet; 0 lines" in capsys.readouterr().err
    made.say(1, 5, 0)
    assert "1 of 5, 0 min 0 s left" in capsys.readouterr().err
