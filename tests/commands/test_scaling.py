"""`minillama scaling fit|plan|sweep`: what is printed, what is refused, and that a plan stays light."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.scaling.laws import Law

EPOCH = Path(__file__).resolve().parents[2].parent / "shared/data/scaling/epoch.csv"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    law, rows = Law.load("chinchilla"), ["params,tokens,loss"]
    for flops in np.geomspace(1e18, 1e20, 5):
        for params in law.optimum(flops)[0] * 2.0 ** np.arange(-2, 3):
            tokens = flops / 6 / params
            rows.append(
                f"{params!r},{tokens!r},{law.loss(params, tokens)!r}".replace("np.float64(", "").replace(")", "")
            )
    (tmp_path / "runs.csv").write_text("\n".join(rows))
    return tmp_path / "runs.csv"


def test_fit_prints_all_three(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "fit", str(table), "--bootstrap", "20"]) == 0
    said = capsys.readouterr().out
    for word in (
        "approach 2, IsoFLOP parabolas",
        "approach 3, parametric loss",
        "alpha = 0.339171",
        "C^0.4565",
        "100x",
    ):
        assert word in said, word
    assert "approach 1, envelope: the envelope has too few sizes" in said
    assert said.count("line ") == 25 and "by the count of N" not in said


def test_fit_as_json_and_as_a_law(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "scaling",
        "fit",
        str(table),
        "--bootstrap",
        "20",
        "--approach",
        "3",
        "--output",
        str(tmp_path / "law.toml"),
    ]
    assert main([*words, "--json", "--figure", str(tmp_path / "figures/fit.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]["3"]["law"]["alpha"] == pytest.approx(0.33917084, rel=1e-5)
    assert len(found["table"]["points"]) == 25 and not found["failed"]
    assert (tmp_path / "figures/fit.png").stat().st_size > 10_000
    law = Law.load(str(tmp_path / "law.toml"))
    assert law.beta == found["fits"]["3"]["law"]["beta"] and len(law.samples) == 20
    assert main(["scaling", "plan", "--flops", "1e21", "--constants", str(tmp_path / "law.toml"), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["optimum"] == pytest.approx((2.21695e9, 7.51782e10), rel=1e-4)
    assert main(["scaling", "plan", "--flops", "1e22", "--constants", str(tmp_path / "law.toml")]) == 0
    assert "note: 100 times the FLOPs of the largest run" in capsys.readouterr().out


def test_epochs_fit_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    if not EPOCH.exists():
        pytest.skip("../shared/data/scaling is not here")
    assert main(["scaling", "fit", str(EPOCH), "--drop", "5", "--approach", "3", "--bootstrap", "0"]) == 0
    said = capsys.readouterr().out
    for word in ("240 runs", "A = 477.826", "B = 2143.42", "E = 1.81722", "alpha = 0.34731", "beta = 0.367172"):
        assert word in said, word


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit"], "nothing to fit"),
        (["fit", "none.csv"], "cannot read none.csv"),
        (["fit", "none"], "not the folder of a run"),
        (["fit", "a.csv", "b.csv"], "found: a.csv, b.csv"),
        (["fit", "none.csv", "--budgets", "0", "1e19"], "more than 0"),
        (["fit", "none.csv", "--bootstrap", "1"], "0, or 20 or more"),
        (["fit", "none.csv", "--figure", "x.jpg"], ".png, .svg, .pdf"),
        (["sweep", "--figure", "x.jpg"], ".png, .svg, .pdf"),
        (["plan", "--flops", "1"], "beyond what is searched"),
        (["plan", "--flops", "1e21", "--unique-tokens", "1"], "beyond what is searched"),
        (["plan", "--params", "1e9", "--inference-tokens", "1e30"], "beyond what is searched"),
        (["plan"], "a plan starts from one number"),
        (["plan", "--flops", "1e20", "--days", "3"], "found: flops, days"),
        (["plan", "--flops", "-1"], "at least 0"),
        (["plan", "--flops", "1e20", "--mfu", "2"], "at most 1"),
        (["plan", "--flops", "1e20", "--constants", "epoc"], "did you mean 'epoch'"),
        (["sweep", "--budgets", "2e12", "1e12"], "budgets must rise"),
        (["sweep", "scalin"], "did you mean 'scaling'"),
    ],
)
def test_errors(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scaling", *words]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_runs_that_no_approach_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.csv").write_text("params,tokens,loss\n1e6,2e7,4\n2e6,1e7,4.1\n")
    assert main(["scaling", "fit", str(tmp_path / "runs.csv"), "--output", str(tmp_path / "x.toml")]) == 1
    said = capsys.readouterr().err
    assert all(f"approach {i}:" in said for i in (1, 2, 3)) and not (tmp_path / "x.toml").exists()


def test_a_tables_losses_are_in_the_unit_that_is_named(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scaling", "fit", str(table), "--bootstrap", "0", "--approach", "3", "--loss", "bits"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "loss (3)  bits per byte" in said and re.search(r"line 2 .* nan +\d\.\d{4}\n", said)


def test_a_loss_above_that_of_a_guess_is_no_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scaling", "plan", "--vocab-size", "2048", "--context", "256", "--flops"]
    assert main([*words, "1e12"]) == 0
    assert "note: no prediction: a guess among 2,048 tokens has 7.625 nats" in capsys.readouterr().out
    assert main([*words, "1e18"]) == 0
    assert "no prediction" not in capsys.readouterr().out


def test_dropping_all_runs_is_refused(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "fit", str(table), "--drop", "25"]) == 1
    assert "no run would be left" in capsys.readouterr().err


def test_only_the_parametric_law_is_written(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "fit", str(table), "--approach", "2", "--output", str(tmp_path / "x.toml")]) == 1
    assert "only approach 3" in capsys.readouterr().err


def plan_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["scaling", "plan", *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_plan_by_days(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan_json(capsys, "--days", "10", "--gpus", "8", "--tflops", "100", "--mfu", "0.5")
    assert found["flops"] == pytest.approx(10 * 86400 * 8 * 100e12 * 0.5) and found["days"] == pytest.approx(10)
    shape = ModelConfig(**found["shape"])  # type: ignore[arg-type]
    assert found["params"] == shape.num_params(embedding=False) == found["parameters"]["head"]  # type: ignore[index]
    small = plan_json(capsys, "--flops", "1e15", "--vocab-size", "2048", "--context", "256")
    assert small["shape"]["vocab_size"] == 2048 and small["shape"]["max_seq_len"] == 256  # type: ignore[index]


def test_plan_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--params", "13e9", "--inference-tokens", "2e12", "--constants", "chinchilla"]
    assert main(["scaling", "plan", *words]) == 0
    said = capsys.readouterr().out
    for word in ("N 7.12e+09, D 1.295e+12", "32 layers of width 4096", "16.3% fewer FLOPs", "196 per parameter"):
        assert word in said, word
    assert "note: no intervals" in said and said.isascii()
    assert main(["scaling", "plan", "--flops", "1e21", "--unique-tokens", "5e9"]) == 0
    said = capsys.readouterr().out
    assert "epochs" in said and "no intervals" not in said


def test_a_plan_loads_no_torch() -> None:
    code = (
        "import sys; from minillama.commands.cli import main\n"
        "assert main(['scaling', 'plan', '--flops', '1e21', '--unique-tokens', '1e9']) == 0\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'rich'} & set(sys.modules) - {'rich'}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n" and "predicted loss" in done.stdout


def test_the_pages_plans_and_fit_are_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/scaling.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(.*?)```", page, re.S)
    shown = re.search(r"```\n(optimum.*?)```", page, re.S)
    assert block and shown
    plans = [
        line for line in block[1].splitlines() if line.startswith("minillama scaling plan") and "law.toml" not in line
    ]
    assert len(plans) == 4
    for line in plans:
        assert main(shlex.split(line, comments=True)[1:]) == 0
        said = capsys.readouterr().out
        assert "predicted loss" in said
        if "--days" in line:
            assert said == shown[1]
    if not EPOCH.exists():
        pytest.skip("../shared/data/scaling is not here")
    (tmp_path / "docs").mkdir()
    (tmp_path / "epoch.csv").write_bytes(EPOCH.read_bytes())
    monkeypatch.chdir(tmp_path)
    command = re.search(r"(minillama scaling fit epoch.csv.*?)```", page, re.S)
    assert command
    assert main([*shlex.split(command[1].replace("\\\n", " "))[1:], "--bootstrap", "0"]) == 0
    said = capsys.readouterr().out
    for word in ("A = 477.826", "B = 2143.42", "E = 1.81722", "C^0.5139", "C^0.5146", "C^0.4806"):
        assert word in said, word
    assert (tmp_path / "docs/scaling.png").exists()
