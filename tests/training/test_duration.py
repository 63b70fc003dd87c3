"""A run of some minutes, and compilation by what it cost and saved before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minillama.errors import InputError
from minillama.runs.config import RunConfig, load_run_config
from minillama.runs.report import make_report
from minillama.training.compile import FILE, TRIAL, Compiler
from minillama.training.duration import TIMED, Duration
from minillama.training.run import train

Make = Callable[..., RunConfig]


def test_minutes_become_steps(tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    config = tiny_config("--train.minutes", "0.1", "--validate.every", "0")
    assert train(config, str(out), report=make_report()) == 0
    written = load_run_config(str(out / "config.toml"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = written.train.steps
    assert records[-1]["step"] == steps > TIMED and written.train.minutes == 0
    validated = [record["step"] for record in records if "val_loss" in record]
    assert validated == [*range(0, steps, -(-steps // 4)), steps]
    assert f"{steps} steps in 0.1 minutes" in capsys.readouterr().out
    assert records[-1]["lr"] == pytest.approx(0.1 * config.optim.lr, rel=0.01)  # the schedule ends with the run


def test_steps_on_the_command_line_count(tiny_config: Make, tmp_path: Path) -> None:
    assert load_run_config("tiny").train.minutes > 0
    assert load_run_config("tiny", ["--train.steps", "5"]).train.minutes == 0
    with pytest.raises(InputError, match="given twice"):
        load_run_config("tiny", ["--train.steps", "5", "--train.minutes", "1"])


class Model:
    """What a compiler looks at."""

    device, dtype = torch.device("cpu"), torch.float32
    compiled = False

    def compile_blocks(self) -> None:
        self.compiled = True


@pytest.fixture
def decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[bool, str]]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("minillama.training.compile.compiler_missing", lambda device: None)

    def run(left: float, steps: list[float]) -> tuple[bool, str]:
        said: list[str] = []
        model: Any = Model()
        compiler, duration = Compiler("auto", model, SimpleNamespace(say=said.append)), Duration()  # type: ignore[arg-type]
        for seconds in steps:
            duration.seconds.append(seconds)
            compiler.after_step(duration, left)
        assert compiler.settled
        return model.compiled, "\n".join(said)

    return run


def test_compilation_pays_back_or_is_left(decide: Callable[..., tuple[bool, str]], tmp_path: Path) -> None:
    eager = [1.0] * TIMED
    assert decide(TRIAL / 2, eager) == (
        False,
        "not compiling: not measured on this machine, and the run is too short to try it",
    )
    compiled, said = decide(2 * TRIAL, [*eager, 40.8, *[0.8] * (TIMED - 1)])
    assert compiled and "to measure" in said
    (known,) = json.loads((tmp_path / "minillama" / FILE).read_text()).values()
    assert known == pytest.approx({"seconds": 40, "saved": 0.2})
    assert decide(190, eager) == (False, "not compiling: it took 40 s here, and would save 38 s of this run")
    compiled, said = decide(210, [*eager, 30.9, *[0.9] * (TIMED - 1)])
    assert compiled and "it took 40 s here and saved 20% of a step" in said
    (known,) = json.loads((tmp_path / "minillama" / FILE).read_text()).values()
    assert known == pytest.approx({"seconds": 30, "saved": 0.1})
    (tmp_path / "minillama" / FILE).write_text("{broken")
    assert not decide(TRIAL / 2, eager)[0]
