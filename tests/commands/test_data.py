"""`minillama data show`: records as the model reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minillama.commands.cli import main
from minillama.tokenizer import byte_tokenizer
from minillama.tokenizer.template import BUILTIN

RECORDS = [
    {"messages": [{"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Ho", "loss_weight": 0.5}]},
    {"instruction": "Add.", "input": "1, 2", "output": "3\x1b[31m"},
    {"text": "no conversation"},
    {"prompt": "a", "response": "b"},
]


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    byte_tokenizer().save(tmp_path / "tokenizer")
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "r.jsonl").write_text(lines, encoding="utf-8")
    return ["data", "show", str(tmp_path / "r.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]


def test_trained_tokens_are_marked_without_color(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*asked, "--template", "ziya", "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    file = asked[2]
    assert out == (
        f"{file}:1: 2 messages, 25 tokens, 3 trained, weight 1.5\n"
        "     0 │ <|endoftext|><human>:Hi↵\n       │ you↵\n       │ <bot>:\n"
        "   0.5 ┃ Ho<|endoftext|>\n\n"
        f"{file}:2: 2 messages, 32 tokens, 7 trained, weight 7\n"
        "     0 │ <|endoftext|><human>:Add.↵\n       │ 1, 2↵\n       │ <bot>:\n"
        "     1 ┃ 3\\x1b[31m<|endoftext|>\n\n"
    )
    assert err == "2 conversations, template ziya: 57 tokens, 10 trained, weight 8.5\n"


def test_trained_tokens_are_colored_in_a_terminal(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    main([*asked, "--template", "ziya", "--limit", "1"])
    assert "\x1b[32mHo<|endoftext|>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main([*asked, "--template", "ziya", "--limit", "1"])
    assert "\x1b[32m" not in capsys.readouterr().out


def test_a_record_that_cannot_be_read_stops_or_is_counted(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*asked, "--template", "ziya", "--limit", "0"]) == 1
    err = capsys.readouterr().err
    assert f"{asked[2]}:3" in err and "--on-error skip" in err and "data.on_error" not in err
    assert main([*asked, "--template", "ziya", "--limit", "0", "--on-error", "skip"]) == 0
    assert capsys.readouterr().err.endswith(f"1 document left out: 1 no conversation ({asked[2]}:3)\n")


def test_a_record_without_a_trained_token_is_named(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho", "loss_weight": 0}
    lines = [{"messages": [user, {**answer, "loss_weight": 1}]}, {"messages": [user, answer]}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main([*asked, "--template", "plain"]) == 1
    assert f"no token of this conversation is trained\n  where: {asked[2]}:2" in capsys.readouterr().err
    assert main([*asked, "--template", "plain", "--on-error", "skip"]) == 0
    assert f"1 not rendered ({asked[2]}:2)" in capsys.readouterr().err


def test_truncation_is_shown_and_counted(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*asked, "--template", "alpaca", "--limit", "1", "--context", "20"]) == 0
    out, err = capsys.readouterr()
    assert "21 tokens, 3 trained" in out and "cut off the prompt" in out and err.endswith("; 1 truncated\n")
    assert "     0 │ <|endoftext|>" in out and "   0.5 ┃ Ho<|endoftext|>" in out


@pytest.mark.parametrize("template", ["vicuna", "chatml"])
def test_without_a_model_tokens_are_bytes(template: str, asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*asked[:3], "--template", template, "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    answer = {"vicuna": " Ho<|endoftext|>", "chatml": "Ho<|im_end|>"}[template]
    assert f"   0.5 ┃ {answer}\n" in out and f"{4 if template == 'vicuna' else 3} trained" in out
    assert err.startswith("tokens are bytes, without a model; --model MODEL")
    assert main([*asked[:3], "--limit", "1"]) == 1
    assert "found: none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ([], "no chat template"),
        (["--template", "vikuna"], "did you mean 'vicuna'"),
        (["--template", "chatml"], "lacks special tokens"),
        (["--template", "plain", "--model", "x"], "found: a model and a tokenizer"),
        (["--template", "plain", "--format", "dolly"], "'instruction' is not a string"),
    ],
)
def test_what_is_wrong_is_said(more: list[str], what: str, asked: list[str], capsys: Any) -> None:
    assert main([*asked, *more]) == 1
    assert what in capsys.readouterr().err


def test_help_names_the_templates(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["data", "show", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in words for name in BUILTIN)


def test_a_models_tokenizer_and_template(smollm2: Path, shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shared / "sft" / "messages_v1_sft_demo.jsonl"
    assert main(["data", "show", str(file), "--model", str(smollm2), "--limit", "1", "--train-on", "last"]) == 0
    assert "     1 ┃ Hello! I am {{name}}, an AI assistant" in capsys.readouterr().out


def test_preferences_are_shown_in_two_colors(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = {"prompt": "Hi", "chosen": "Ho", "rejected": "Hum\nno", "margin": 0.5}
    lines = [pair, {"prompt": "Hi", "completion": "Ho", "label": False}, {"prompt": "a", "response": "b"}]
    Path(asked[2]).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert main([*asked, "--template", "ziya"]) == 0
    out, err = capsys.readouterr()
    prompt = "       │ <|endoftext|><human>:Hi↵\n       │ <bot>:\n"
    assert out.startswith(
        f"{asked[2]}:1: prompt 18 tokens, + 3, - 7, margin 0.5\n{prompt}"
        "     + ┃ Ho<|endoftext|>\n     - ┃ Hum↵\n       ┃ no<|endoftext|>\n\n"
        f"{asked[2]}:2: prompt 18 tokens, - 3\n{prompt}     - ┃ Ho<|endoftext|>\n\n{asked[2]}:3: 2 messages"
    )
    assert err.startswith("2 preferences, template ziya; 1 conversations, template ziya")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    main([*asked, "--template", "ziya", "--limit", "1", "--context", "20"])
    out = capsys.readouterr().out
    assert "\x1b[32mHo<|endoftext|>" in out and "\x1b[31mHum↵" in out and "<|endoftext|><human>:Hi" not in out
    assert main([*asked, "--template", "ziya", "--format", "preferences"]) == 1
    assert f"{asked[2]}:3" in capsys.readouterr().err
