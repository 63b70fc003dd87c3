"""Rejection sampling: the best answer of all rounds, resumed to the byte, read by fine-tuning."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.data.conversations import conversations
from minillama.data.examples import is_held_out
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.evaluate.rules import Reward, read_rewards
from minillama.inference.chat import ChatPrompts
from minillama.inference.generate import generate
from minillama.model import Decoder
from minillama.model.heads import with_score
from minillama.synthetic.best_of_n import kl_bound, read_lines
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.template import load_template
from minillama.tokenizer.train import byte_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that writes letters, with a chat template, and a reward: the number of vowels."""
    path = tmp_path_factory.mktemp("model")
    shape = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=64)
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(2))
    with torch.no_grad():  # a letter is always far more probable than what is none
        model.output_weight.zero_()[97:123].normal_(0, 1.3, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.with_chat_template(load_template("plain", tokenizer).source).save(path)
    (path / "mine.py").write_text("def low(prompt, ids, text, record):\n    return -sum(ids) / len(ids)\n")
    return path


def best(folder: Path, out: Path, samples: int = 6, *words: str) -> list[dict]:  # type: ignore[type-arg]
    given = {"--source": "sorting:2", "--limit": "10", "--rewards": f"{folder}/mine.py:low", "--max-new-tokens": "5"}
    given |= {"--model": str(folder), "--out": str(out), "--samples": str(samples)}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert main(["data", "best-of-n", *(word for pair in given.items() for word in pair)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_best_is_written_for_fine_tuning(folder: Path, tmp_path: Path) -> None:
    lines = best(folder, tmp_path / "a.jsonl")
    assert len(lines) == 10 and len({line["key"] for line in lines}) == 10
    assert all(line["reward"] > line["mean_reward"] and line["round"] == 1 and not line["ended"] for line in lines)
    found = list(conversations(Source(path=str(tmp_path / "a.jsonl"))))
    assert [c.messages[1].content for c in found] == [line["messages"][1]["content"] for line in lines]
    assert all(c.messages[0].content.endswith(">") for c in found)


def test_a_stopped_round_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    best(folder, whole)
    text = whole.read_text()
    third = sum(map(len, text.splitlines(keepends=True)[:3]))
    cut.write_text(text[: third + 40])  # within the fourth line
    best(folder, cut)
    assert cut.read_bytes() == whole.read_bytes()
    best(folder, cut)
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("other", [["--samples", "2"], ["--seed", "2"], ["--rewards", "length"]])
def test_a_file_of_other_settings_is_not_continued(
    folder: Path, tmp_path: Path, other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    best(folder, tmp_path / "a.jsonl")
    before = (tmp_path / "a.jsonl").read_bytes()
    command = ["data", "best-of-n", "--model", str(folder), "--source", "sorting:2", "--out", str(tmp_path / "a.jsonl")]
    given = {"--rewards": f"{folder}/mine.py:low", "--samples": "6", "--max-new-tokens": "5"} | {other[0]: other[1]}
    assert main([*command, *(word for pair in given.items() for word in pair)]) == 1
    assert "other settings" in capsys.readouterr().err and (tmp_path / "a.jsonl").read_bytes() == before


def test_another_model_or_reward_model_does_not_go_on_with_the_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same name and settings, with other weights; nor a reward of another text or pattern."""
    model, out = tmp_path / "model", tmp_path / "a.jsonl"
    shutil.copytree(folder, model, ignore=shutil.ignore_patterns("__pycache__"))
    assert "pattern" not in str(best(model, out)[0]["settings"]["rewards"])
    weights = model / "model.safetensors"

    def refused(*words: str) -> bool:
        before = out.read_bytes()
        command = ["data", "best-of-n", "--model", str(model), "--source", "sorting:2", "--out", str(out)]
        given = ["--samples", "6", "--max-new-tokens", "5", "--rewards", f"{model}/mine.py:low", *words]
        failed = main([*command, *given]) == 1
        return failed and "other settings" in capsys.readouterr().err and out.read_bytes() == before

    answer = "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    turn = "{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}{% endif %}"
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}" + turn + "{% endfor %}")
    assert refused("--template", str(tmp_path / "mine.jinja"))
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert refused()


def test_a_reward_model_of_the_same_context_reads_the_longest_prompt(folder: Path, tmp_path: Path) -> None:
    """And its answer, with the end token behind it."""
    scored = with_score(Decoder.from_pretrained(folder), torch.Generator().manual_seed(1))
    scored.save_pretrained(tmp_path / "scored")
    Tokenizer.load(folder).save(tmp_path / "scored")
    asked = tmp_path / "asked.jsonl"
    asked.write_text("".join(json.dumps({"prompt": "a" * n}) + "\n" for n in range(40, 80)))  # until none has room
    words = ("--source", str(asked), "--rewards", str(tmp_path / "scored"), "--limit", "0")
    assert 5 < len(best(folder, tmp_path / "a.jsonl", 2, *words)) < 35


def test_rewards_with_settings_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "rewards.toml"
    text = '[objective]\nname = "grpo"\n[[objective.rewards]]\nname = "{}"\n{}\n'
    file.write_text(text.format("format", 'pattern = "[a-m]+"\nweight = 2') + '[[objective.rewards]]\nname = "length"')
    lines = best(folder, tmp_path / "a.jsonl", 6, "--rewards", str(file))
    assert all(line["rewards"].keys() == {"format", "length"} for line in lines)
    assert {line["reward"] for line in lines} <= {1.0, 3.0}
    wanted = {"name": "format", "weight": 2.0, "pattern": "[a-m]+"}
    assert lines[0]["settings"]["rewards"] == [wanted, {"name": "length"}]
    assert read_rewards(["0.5*ended", str(file)])[0] == Reward("ended", 0.5)
    file.write_text("[objective]\n")
    with pytest.raises(InputError, match="no rewards in this file"):
        read_rewards([str(file)])
    file.write_text(text.format("format", 'pattern = "("'))
    with pytest.raises(InputError, match=r"not a regular expression[\s\S]*rewards.toml:5"):
        read_rewards([str(file)])


def test_fine_tuning_holds_the_same_questions_out(folder: Path, tmp_path: Path) -> None:
    """Of the answers to all prompts; with a share they are left out."""
    asked = []
    for name, more in (("a", ()), ("b", ("--val-fraction", "0.3"))):
        lines = best(folder, tmp_path / f"{name}.jsonl", 1, "--limit", "0", *more)
        asked.append({line["messages"][0]["content"] for line in lines})
    held_out = {question for question in asked[0] if is_held_out(question, 0.3)}
    assert len(asked[0]) == 100 and asked[1] == asked[0] - held_out and 15 < len(held_out) < 45


def test_what_a_template_writes_in_front_of_an_answer_is_no_part_of_it(folder: Path, tmp_path: Path) -> None:
    model, tokenizer, path = Decoder.from_pretrained(folder), Tokenizer.load(folder), tmp_path / "mine.jinja"

    def template(lead: str) -> str:
        answer = f"{{% generation %}}{lead}{{{{ m.content }}}}{{{{ eos_token }}}}{{% endgeneration %}}"
        turn = f"{{% if m.role == 'assistant' %}}{answer}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
        path.write_text(f"{{% for m in messages %}}{turn}{{% endfor %}}")
        return str(path)

    def said(lead: str) -> str:
        return generate(model, tokenizer, "1>", 5, temperature=0, chat=ChatPrompts(tokenizer, template(lead)))[0].text

    whole, greedy = said(""), ("--temperature", "0", "--template")
    assert [said(whole[:n]) for n in (1, 2)] == [whole[1:], whole[2:]] and said(f"{whole[0]}!") == whole
    every = best(folder, tmp_path / "a.jsonl", 1, *greedy, template(""))
    others = best(folder, tmp_path / "b.jsonl", 1, *greedy, template(whole[0]))
    texts, found = ([line["messages"][1]["content"] for line in lines] for lines in (every, others))
    assert found == [text.removeprefix(whole[0]) for text in texts] and found != texts


def test_rounds_before_are_scored_anew(folder: Path, tmp_path: Path) -> None:
    first = best(folder, tmp_path / "1.jsonl", 12)
    second = best(folder, tmp_path / "2.jsonl", 2, "--earlier", str(tmp_path / "1.jsonl"))
    rounds = [line["round"] for line in second]
    assert set(rounds) == {1, 2} and rounds.count(1) > 5
    for old, new in zip(first, second, strict=True):
        assert old["key"] == new["key"]
        kept = new["messages"] == old["messages"]
        assert kept == (new["round"] == 1)
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(InputError, match=r"not a line of an earlier round[\s\S]*bad.jsonl:1"):
        read_lines(tmp_path / "bad.jsonl")


def test_the_kl_of_the_best() -> None:
    for samples, bound in ((2, 0.1931472), (4, 0.6362944), (16, 1.8350887), (64, 3.1745081)):
        assert kl_bound(samples) == pytest.approx(bound)
    q, best_of_4 = [0.4, 0.3, 0.2, 0.1], []
    below = 0.0
    for p in q:
        best_of_4.append((below + p) ** 4 - below**4)
        below += p
    assert best_of_4 == pytest.approx([0.0256, 0.2145, 0.4160, 0.3439])
    kl = sum(p * math.log(p / r) for p, r in zip(best_of_4, q, strict=True))
    assert kl == pytest.approx(0.5871, abs=1e-4) and kl < kl_bound(4)
