"""The dispatcher: names, exit statuses, and errors that a person can read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from minillama import Decoder, ModelConfig, __version__
from minillama.commands import cli
from minillama.errors import InputError
from minillama.tokenizer import TokenizerTrainer, byte_tokenizer


@dataclass
class Args:
    n: int = 3
    """How many."""


def raiser(error: BaseException) -> Callable[[Args], int]:
    def run(args: Args) -> int:
        raise error

    return run


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `probe` that returns its argument as the exit status."""
    module = types.ModuleType("minillama.commands.probe", "Return a number.")
    module.Args, module.run = Args, lambda args: args.n  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "probe", "return a number")
    return module


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_usage_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: minillama COMMAND")
    for name, text in cli.COMMANDS.items():
        assert f"  {name} " in out and text in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minillama {__version__}\n"


def test_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert capsys.readouterr() == ("", "error: unknown command 'trian'; did you mean 'train'?\n")
    assert cli.main(["--frobnicate"]) == 2
    assert f"there are: {', '.join(cli.COMMANDS)}" in capsys.readouterr().err


def test_arguments_reach_the_command_and_its_status_comes_back(command: types.ModuleType) -> None:
    assert cli.main(["probe"]) == 3
    assert cli.main(["probe", "--n", "7"]) == 7


def test_help_names_the_program(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for prog, shown in ((None, "minillama probe"), ("python probe.py", "python probe.py")):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["probe", "--help"], prog=prog)
        out = capsys.readouterr().out
        assert out.startswith(f"usage: {shown} ") and "Return a number." in out and "How many." in out


def test_a_bad_argument_exits_2(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--n", "x"]) == 2
    said = "error: --n has a value of the wrong type\n  where: command line\n  found: 'x'\n  expected: a whole number\n"
    assert capsys.readouterr() == ("", said)
    assert cli.main(["probe", "--n", "x", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["what"] == "unknown option --json"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "--modell", "x"], "error: missing: --model\n(?s:.)*do: did you mean --model\\?"),
        (["generate", "--model", "x", "--temp", "1"], "unknown option --temp\n(?s:.)*did you mean --temperature\\?"),
        (["generate", "--model", "x", "--max-tokens", "1"], "did you mean --max-new-tokens\\?"),
        (["show"], "missing: RUN\n(?s:.)*do: minillama show --help"),
        (["infill", "--model", "x", "--dtype", "flat32"], "expected: auto, .*\n  do: did you mean 'float32'"),
        (["plan", "llama-tiny", "--batch"], "--batch needs a value"),
        (["tokenizer"], "no such subcommand\n(?s:.)*expected: train, merge, encode"),
        (["tokenizer", "encode", "a", "b"], "missing: --model\n(?s:.)*do: minillama tokenizer encode --model a b\n"),
        (["chat", "x", "--prompt", "hi"], "option --prompt\n(?s:.)*do: minillama generate .*has --prompt"),
        (["chat", "x", "--prompts", "hi"], "do: minillama generate has --prompts"),
        (["chat", "--prompt", "hi", "x"], "option --prompt\n(?s:.)*do: minillama generate .*has --prompt"),
        (["chat", "--model", "x"], "unknown option --model\n(?s:.)*do: MODEL stands without --model"),
        (["eval", "--model", "x"], "unknown option --model\n(?s:.)*do: MODEL stands without --model"),
        (["eval"], "missing: MODEL\n"),
        (["data", "clean", "english", "--outpt", "x"], "missing: --output\n(?s:.)*did you mean --output\\?"),
        (["data", "foo"], "belongs to no option\n(?s:.)*do: minillama data --help"),
        (["resume", "runs/a"], "unknown command 'resume'; did you mean train --out RUN --resume\\?"),
        (["help", "trian"], "unknown command 'trian'; did you mean 'train'"),
        (["generate", "runs/a b", "Alice"], "do: minillama generate --model 'runs/a b' ..."),
    ],
)
def test_errors_of_the_command_line_have_one_style(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "│" not in err
    assert re.search(said, err)


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_the_help_of_a_flag_says_what_it_leaves_out(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    found = re.search(r"--no-compile (.*?) --", text)
    assert found and found[1].startswith("Without the decode step in C++") and "default" not in found[1]


def test_help_as_a_command(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out.startswith("usage: minillama COMMAND")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["help", "probe"])
    assert "Return a number." in capsys.readouterr().out


def test_an_option_given_twice_is_refused(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--n", "7", "--n=8"]) == 1
    assert capsys.readouterr().err.startswith("error: --n is given more than once\n")


def test_a_command_may_read_its_own_arguments(command: types.ModuleType) -> None:
    command.parse = lambda words: Args(n=len(words))  # type: ignore[attr-defined]
    assert cli.main(["probe", "a", "--debug", "b"]) == 2


def test_input_errors_are_shown_without_a_traceback(
    command: types.ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command.run = raiser(InputError("no such model", where="x/config.json", fix="give a folder"))  # type: ignore[attr-defined]
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr() == ("", "error: no such model\n  where: x/config.json\n  do: give a folder\n")


def test_other_errors_take_one_line(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = raiser(TypeError("bad"))  # type: ignore[attr-defined]
    assert cli.main(["probe"]) == 1
    assert capsys.readouterr().err == "internal error: TypeError: bad; --debug shows the traceback\n"


@pytest.mark.parametrize("error", [TypeError("bad"), InputError("bad"), KeyboardInterrupt("bad")])
@pytest.mark.parametrize("argv", [["probe", "--debug"], ["--debug", "probe"]])
def test_debug_lets_the_traceback_through(command: types.ModuleType, error: BaseException, argv: list[str]) -> None:
    command.run = raiser(error)  # type: ignore[attr-defined]
    with pytest.raises(type(error), match="bad"):
        cli.main(argv)


def test_ctrl_c_is_quiet(command: types.ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    command.run = raiser(KeyboardInterrupt())  # type: ignore[attr-defined]
    assert cli.main(["probe"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); import minillama.__main__"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdout.close()  # the reader is gone before the usage is printed
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_trains_help_shows_the_defaults_of_the_default_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert "train.steps. (default: 2.5)" in out and "--train.batch_size INT" in out


def test_generates_device_is_named_as_it_was_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=64)
    Decoder(config).save_pretrained(tmp_path)
    byte_tokenizer().save(tmp_path)
    assert cli.main(["generate", "--model", str(tmp_path), "--device", "quantum", "--prompt", "x"]) == 1
    assert "where: --device\n  found: quantum" in capsys.readouterr().err


def test_a_draft_of_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=48, vocab_size=260, max_seq_len=64)
    for name, text in (("own", "abcd " * 20), ("draft", "dcba " * 20)):
        Decoder(config).save_pretrained(tmp_path / name)
        TokenizerTrainer("byte-bpe", 260)([text]).save(tmp_path / name)
    words = ["generate", "--model", str(tmp_path / "own"), "--prompt", "a", "--max-new-tokens", "2", "--draft"]
    assert cli.main([*words, str(tmp_path / "draft")]) == 1
    assert "the draft model has another tokenizer\n  where: --draft" in capsys.readouterr().err
    assert cli.main([*words, str(tmp_path / "own")]) == 0


def test_a_flag_that_can_only_be_turned_off_is_suggested_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "model", "--compile"]) == 2
    assert (
        "unknown option --compile\n  where: command line\n  do: did you mean --no-compile?" in capsys.readouterr().err
    )
