"""Constitutional feedback, chains of hindsight, edits and ghost attention: what is asked, written and trained."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from minillama.commands.cli import main
from minillama.data.conversations import conversations, read_record
from minillama.data.preferences import preferences, read_preference
from minillama.data.reading import Record
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.inference.generate import Completion
from minillama.inference.sampling import Sampling
from minillama.synthetic.constitutional import Constitutional, first_of
from minillama.synthetic.ghost_attention import GhostAttention
from minillama.synthetic.hindsight import chains, edits
from minillama.synthetic.wording import read_principles, wording
from minillama.synthetic.writer import Generated
from minillama.tokenizer.rendering import encode
from minillama.tokenizer.template import load_template
from minillama.tokenizer.train import byte_tokenizer


class Echo:
    """Teacher whose reply tells the seed and the number of messages; it likes B places and the longer answer."""

    about: Mapping[str, Any] = {}

    def __init__(self, reason: Any = "eos") -> None:
        self.asked: list[Any] = []
        self.reason = reason

    def __call__(
        self, prompts: Sequence[Any], count: int = 0, sampling: Any = None, stop: Any = (), chat: bool = False
    ) -> list[Completion]:
        self.asked += [list(prompt) for prompt in prompts]
        seeds = range(sampling.seed, sampling.seed + len(prompts))
        texts = [f" {len(p)} messages, {seed} " for p, seed in zip(prompts, seeds, strict=True)]
        return [Completion(text, (), self.reason) for text in texts]

    def option_logprobs(self, prompts: Sequence[Any], options: Sequence[str]) -> list[list[float]]:
        self.asked += prompts
        found = []
        for ((message,),) in [(prompt,) for prompt in prompts]:
            a, b = (message["content"].split(f"Answer {name}:\n")[1].split("\n")[0] for name in options)
            found.append([-1.0 + 0.1 * len(a), -0.5 + 0.1 * len(b)] if "?" not in a + b else [-math.inf] * 2)
        return found


QUESTIONS = [[{"role": "user", "content": f"question {i}"}] for i in range(5)]


def constitution(teacher: Any, **options: Any) -> Constitutional:
    return Constitutional(teacher, read_principles("en"), wording("en")["judge"], Sampling(seed=3), **options)


def test_revisions_in_any_batches() -> None:
    teacher = Echo()
    lines, left_out = constitution(teacher).revise(QUESTIONS, 0)
    assert len(lines) == 5 and not +left_out
    parts = [constitution(Echo()).revise(QUESTIONS[i : i + 2], i)[0] for i in (0, 2, 4)]
    assert [*parts[0], *parts[1], *parts[2]] == list(lines)
    line = lines[0]
    assert [len(talk) for talk in teacher.asked[::5]] == [1, 3, 5, 3, 5]
    critique = teacher.asked[15]  # of the second round, from the first revision
    assert (
        critique[1]["content"] == line["rounds"][0]["revision"]
        and critique[2]["content"] == line["rounds"][1]["principle"]
    )
    assert line["messages"][-1]["content"] == line["rounds"][1]["revision"] and line["answer"].startswith("1 messages")
    assert len({step["principle"] for each in lines for step in each["rounds"]}) > 2


def test_pairs_by_the_mean_of_both_orders(tmp_path: Path) -> None:
    assert first_of(-1.2, -2.0) == pytest.approx(0.6899745) and first_of(-math.inf, -math.inf) is None
    pairs = [
        (QUESTIONS[0], ("short", "longer by nine")),
        (QUESTIONS[1], ("same", "same")),
        (QUESTIONS[2], ("why?", "not")),
    ]
    lines, left_out = constitution(Echo()).compare(pairs, 0)
    assert len(lines) == 1 and left_out["without two answers"] == left_out["not judged"] == 1
    # logits of A over B: 0.1 * (5 - 14) - 0.5, and in the other order 0.1 * (14 - 5) - 0.5
    expected = (1 / (1 + math.exp(-1.4)) + 1 / (1 + math.exp(-0.4))) / 2
    assert lines[0]["probability"] == pytest.approx(expected, abs=1e-6)
    found = read_preference(Record(dict(lines[0]), "x"))
    assert found.chosen and found.chosen.messages[-1].content == "longer by nine"
    found = constitution(Echo(), certain=0.9).compare(pairs[:1], 0)[1]
    assert found["undecided"] == 1 and not found["judged otherwise in the other order"]
    near = constitution(Echo(), certain=0.9).compare([(QUESTIONS[0], ("short", "longer"))], 0)[1]
    assert near["undecided"] == near["judged otherwise in the other order"] == 1
    teacher, talk = Echo(), [{"role": "system", "content": "Be kind."}, *QUESTIONS[1]]
    constitution(teacher).compare([(talk, ("short", "longer"))], 0)
    assert all("system: Be kind.\n\nuser: question 1" in ask[0]["content"] for ask in teacher.asked)
    both, _ = constitution(Echo()).compare([(question, ()) for question in QUESTIONS], 0)  # answers of the teacher
    assert all(line["chosen"] != line["rejected"] for line in both)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_principles_and_wording(language: Any, tmp_path: Path) -> None:
    found = read_principles(language)
    assert len(found) == 8 and len({each["critique"] for each in found}) == 8
    assert wording(language).keys() == wording("en").keys()
    (tmp_path / "p.toml").write_text('[[principles]]\ncritique = "a"\nrevision = "b"\n')
    with pytest.raises(InputError, match=r"no principles[\s\S]*principle 1[\s\S]*judge"):
        read_principles(str(tmp_path / "p.toml"))


def test_chains_train_every_answer_and_no_word_of_the_form() -> None:
    record = Record({"prompt": "Name a sea.", "answers": ["The Baltic.", "Sea?", "No."]}, "x")
    tokenizer = byte_tokenizer()
    template = load_template("plain", tokenizer)
    for form, trained in {
        "good": ["The Baltic."],
        "bad": ["No."],
        "rising": ["No.", "Sea?", "The Baltic."],
        "falling": ["The Baltic.", "Sea?", "No."],
    }.items():
        (line,), _ = chains([record], 0, 1, forms=[form])  # type: ignore[list-item]
        (conversation,) = read_record(Record(line, "x"))
        assert [m.content for m in conversation.messages if m.is_answer] == trained
        assert conversation.messages[0].content.startswith("Name a sea.\n\n")
        runs = encode(conversation, template, tokenizer).runs
        weighted = [text for text, weight in runs if weight]  # each with the end of its turn
        assert len(weighted) == len(trained) and all(map(str.startswith, weighted, trained))
    scored = Record({"prompt": "p", "answers": ["a", "b"], "scores": [1, 2]}, "x")
    assert chains([scored], 0, 1, forms=["good"])[0][0]["messages"][-1]["content"] == "b"
    alike = Record({"prompt": "p", "answers": ["a", "b"], "scores": [2, 2]}, "x")
    assert chains([alike], 0, 1)[0][0]["form"] == "alike"
    three, words = {"prompt": "p", "answers": ["a", "b", "c"], "scores": [1, 2, 1]}, wording("en")
    for form, then in (("rising", ["alike", "better"]), ("falling", ["worse", "alike"])):
        (line,), _ = chains([Record(three, "x")], 0, 1, forms=[form])  # type: ignore[list-item]
        asked = [message["content"] for message in line["messages"][2::2]]
        assert all(phrase in words[kind] for phrase, kind in zip(asked, then, strict=True))
    preference = Record({"prompt": "p", "chosen": "yes", "rejected": "no"}, "x")
    verdicts = set()
    for number in range(9):
        (line,), _ = chains([preference], number, 1, forms=["compare"])
        asked, verdict = (message["content"] for message in line["messages"])
        assert ("First answer:\nyes" in asked) == (verdict == "The first one.")
        verdicts.add(verdict)
    assert len(verdicts) == 2
    with pytest.raises(InputError, match=r"no answers to compare[\s\S]*file:3"):
        chains([Record({"prompt": "p", "answers": ["a"]}, "file:3")], 0, 1)
    for scores in ([1, 2], "12", [1, 2, math.nan]):
        with pytest.raises(InputError, match=r"no answers to compare[\s\S]*file:3[\s\S]*scores"):
            chains([Record({**three, "scores": scores}, "file:3")], 0, 1)


def test_edits() -> None:
    fields = {"prompt": "2 + 2?", "response": "5", "correction": "4"}
    record, told = Record(fields, "x"), Record({**fields, "feedback": "One too many."}, "x")
    (line, with_feedback), _ = edits([record, told])
    assert [message["content"] for message in line["messages"]] == ["2 + 2?", "4"]
    assert [(m["content"], m.get("weight")) for m in with_feedback["messages"]] == [
        ("2 + 2?", None),
        ("5", 0),
        ("One too many.", None),
        ("4", None),
    ]
    (pair,), left_out = edits([record, Record({**fields, "correction": "5"}, "x")], pairs=True)
    preference = read_preference(Record(pair, "x"))
    assert preference.chosen and preference.chosen.messages[-1].content == "4" and left_out["without a change"] == 1
    with pytest.raises(InputError, match=r"no correction[\s\S]*x"):
        edits([Record({"prompt": "a", "response": "b"}, "x")])


def test_answers_that_are_cut_off_are_counted() -> None:
    cut, whole, name = Echo("length"), Echo(), "answers cut off, and kept"
    open_ = [(question, ()) for question in QUESTIONS]
    for teacher, count in ((cut, 1), (whole, 0)):
        assert constitution(teacher).revise(QUESTIONS, 0)[1][name] == 5 * count
        lines, counts = constitution(teacher).compare(open_, 0)
        assert counts[name] == 2 * count * len(lines)
        ghosts = GhostAttention(teacher, ["Be brief."], Sampling()).write([["a", "b"], ["c"]], 0)
        assert len(ghosts[0]) == 2 and ghosts[1][name] == 2 * count


def test_ghost_attention_asks_with_the_instruction_and_trains_the_last_answer() -> None:
    teacher = Echo()
    dialogues = [["a", "b", "c"], ["d"]]
    lines, _ = GhostAttention(teacher, ["Be brief."], Sampling(seed=1)).write(dialogues, 0)
    assert all(m["content"].endswith("\n\nBe brief.") for talk in teacher.asked for m in talk if m["role"] == "user")
    (first,) = read_record(Record(dict(lines[0]), "x"))
    assert [m.content for m in first.messages if m.role == "user"] == ["a", "b", "c"]
    assert first.messages[0].role == "system" and first.messages[0].content == "Be brief."
    assert [m.loss_weight for m in first.messages if m.is_answer] == [0, 0, 1]
    alone, _ = GhostAttention(Echo(), ["Be brief."], Sampling(seed=1)).write(dialogues[1:], 1)
    assert alone[0] == lines[1]
    own = {
        GhostAttention(Echo(), [], Sampling(), "zh").write([["a"]], i)[0][0]["messages"][0]["content"] for i in range(9)
    }
    assert len(own) > 5


def test_the_file_refuses_what_it_would_spoil(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    with pytest.raises(InputError, match="without a provenance file"):
        Generated(path, {})
    path.unlink()
    Generated(path, {"seed": 1}).commit([{"a": 1}, {"a": 2}], 2, {"bad": 1})
    with pytest.raises(InputError, match=r"begun with another seed[\s\S]*found: 2[\s\S]*expected: 1"):
        Generated(path, {"seed": 2})
    assert list(Generated(path, {"seed": 1}).lines()) == [{"a": 1}, {"a": 2}]
    one, other = Generated(path, {"seed": 1}), Generated(path, {"seed": 1})
    one.commit([{"a": 3}], 3, {})
    with pytest.raises(InputError, match=r"another process has written[\s\S]*27 bytes[\s\S]*18"):
        other.commit([{"a": 3}], 3, {})
    assert [line["a"] for line in Generated(path, {"seed": 1}).lines()] == [1, 2, 3]
    path.write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="has lost lines"):
        Generated(path, {"seed": 1})


def test_the_command_writes_provenance_and_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"q{i}", "chosen": "yes", "rejected": "no"}) + "\n" for i in range(4))
    )
    words = ["data", "hindsight", str(source), "--output", str(out), "--samples", "3"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "12 lines" in shown.err and "line 1" in shown.out and "user: q0" in shown.out
    about = json.loads((tmp_path / "out.jsonl.provenance.json").read_text())
    assert about["counts"] == {"lines": 12} and about["about"]["seed"] == 1 and "in.jsonl" in about["about"]["inputs"]
    assert len(list(conversations(Source(path=str(out))))) == 12
    written = out.read_bytes()
    assert main(words) == 0 and out.read_bytes() == written
    assert main([*words, "--seed", "2"]) == 1 and "begun with another seed" in capsys.readouterr().err
    pairs = ["data", "hindsight", str(source), "--kind", "edit-pairs", "--output", str(tmp_path / "b.jsonl")]
    assert main(pairs) == 1 and "no correction" in capsys.readouterr().err
    assert len(list(preferences(Source(path=str(source))))) == 4
