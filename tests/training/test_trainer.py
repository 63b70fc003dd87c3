"""A run from beginning to end, and what must be equal between two ways of running it."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minillama.commands.cli import main
from minillama.errors import InputError
from minillama.inference.generate import generate
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.runs.config import RunConfig, load_run_config
from minillama.tokenizer import Tokenizer
from minillama.training.objectives import Data, Objective, make
from minillama.training.run import train

Make = Callable[..., RunConfig]


class Quiet:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, step: int, steps: int) -> None: ...

    def step(self, record: dict) -> None: ...

    def stop(self) -> None: ...

    def say(self, text: str = "") -> None:
        self.lines.append(text)


def run(config: RunConfig, out: Path, **options: bool) -> list[str]:
    report = Quiet()
    assert train(config, str(out), report=report, **options) == 0
    return report.lines


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_writes_what_the_design_says(tiny_config: Make, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lines = run(tiny_config("--train.steps", "60", "--validate.every", "30"), out)
    records = metrics(out)
    assert [r["step"] for r in records] == list(range(61))
    assert [r["step"] for r in records if "val_loss" in r] == [0, 30, 60]
    keys = {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_second", "mfu", "seconds"}
    assert all(keys <= r.keys() for r in records[1:])
    assert records[60]["tokens"] == 60 * 4 * 32
    losses = [r["val_loss"] for r in records if "val_loss" in r]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.7 * losses[0]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-54", "step-60"]
    assert load_run_config(str(out / "config.toml")) == tiny_config("--train.steps", "60", "--validate.every", "30")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = "\n".join(lines)
    assert "val_bits_per_byte" in text and "  | " in text
    for word in ("generate", "resume", "export", "plan"):
        assert any(line.strip().startswith(word) for line in lines)
    assert any(f"minillama generate --model {out / 'model'} --prompt" in line for line in lines)


def test_best_and_last_are_offered_as_the_run_was_typed(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    out = tmp_path / "run"
    rates = ("--optim.lr", "3", "--optim.schedule", "constant", "--optim.grad_clip", "0", "--optim.warmup_steps", "12")
    lines = run(tiny_config(*rates, "--validate.every", "1"), out)  # at first small, in the end a rate that undoes it
    losses = {r["step"]: r["val_loss"] for r in metrics(out) if r.get("val_loss") and r["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 12
    commands = {line[:16].strip(): line[16:] for line in lines if line.startswith("  ") and "|" not in line}
    assert commands["generate"].startswith(f"python generate.py --model {out / 'model'} --prompt")
    assert commands["best generate"].startswith(f"python generate.py --model {out / 'checkpoints' / f'step-{best}'} ")
    assert commands["resume"] == f"python train.py --out {out} --resume --train.steps 24"


def test_a_run_opens_as_its_model_or_newest_checkpoint(
    tiny_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    run(tiny_config(), out)
    capsys.readouterr()
    assert (
        main(["generate", "--model", str(out), "--prompt", "The", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    )
    text, said = capsys.readouterr()
    assert said == f"{out} is a run; its model: {out / 'model'}\n"
    shutil.rmtree(out / "model")
    assert (
        main(["generate", "--model", str(out), "--prompt", "The", "--max-new-tokens", "3", "--temperature", "0"]) == 0
    )
    assert capsys.readouterr() == (text, f"{out} is a run; its newest checkpoint: {out / 'checkpoints' / 'step-12'}\n")
    config = tiny_config("--train.init_from", str(out))
    assert config.train.init_from == config.tokenizer.path == str(out / "checkpoints" / "step-12")
    said = run(config, tmp_path / "next")
    assert any("optim.lr 0.01 suit random weights" in line and "--optim.lr 0.001" in line for line in said)
    quiet = run(tiny_config("--train.init_from", str(out), "--optim.lr", "1e-3"), tmp_path / "third")
    assert not any(line.startswith("warning: optim") for line in quiet)


def test_own_text_has_a_prompt_of_its_own(tiny_config: Make, text_file: Path, tmp_path: Path) -> None:
    assert (
        load_run_config("tiny").sample.prompts and not load_run_config("tiny", ["--data.sources", "a"]).sample.prompts
    )
    lines = run(tiny_config(), tmp_path / "run")
    sample = next(line for line in lines if line.startswith("  | ")).removeprefix("  | ")
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    text = text_file.read_text(encoding="utf-8")
    held_out = text[int(len(text) * 0.9) :].strip()
    assert held_out.startswith(sample[:4]) and len(tokenizer.encode(held_out[:4])) <= 12
    assert any("the last 10% of the text" in line for line in lines)


def test_the_model_folder_opens_here_and_in_transformers(tiny_config: Make, tmp_path: Path) -> None:
    run(tiny_config(), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    ours, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.encode("The heron stands")
    assert auto("The heron stands").input_ids == ids  # one document: no beginning-of-text token was learnt
    torch.testing.assert_close(ours(torch.tensor([ids])), theirs(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-5)
    greedy = theirs.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)[0, len(ids) :].tolist()
    assert list(generate(ours, tokenizer, ["The heron stands"], 10, Sampling(temperature=0))[0].tokens) == greedy


def test_same_seed_same_run_and_another_seed_another(tiny_config: Make, tmp_path: Path) -> None:
    for name, words in {"a": (), "b": (), "c": ("--seed", "2")}.items():
        run(tiny_config(*words), tmp_path / name)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


@pytest.mark.parametrize(
    "words", [(), ("--train.dropout", "0.2"), ("--train.dtype", "bfloat16"), ("--optim.muon_lr", "0.02")]
)
def test_stopped_and_resumed_equals_uninterrupted(tiny_config: Make, tmp_path: Path, words: tuple[str, ...]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(tiny_config(*words), whole)
    report = Quiet()

    class Stop(Quiet):
        def step(self, record: dict) -> None:
            if record["step"] == 7:
                signal.raise_signal(signal.SIGTERM)

    assert train(tiny_config(*words), str(parts), report=Stop()) == 128 + signal.SIGTERM
    assert not (parts / "model").exists()
    assert train(tiny_config(*words), str(parts), resume=True, report=report) == 0
    assert "resuming at step 7" in report.lines
    assert same(weights(whole), weights(parts))
    keep = ("step", "loss", "val_loss", "lr", "grad_norm", "tokens")
    assert [{k: r.get(k) for k in keep} for r in metrics(whole)] == [
        {k: r.get(k) for k in keep} for r in metrics(parts)
    ]


def test_accumulation_changes_nothing(tiny_config: Make, tmp_path: Path) -> None:
    run(tiny_config(), tmp_path / "whole")
    run(tiny_config("--train.micro_batch_size", "3"), tmp_path / "parts")
    a, b = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [r["loss"] for r in a[1:]] == pytest.approx([r["loss"] for r in b[1:]], rel=1e-4)
    assert a[-1]["val_loss"] == pytest.approx(b[-1]["val_loss"], rel=1e-3)


def test_checkpointing_changes_nothing(tiny_config: Make, tmp_path: Path) -> None:
    run(tiny_config(), tmp_path / "kept")
    run(tiny_config("--train.checkpointing", "true"), tmp_path / "recomputed")
    assert same(weights(tmp_path / "kept"), weights(tmp_path / "recomputed"))


def test_bfloat16_learns_like_float32(tiny_config: Make, tmp_path: Path) -> None:
    last = []
    for dtype in ("float32", "bfloat16"):
        run(tiny_config("--train.steps", "40", "--train.dtype", dtype), tmp_path / dtype)
        last.append(metrics(tmp_path / dtype)[-1]["val_loss"])
        assert all(t.dtype == torch.float32 for t in weights(tmp_path / dtype).values())
    assert last[1] == pytest.approx(last[0], rel=0.03) and last[1] != last[0]


def test_stages_freeze_and_change_the_rate(tiny_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "fixture.toml"
    tiny_config()
    stages = '\n[[stages]]\nuntil_step = 6\ntrainable = ["model.embed_tokens.*"]\noptim = {lr = 5e-3}\n'
    stages += "[[stages]]\nuntil_step = 12\n"
    path.write_text(path.read_text() + stages)
    config = load_run_config(str(path))
    run(config, tmp_path / "run")
    fresh = Decoder(config.model)
    fresh.init_weights(torch.Generator().manual_seed(config.seed))
    at_six = load_file(tmp_path / "run" / "checkpoints" / "step-6" / "model.safetensors")
    changed = {n for n, p in fresh.named_parameters() if not torch.equal(p, at_six[n])}
    assert changed == {"model.embed_tokens.weight"}
    final = weights(tmp_path / "run")
    assert all(not torch.equal(final[n], at_six[n]) for n in final)
    rates = [r["lr"] for r in metrics(tmp_path / "run")[1:]]
    assert rates[3] == pytest.approx(5e-3) and rates[6] > 5e-3


def test_characters_and_bytes(tiny_config: Make, tmp_path: Path) -> None:
    for kind in ("char", "bytes"):
        run(tiny_config("--tokenizer.kind", kind), tmp_path / kind)
        tokenizer = Tokenizer.load(tmp_path / kind / "model")
        assert tokenizer.decode(tokenizer.encode("The heron")) == "The heron"
        assert len(tokenizer.encode("heron")) == 5


def test_resume_without_a_checkpoint_starts_anew_and_a_finished_run_is_left_alone(
    tiny_config: Make, tmp_path: Path
) -> None:
    run(tiny_config("--train.steps", "3", "--validate.every", "9"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    lines = run(tiny_config(), tmp_path / "run", resume=True)
    assert any("starting at step 0" in line for line in lines)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    lines = run(tiny_config(), tmp_path / "run", resume=True)
    assert "is finished" in lines[0]
    assert before == {p: p.stat().st_mtime_ns for p in before}
    run(tiny_config("--train.steps", "18"), tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run")[-1]["step"] == 18


def test_a_second_signal_stops_at_once(tiny_config: Make, tmp_path: Path) -> None:
    written = tmp_path / "run" / "checkpoints" / "step-6"

    class Twice(Quiet):
        def step(self, record: dict) -> None:
            if record["step"] == 7:
                until = time.monotonic() + 60
                while not written.exists() and time.monotonic() < until:  # by another thread
                    time.sleep(0.01)
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), str(tmp_path / "run"), report=Twice())
    assert list(written.parent.iterdir()) == [written]


def test_ctrl_c_before_the_first_step_is_said(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("minillama.training.run.load_data", stopped)
    report = Quiet()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), str(tmp_path / "run"), report=report)
    assert report.lines[-1] == "stopped before the first step; nothing was written"
    assert not (tmp_path / "run").exists()


def test_a_missing_compiler_is_said_once_and_the_run_goes_on(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minillama.device.shutil.which", lambda name: None)
    lines = run(tiny_config("--train.compile", "true"), tmp_path / "run")
    assert sum(line.startswith("not compiling") for line in lines) == 1


@pytest.mark.slow
def test_compiled_training_equals_eager(tiny_config: Make, tmp_path: Path) -> None:
    run(tiny_config(), tmp_path / "eager")
    lines = run(tiny_config("--train.compile", "true"), tmp_path / "compiled")
    assert any("compiling" in line for line in lines)
    a, b = metrics(tmp_path / "eager"), metrics(tmp_path / "compiled")
    assert [r["loss"] for r in a[1:]] == pytest.approx([r["loss"] for r in b[1:]], rel=1e-3)


def test_resume_with_another_shape_is_refused_with_both(tiny_config: Make, tmp_path: Path) -> None:
    """A run that is finished too: the setting would be dropped without a word."""
    run(tiny_config(), tmp_path / "run")
    for words in ([], ["--train.steps", "18"]):
        with pytest.raises(InputError, match=r"another shape(?s:.*)model.n_layers = 3, was 2"):
            run(tiny_config(*words, "--model.n_layers", "3"), tmp_path / "run", resume=True)


def test_a_step_beyond_the_peak_has_it_measured_again(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = iter([1.0, 5.0, 1e18])  # beside another program, beside another program, alone
    monkeypatch.setattr("minillama.training.trainer.peak_flops", lambda *_: next(measured))
    monkeypatch.setattr("minillama.training.trainer.PEAK_EVERY", 2)
    run(tiny_config("--train.steps", "4"), tmp_path / "run")
    shares = [line["mfu"] for line in metrics(tmp_path / "run") if "mfu" in line]
    assert shares[:2] == [None, None] and all(share is not None and 0 < share < 1 for share in shares[2:])


def test_the_name_of_a_configuration_is_none() -> None:
    with pytest.raises(InputError, match="load_run_config"):
        train("tiny")  # type: ignore[arg-type]


def test_a_model_that_cannot_be_written_is_refused_before_it_is_trained(tiny_config: Make, tmp_path: Path) -> None:
    def changed(config: RunConfig, model: Decoder, tokenizer: Tokenizer, data: Data) -> Objective:
        model.model.layers[0].mlp = torch.nn.Linear(model.config.dim, model.config.dim)
        return make(config, model, tokenizer, data)

    with pytest.raises(InputError, match=r"(?s)layers\.0\.mlp.*torch\.save"):
        train(tiny_config(), str(tmp_path / "run"), objective=changed)
    assert not (tmp_path / "run/metrics.jsonl").exists()
