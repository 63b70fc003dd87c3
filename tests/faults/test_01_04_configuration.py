"""Faults 1 to 4: typos, wrong values, impossible shapes and syntax errors in a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillama.commands import cli
from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.runs.config import load_run_config


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a user reads when the file is given to a command."""
    before = path.read_bytes()
    assert cli.main(["plan", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert path.read_bytes() == before
    return err


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_fault_01_typo_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "[model]\ndim = 64\nn_head = 4\n")
    message = refused(path, capsys)
    assert "unknown key 'n_head'" in message
    assert f"{path}:3, model.n_head" in message
    assert "did you mean 'n_heads'?" in message


@pytest.mark.parametrize(
    ("text", "place", "fix"),
    [
        ("[optim]\nlr = 1e-3\nlearning_rat = 1\nwarmup_step = 3\n", ":3, optim.learning_rat", None),
        ("[optim]\nwarmup_step = 3\n", ":2, optim.warmup_step", "did you mean 'warmup_steps'?"),
        ("[optmi]\nlr = 1e-3\n", ":1, optmi", "did you mean 'optim'?"),
        ('[[data.sources]]\npath = "a"\n[[data.sources]]\nwieght = 2\n', ":4, data.sources.1.wieght", "'weight'"),
    ],
)
def test_fault_01_typo_in_a_run(tmp_path: Path, text: str, place: str, fix: str | None) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        load_run_config(str(path))
    assert error.value.where == f"{path}{place}"
    if fix is None:
        assert "lr, schedule, warmup_steps" in str(error.value.expected)
    else:
        assert fix in str(error.value.fix)


def test_fault_01_typo_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError) as error:
        load_run_config("tiny", ["--optim.warmup_step", "3"])
    assert error.value.where == "command line"
    assert error.value.fix == "did you mean --optim.warmup_steps?"
    with pytest.raises(InputError) as error:
        load_run_config("tiny", ["--steps", "5"])
    assert error.value.fix == "did you mean --train.steps?"
    with pytest.raises(InputError) as error:  # of the options that end alike the one of that section
        load_run_config("tiny", ["--chekpoint.every", "5"])
    assert error.value.fix == "did you mean --checkpoint.every?"
    with pytest.raises(InputError) as error:  # what others call it
        load_run_config("tiny", ["--train.learning-rate", "1e-3"])
    assert error.value.fix == "did you mean --optim.lr?"
    with pytest.raises(InputError, match=r"--data.sources is given more than once"):
        load_run_config("tiny", ["--data.sources", "a", "--data.sources", "b"])
    assert load_run_config("tiny", ["--train.steps", "4", "--train.steps", "5"]).train.steps == 5
    with pytest.raises(InputError) as error:
        load_run_config("tiny", ["--config", "tiny"])
    assert "comes first" in str(error.value.fix)
    assert cli.main(["plan", "llama-7b", "--contxt", "3"]) == 2
    assert "unknown option --contxt\n  where: command line\n  do: did you mean --context?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--data", "texts"], "did you mean --data.sources?"),
        (["--train.lr", "1e-3"], "did you mean --optim.lr?"),
        (["--hlp"], "did you mean --help?"),
        (["texts"], "to train on it: --data.sources texts"),
        (["texts/a.txt"], "to train on it: --data.sources texts/a.txt"),
        (["runs/a"], "to go on with this run: --out runs/a --resume"),
        (["tinny"], "did you mean 'tiny'?"),
        (["--out", "runs/a/model", "--resume"], "resume its run: --out {}/runs/a"),
        (["--out", "base", "--resume"], "train from it: --train.init_from base"),
        (["--model.preset", "lama-tiny"], "did you mean 'llama-tiny'?"),
        (["--train.init_from", "runs/a/modle"], "did you mean runs/a/model?"),
        (["sft"], "minillama train makes it"),
    ],
)
def test_the_next_step_after_a_wrong_one(
    words: list[str], fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("texts/a.txt", "runs/a/config.toml", "runs/a/model/config.json", "base/config.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *words]) == 1
    said = capsys.readouterr().err
    assert said.endswith(f"  do: {fix.format(tmp_path)}\n")
    assert len(said) < 300  # no list of all presets


@pytest.mark.parametrize(
    ("text", "found", "expected"),
    [
        ("lr = -1e-3", "-0.001", "more than 0"),
        ("lr = nan", "nan", "a finite number, more than 0"),
        ("lr = inf", "inf", "a finite number, more than 0"),
        ('lr = "1e-3"', "'1e-3'", "a number"),
        ("beta2 = 1.0", "1.0", "at least 0 and less than 1"),
        ("warmup_steps = 1.5", "1.5", "a whole number"),
        ("decay_embeddings = 1", "1", "true or false"),
        ('schedule = "cosin"', "'cosin'", "'cosine' or 'wsd' or 'constant' or 'rsqrt'"),
    ],
)
def test_fault_02_wrong_type_or_range(tmp_path: Path, text: str, found: str, expected: str) -> None:
    path = write(tmp_path, f"name = 'x'\n[optim]\n{text}\n")
    with pytest.raises(InputError) as error:
        load_run_config(str(path))
    assert error.value.where == f"{path}:3, optim.{text.split()[0]}"
    assert str(error.value.found) == found
    assert error.value.expected == expected


@pytest.mark.parametrize(("value", "expected"), [("-0.001", "more than 0"), ("nan", "a finite number, more than 0")])
def test_fault_02_on_the_command_line(value: str, expected: str) -> None:
    with pytest.raises(InputError) as error:
        load_run_config("tiny", [f"--optim.lr={value}"])
    assert error.value.where == "command line, --optim.lr"
    assert (str(error.value.found), error.value.expected) == (value, expected)


@pytest.mark.parametrize(
    ("text", "field", "numbers", "nearest"),
    [
        ("dim = 100\nn_heads = 7", "n_heads", "dim = 100, n_heads = 7", "such as 5 or 10"),
        ("dim = 96\nn_heads = 12\nn_kv_heads = 5", "n_kv_heads", "n_heads = 12, n_kv_heads = 5", "such as 4 or 6"),
        ("dim = 20\nn_heads = 4", "head_dim", "head_dim = 5 (dim = 20, n_heads = 4)", "such as 6"),
        ("dim = 0", "dim", "0", "at least 1"),
        ("n_layers = -2", "n_layers", "-2", "at least 1"),
        ("n_kv_heads = -4", "n_kv_heads", "-4", "at least 0"),
    ],
)
def test_fault_03_impossible_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, field: str, numbers: str, nearest: str
) -> None:
    path = write(tmp_path, f"[model]\n{text}\n")
    message = refused(path, capsys)
    assert f"{path}:" in message
    assert f"model.{field}" in message
    assert f"found: {numbers}\n" in message
    assert nearest in message


def test_fault_03_in_python() -> None:
    with pytest.raises(InputError, match="do not divide the width"):
        ModelConfig(dim=100, n_heads=7)
    with pytest.raises(InputError, match="out of range"):
        ModelConfig(dim=-64)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("dim = 64\nn_heads = = 4\n", "2:11"),
        ("[model\ndim = 64\n", "1:7"),
        ("dim = [64\n", "2:1"),
        ("dim = 64\ndim = 32\n", "2:9"),
    ],
)
def test_fault_04_syntax_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, place: str) -> None:
    path = write(tmp_path, text)
    message = refused(path, capsys)
    assert "not valid TOML" in message
    assert f"where: {path}:{place}\n" in message
