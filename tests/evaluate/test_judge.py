"""Judges that always say A, that prefer length, that say nothing, and a live one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from minillama import Decoder, ModelConfig
from minillama.commands.cli import main
from minillama.errors import InputError
from minillama.evaluate import judge
from minillama.evaluate.judge import Question, answer, ask_verdicts, read_answers, read_questions
from minillama.evaluate.judge_report import Table, outcome, page, pairwise, single, values_of
from minillama.inference.chat import Messages
from minillama.inference.generate import Completion
from minillama.inference.load import ModelArgs
from minillama.inference.remote import Local
from minillama.inference.sampling import Sampling
from minillama.tokenizer import byte_tokenizer

QUESTIONS = [
    Question("1", "writing", ("Say it.", "Again.")),
    Question("2", "math", ("2 + 2?",), ("4",)),
    Question("3", "math", ("3 + 3?",)),
]
OURS = [["short", "s"], ["four", ""], ["six"]]
THEIRS = [["a much longer answer", "and again much longer"], ["it is four indeed"], ["it is six, and no less"]]


def asks(say: Callable[[str], str]) -> judge.Ask:
    def ask(prompts: Sequence[Messages], count: int, sampling: Sampling) -> list[Completion]:
        return [Completion(say(prompt[-1]["content"]), (), "eos") for prompt in prompts]

    return ask


def longer(text: str) -> str:
    a, b = (text.split(f"<Assistant {side}>")[1].split(f"</Assistant {side}>")[0] for side in "AB")
    return f"so [[{'A' if len(a) > len(b) else 'B'}]]"


def compare(say: Callable[[str], str]) -> Table:
    prompts = judge.pairwise_prompts(QUESTIONS, OURS, THEIRS)
    assert len(prompts) == 8  # four turns in both orders
    verdicts = {one.key: one for one in ask_verdicts(asks(say), prompts, 9, "pairwise")}
    return pairwise(QUESTIONS, OURS, THEIRS, values_of(verdicts))


def test_a_judge_that_always_says_a_gives_no_win() -> None:
    table = compare(lambda text: "I like it. [[A]]")
    whole = table.figures["all"]
    assert (whole["A"], whole["B"], whole["disagree"], whole["rate"][0]) == (0, 0, 4, 0.5)
    assert whole["first"][0] == 1.0 and whole["longer"][0] == 0.5
    assert any("for the answer shown first: 100% of 8" in note for note in table.notes)


def test_a_judge_that_prefers_length_is_reported() -> None:
    table = compare(longer)
    whole = table.figures["all"]
    assert (whole["A"], whole["B"], whole["longer"][0], whole["first"][0]) == (0, 4, 1.0, 0.5)
    assert any("for the longer answer: 100% of 8" in note for note in table.notes)
    assert [row[0] for row in table.rows] == ["writing", "math", "turn 1", "turn 2", "all"]
    assert table.figures["math"]["B"] == 2 and table.figures["turn 2"]["B"] == 1


def test_no_verdict_is_an_error_and_never_a_tie() -> None:
    whole = compare(lambda text: "[[A]]" if "2 + 2?" not in text else "hard to say").figures["all"]
    assert (whole["error"], whole["tie"], whole["disagree"], whole["rate"][3]) == (1, 0, 3, 3)
    assert outcome(None, "A") == "error" and outcome("C", "C") == "tie" and outcome("C", "A") == "disagree"
    assert outcome("A", "B") == "A" and outcome("B", "A") == "B" and outcome("B", "B") == "disagree"


def test_a_parrot_gives_no_verdict() -> None:
    """A judge that repeats what it was told, alone or with a verdict behind, has said several."""
    for say in (str, lambda text: f"{text}\n[[B]]", lambda text: "[[A]] or [[B]]"):
        whole = compare(say).figures["all"]
        assert (whole["error"], whole["tie"], whole["rate"][3]) == (4, 0, 0)
    prompts = judge.single_prompts(QUESTIONS, OURS, "a")
    assert [one.value for one in ask_verdicts(asks(str), prompts, 9, "single")] == [None] * 4
    assert judge.verdict_of("[[7]] it is: [[7]]", "single") == "7"


def test_where_there_is_no_verdict_there_is_no_rate() -> None:
    table = compare(lambda text: "hard to say")
    assert {cell for row in table.rows for cell in row[6:]} == {"-"} and table.figures["all"]["rate"][3] == 0


def test_kinds_of_a_task_are_reported() -> None:
    questions = [Question(str(i), "推理", ("?",), (), kind) for i, kind in enumerate(("逻辑", "常识", ""))]
    values = {f"{i}/0/{order}": "AB"[order] for i in range(3) for order in (0, 1)}
    table = pairwise(questions, [["a"]] * 3, [["b"]] * 3, values)
    assert [row[:2] for row in table.rows] == [["推理", "3"], ["推理: 逻辑", "1"], ["推理: 常识", "1"], ["all", "3"]]


def test_prompts_have_both_turns_and_the_reference() -> None:
    prompts = {
        key.rpartition("/")[0]: p[0]["content"] for key, p in judge.pairwise_prompts(QUESTIONS, OURS, THEIRS).items()
    }
    assert "Say it." in prompts["1/1/0"] and "Again." in prompts["1/1/0"] and "Again." not in prompts["1/0/0"]
    assert "<reference>\n4\n</reference>" in prompts["2/0/1"] and "<reference>" not in prompts["3/0/0"]
    first, second = prompts["3/0/0"], prompts["3/0/1"]
    assert first.index("six, and") > first.index("Assistant A: six") and "Assistant A: it is six" in second


def test_ratings_have_means_and_errors() -> None:
    sides = {side: judge.single_prompts(QUESTIONS, own, side) for side, own in (("a", OURS), ("b", THEIRS))}
    says = asks(
        lambda text: "good, [[7.5]], yes, [[7.5]]" if "longer" in text else "[[11]]" if "six" in text else "[[4]]"
    )
    verdicts = {one.key: one for prompts in sides.values() for one in ask_verdicts(says, prompts, 9, "single")}
    figures = single(QUESTIONS, values_of(verdicts)).figures
    assert figures["writing"]["b"] == {"rating": 7.5, "stderr": 0.0, "errors": 0}
    # (4, 7.5), (4, 7.5), (4, 4) and one without: -7/3, and 1.96 standard errors of 3.5/3 on each side
    assert figures["all"]["difference"]["mean"] == pytest.approx(-7 / 3)
    assert figures["all"]["difference"]["interval"] == pytest.approx((-7 / 3 - 2.286625, -7 / 3 + 2.286625), abs=1e-4)
    assert figures["math"]["a"]["errors"] == 1 and figures["writing"]["b_higher"] == 2  # 11 is no rating


def test_turns_are_asked_with_the_answers_before() -> None:
    seen: list[tuple[list[str], float]] = []

    def ask(prompts: Sequence[Messages], count: int, sampling: Sampling) -> list[Completion]:
        seen.extend(([one["content"] for one in prompt], sampling.temperature) for prompt in prompts)
        return [Completion(f"re: {prompt[-1]['content']}", (), "eos") for prompt in prompts]

    assert [one.text for one in answer(ask, QUESTIONS)[0]] == ["re: Say it.", "re: Again."]
    assert seen[-1] == (["Say it.", "re: Say it.", "Again."], 0.7) and (["2 + 2?"], 0.0) in seen


def test_question_files_of_three_projects(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"question_id": 5, "text": "Why?", "category": "generic"},
        {"question_id": 81, "turns": ["One.", "Two."], "category": "writing", "reference": ["1", "2"]},
        {"task": "推理", "kind": "逻辑", "question": "能否推出？", "reference": "能"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_questions(path)
    assert [one.kind for one in found] == ["", "", "逻辑"]
    assert [(one.id, one.category, len(one.turns), len(one.reference)) for one in found] == [
        ("5", "generic", 1, 0),
        ("81", "writing", 2, 2),
        ("3", "推理", 1, 1),
    ]
    own = read_questions()
    assert len(own) == 30 and len({one.category for one in own}) == 9 and all(one.reference for one in own)
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(InputError, match="not a question"):
        read_questions(path)
    path.write_text('{"question_id": "1", "choices": [{"turns": ["a"]}]}\n')
    with pytest.raises(InputError, match="an answer is missing"):
        read_answers(path, QUESTIONS)


@pytest.mark.parametrize(
    "more", [{"turns": "Hello"}, {"turns": 5}, {"turns": ["a", ""]}, {"text": "a", "reference": 5}]
)
def test_turns_and_references_are_lists_of_strings(more: dict[str, Any], tmp_path: Path) -> None:
    """A string is not taken for as many turns as it has letters."""
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"text": "Why?", "reference": None}) + "\n" + json.dumps(more) + "\n")
    with pytest.raises(InputError, match="not a question") as error:
        read_questions(path)
    assert error.value.where == f"{path}:2"
    path.write_text('{"question_id": "1", "choices": [{"turns": "ab"}]}\n')
    with pytest.raises(InputError, match="not an answer") as error:
        read_answers(path, QUESTIONS[:1])
    assert error.value.where == f"{path}:1"


def test_a_page_is_text_alone() -> None:
    bad = "<script>alert(1)</script><img src=x>"
    html = page([bad, "B"], Table([bad], [[bad]], [bad], {}), [Question(bad, bad, (bad,))], ([[bad]], [[bad]]), {})
    assert "<script" not in html and "<img" not in html and html.count("&lt;script&gt;") >= 8


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    tokenizer = byte_tokenizer()
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 2048}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.with_chat_template(template).save(tmp_path / "tiny", 2048)
    return tmp_path / "tiny"


def test_a_live_judge_on_two_models(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model gives no verdict: errors throughout. What has been asked is not asked again."""
    out = tmp_path / "judged"
    words = ["eval", "judge", str(tiny), str(tiny), "--judge", str(tiny), "--output", str(out), "--limit", "2"]
    words += ["--max-new-tokens", "4", "--judge-tokens", "3"]
    assert main(words) == 0
    figures = json.loads((out / "pairwise.json").read_text())["results"]["all"]
    assert (figures["error"], figures["A"], figures["tie"]) == (2, 0, 0)
    shown = capsys.readouterr().out
    assert "2 turns lack a verdict" in shown and (out / "pairwise.html").exists()
    assert "A: tiny: 2 answers were cut at the most new tokens" in shown and "fit" not in shown
    assert any("B: tiny: 2 answers" in note for note in json.loads((out / "pairwise.json").read_text())["notes"])
    (verdicts,) = out.glob("verdicts-tiny-*.jsonl")
    assert len(verdicts.read_text().splitlines()) == 4  # two questions in both orders
    answered = len([*out.glob("answers-[AB]-tiny-*.jsonl")])
    monkeypatch.setattr(judge, "answer", None)
    for path in out.glob("answers-A-*.jsonl"):
        path.write_text(path.read_text().replace('"length"', '"context"', 1))
    kept = verdicts.read_text()
    verdicts.write_text(kept.replace('"value": null', '"value": "C"'))  # as of a version that took an echo for a tie
    assert main(words) == 0 and "A: tiny: 1 answers are empty or cut" in capsys.readouterr().out
    assert json.loads((out / "pairwise.json").read_text())["results"]["all"]["tie"] == 0
    verdicts.write_text(kept)
    assert main(words) == 0 and len(verdicts.read_text().splitlines()) == 4 and answered == 2
    assert main([*words[:-1], "4"]) == 0 and len([*out.glob("verdicts-tiny-*.jsonl")]) == 2


def test_a_judge_behind_a_url(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is busy once, always says A, and has its key."""
    bodies: list[dict[str, Any]] = []

    class Endpoint(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(200, {"data": [{"id": "judge-1"}]})

        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            said = {"message": {"content": f"{self.headers['Authorization']} [[A]]"}, "finish_reason": "stop"}
            self._reply(503 if len(bodies) == 1 else 200, {"choices": [said]})

        def _reply(self, status: int, value: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *words: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    Thread(target=server.serve_forever, daemon=True).start()
    url, out = f"http://127.0.0.1:{server.server_port}", tmp_path / "judged"
    words = ["eval", "judge", str(tiny), str(tiny), "--output", str(out), "--limit", "2", "--max-new-tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "secret")
        patch.setenv("NO_PROXY", "127.0.0.1")
        assert main([*words, "--judge", f"{url}/v1"]) == 0
    assert len(bodies) == 5 and bodies[1]["model"] == "judge-1" and bodies[1]["temperature"] == 0
    assert json.loads((out / "pairwise.json").read_text())["results"]["all"]["disagree"] == 2
    assert "Bearer secret [[A]]" in next(out.glob("verdicts-v1-*.jsonl")).read_text()
    assert len(list(out.glob("answers-[AB]-tiny-*.jsonl"))) == 2
    server.shutdown()
    server.server_close()


def test_a_conversation_that_does_not_fit_gets_no_answer(tiny: Path) -> None:
    ask = Local(*ModelArgs(str(tiny)).load())
    prompts = [[{"role": "user", "content": "x" * size}] for size in (3000, 3)]
    found = ask(prompts, 2, Sampling(temperature=0))
    assert (found[0].text, found[0].reason) == ("", "context") and len(found[1].tokens) > 0


def test_errors_of_a_judge_name_its_own_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text(
        "".join(f'{{"question_id": "{one.id}", "choices": [{{"turns": ["x"]}}]}}\n' for one in read_questions())
    )
    words = ["eval", "judge", str(answers), str(answers), "--output", str(tmp_path / "judged"), "--judge"]
    for url, option in (
        ("http://127.0.0.1:9/v1", "do: give --judge-name"),
        ("http://me:x@127.0.0.1:9", "where: --judge"),
    ):
        assert main([*words, url]) == 1
        err = capsys.readouterr().err
        assert option in err and "teacher" not in err
