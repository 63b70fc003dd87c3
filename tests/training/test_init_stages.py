"""Runs that start from a model whose vocabulary has grown, and train it in stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
import torch
from safetensors.torch import load_file

from minillama import Decoder, ModelConfig, Tokenizer
from minillama.convert import convert
from minillama.errors import InputError
from minillama.runs.config import RunConfig, load_run_config, to_table
from minillama.runs.report import Report
from minillama.runs.sections import Stage
from minillama.tokenizer import TokenizerTrainer
from minillama.tokenizer.merge import extend
from minillama.training.optim.groups import change_settings, make_optimizers
from minillama.training.run import train
from minillama.training.trainable import trained

Make = Callable[..., RunConfig]
CHINESE = ["苍鹭站在浅水里，等着鱼游过。灯亮了，飞蛾来了；灯灭了，飞蛾走了。" * 9]
STAGES = """
[[stages]]
until_step = 4
trainable = ["model.embed_tokens.*"]
[[stages]]
until_step = 8
trainable = ["model.embed_tokens.*", "lm_head.*", "*.self_attn.*"]
[[stages]]
until_step = 12
"""


class Lines(Report):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def start(self, step: int, steps: int) -> None: ...
    def step(self, record: object) -> None: ...
    def stop(self) -> None: ...
    def say(self, text: str = "") -> None:
        self.said.append(text)


@pytest.fixture
def base(tiny_config: Make, tmp_path: Path) -> Path:
    """A model folder and, beside it, its vocabulary with Chinese pieces behind it."""
    train(tiny_config(), str(tmp_path / "base"), report=Lines())
    TokenizerTrainer("byte-bpe", 320)(CHINESE).save(tmp_path / "chinese")
    extend(tmp_path / "base/model", tmp_path / "chinese").tokenizer.save(tmp_path / "grown")
    return tmp_path / "base/model"


def grown_config(base: Path, tmp_path: Path, *words: str) -> RunConfig:
    text = tmp_path / "chinese.txt"
    text.write_text("\n".join(CHINESE * 20), encoding="utf-8")
    config = tmp_path / "fixture.toml"
    config.write_text(config.read_text() + (STAGES if STAGES not in config.read_text() else ""))
    given = ["--train.init_from", str(base), "--tokenizer.path", str(tmp_path / "grown"), "--data.sources", str(text)]
    return load_run_config(str(config), [*given, *words])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("init", ["normal", "mean"])
def test_old_rows_stay_and_new_ones_come(tied: bool, init: str, tmp_path: Path) -> None:
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=50, tie_embeddings=tied)
    model, tokens = Decoder(config), torch.randint(50, (2, 7))
    before, logits = {n: p.detach().clone() for n, p in model.named_parameters()}, model(tokens)
    model.resize_embeddings(70, init, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    grown = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert model.config.vocab_size == 70 and model.config.tensors().keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter[: len(before[name])], before[name])
        assert len(parameter) == (70 if name in grown else len(before[name]))
        if name in grown and init == "mean":
            assert torch.allclose(parameter[50:], before[name].mean(0).expand(20, -1), atol=1e-7)
        elif name in grown:
            assert 0.015 < parameter[50:].std() < 0.025
    assert torch.equal(model(tokens)[..., :50], logits)
    model(torch.tensor([[69]]))
    model.save_pretrained(tmp_path)
    again = Decoder.from_pretrained(tmp_path)
    assert again.config.tie_embeddings == tied and torch.equal(again(tokens + 15), model(tokens + 15))
    with pytest.raises(InputError, match="cannot lose rows"):
        model.resize_embeddings(69)


def test_the_published_share_of_the_first_stage() -> None:
    """Chinese-LLaMA-7B: the input embedding alone, 204,607,488 of 6,885,486,592, 2.97%."""
    seven = replace(ModelConfig.load("llama-7b"), vocab_size=49_953)
    with torch.device("meta"):
        model = Decoder(seven)
    stages = [Stage(1, trainable=t) for t in (("model.embed_tokens.*",), ("*embed*", "lm_head.*"), ("*",))]
    counts = [trained(stage, {"model": model}) for stage in stages]
    assert counts == [204_607_488, 2 * 204_607_488, 6_885_486_592] == [*counts[:2], seven.num_params()]
    tables = [(n, math.prod(shape)) for n, shape in seven.tensors().items() if stages[0].trains(n)]
    assert tables == [("model.embed_tokens.weight", counts[0])]
    assert f"{counts[0] / counts[2]:.2%}" == "2.97%"


def test_a_grown_vocabulary_is_trained_in_stages(base: Path, tmp_path: Path) -> None:
    report = Lines()
    train(
        grown_config(base, tmp_path, "--checkpoint.every", "4", "--checkpoint.keep", "9"),
        str(tmp_path / "run"),
        report=report,
    )
    rows = Tokenizer.load(tmp_path / "grown").vocab_size
    total, table = Decoder.from_pretrained(tmp_path / "run/model").config.num_params(), rows * 32
    said = [line for line in report.said if line.startswith("stage")]
    assert said[0] == f"stage 1 of 3, to step 4: trains {table:,} of {total:,} parameters ({table / total:.2%})"
    assert said[2] == f"stage 3 of 3, to step 12: trains {total:,} of {total:,} parameters (100.00%)"
    old = load_file(base / "model.safetensors")
    at = {i: load_file(tmp_path / f"run/checkpoints/step-{i}/model.safetensors") for i in (4, 8, 12)}
    names = set(at[4])

    def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
        return {name for name in names if not torch.equal(a[name][: len(b[name])], b[name][: len(a[name])])}

    assert changed(at[4], old) == {"model.embed_tokens.weight"}
    assert torch.equal(at[4]["lm_head.weight"][: len(old["lm_head.weight"])], old["lm_head.weight"])
    assert changed(at[8], at[4]) == {n for n in names if "self_attn" in n} | {
        "model.embed_tokens.weight",
        "lm_head.weight",
    }
    assert changed(at[12], at[8]) == names
    # frozen parameters have no optimizer state
    states = {i: load_file(tmp_path / f"run/checkpoints/step-{i}/optimizer.safetensors") for i in (4, 8, 12)}
    kept = {i: {key.rpartition("/")[0] for key in state} for i, state in states.items()}
    assert kept[4] == {"model.embed_tokens.weight"} and kept[8] == changed(at[8], at[4]) and kept[12] == names


def test_a_stage_forgets_what_it_freezes(tiny_config: Make, tmp_path: Path) -> None:
    tiny_config()
    path = tmp_path / "fixture.toml"
    path.write_text(
        path.read_text() + '\n[[stages]]\nuntil_step = 6\n[[stages]]\nuntil_step = 12\ntrainable = ["*norm*"]\n'
    )
    train(load_run_config(str(path)), str(tmp_path / "run"), report=Lines())
    state = load_file(tmp_path / "run/checkpoints/step-12/optimizer.safetensors")
    assert state and all("norm" in key for key in state)


def test_stopping_within_a_stage_changes_nothing(base: Path, tmp_path: Path) -> None:
    train(grown_config(base, tmp_path), str(tmp_path / "whole"), report=Lines())
    for steps in ("6", "8", "12"):
        config = grown_config(base, tmp_path, "--train.steps", steps, "--optim.schedule", "constant")
        train(config, str(tmp_path / "parts"), resume=steps != "6", report=Lines())
    train(grown_config(base, tmp_path, "--optim.schedule", "constant"), str(tmp_path / "once"), report=Lines())
    parts, once = (load_file(tmp_path / name / "model/model.safetensors") for name in ("parts", "once"))
    assert all(torch.equal(parts[name], once[name]) for name in once)


def test_what_cannot_start(base: Path, tmp_path: Path, tiny_config: Make) -> None:
    with pytest.raises(InputError, match=r"shape is that of train\.init_from[\s\S]*--model\.dim"):
        grown_config(base, tmp_path, "--model.dim", "64")
    TokenizerTrainer("byte-bpe", 310, pattern="gpt-2")(CHINESE).save(tmp_path / "other")
    config = grown_config(base, tmp_path, "--tokenizer.path", str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"other ids[\s\S]*at id 257[\s\S]*tokenizer merge"):
        train(config, str(tmp_path / "run"), report=Lines())
    path = tmp_path / "wrong.toml"
    path.write_text((tmp_path / "fixture.toml").read_text().replace('"lm_head.*"', '"head.*"'))
    with pytest.raises(InputError, match=r"no parameter has such a name\n  where: stages\.1\.trainable\n  found: head"):
        train(load_run_config(str(path)), str(tmp_path / "run"), report=Lines())


def test_the_command_line_reaches_every_stage(tiny_config: Make, tmp_path: Path) -> None:
    """Also those that change another setting; and what is saved is read back as it was."""
    tiny_config()
    path = tmp_path / "fixture.toml"
    path.write_text(
        path.read_text() + "\n[[stages]]\nuntil_step = 4\noptim = {lr = 5e-3}\n[[stages]]\nuntil_step = 12\n"
    )
    config = load_run_config(str(path), ["--optim.schedule", "constant", "--optim.lr", "0.5"])
    assert [config.optim_at(step).schedule for step in (0, 5)] == ["constant", "constant"]
    assert [config.optim_at(step).lr for step in (0, 5)] == [5e-3, 0.5]
    saved = tmp_path / "saved.toml"
    saved.write_text(tomli_w.dumps(to_table(config)))
    assert load_run_config(str(saved)) == config
    again = load_run_config(str(saved), ["--optim.beta1", "0.5"])
    assert [again.optim_at(step).beta1 for step in (0, 5)] == [0.5, 0.5] and again.optim_at(0).lr == 5e-3


def test_a_stages_settings_reach_the_optimizers(tiny_config: Make, tmp_path: Path) -> None:
    tiny_config()
    path = tmp_path / "fixture.toml"
    table = "weight_decay = 0.0, beta2 = 0.5, eps = 1e-3, muon_lr = 0.005"
    path.write_text(
        path.read_text() + f"\n[[stages]]\nuntil_step = 6\n[[stages]]\nuntil_step = 12\noptim = {{{table}}}\n"
    )
    config = load_run_config(str(path), ["--optim.muon_lr", "0.02"])
    optimizers = make_optimizers(Decoder(config.model), config.optim)
    change_settings(optimizers, config.optim_at(7))
    adamw, muon = (optimizer.param_groups for optimizer in optimizers)
    assert all((g["weight_decay"], g["betas"], g["eps"]) == (0.0, (0.9, 0.5), 1e-3) for g in adamw)
    assert muon[0]["weight_decay"] == 0 and muon[0]["lr_scale"] == 0.005 / 1e-2
    with pytest.raises(InputError, match=r"stages\.1\.optim\.muon_lr"):
        load_run_config(str(path))


def test_a_run_goes_on_without_the_model_that_it_started_from(base: Path, tmp_path: Path) -> None:
    config = grown_config(base, tmp_path, "--train.steps", "8", "--train.context", "32")
    train(config, str(tmp_path / "run"), report=Lines())
    base.rename(tmp_path / "elsewhere")
    (tmp_path / "grown").rename(tmp_path / "gone")
    again = load_run_config(str(tmp_path / "run/config.toml"), ["--train.steps", "10"])
    train(again, str(tmp_path / "run"), resume=True, report=Lines())
    rows = Tokenizer.load(tmp_path / "gone").vocab_size
    assert Decoder.from_pretrained(tmp_path / "run/model").config.vocab_size == rows


def test_a_stage_that_trains_nothing(tiny_config: Make, tmp_path: Path) -> None:
    tiny_config()
    path = tmp_path / "fixture.toml"
    path.write_text(path.read_text() + '\n[[stages]]\nuntil_step = 6\ntrainable = ["lm_head.*"]\n')
    config = load_run_config(str(path), ["--model.tie_embeddings", "true"])
    with pytest.raises(InputError, match="this stage trains nothing"):
        train(config, str(tmp_path / "run"), report=Lines())


@pytest.mark.parametrize("line", ["train = 5", "[train]\ninit_from = 5"])
def test_a_start_of_a_wrong_type_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"wrong\.toml:\d, train"):
        load_run_config(str(path))


@pytest.mark.parametrize("kind", ["gguf", "llama2c"])
def test_a_run_starts_from_a_model_of_another_format(kind: str, shared: Path, tmp_path: Path) -> None:
    """Its tokenizer is in the GGUF file, beside llama2.c's binary."""
    path, source = tmp_path / "a.gguf", shared / "models/stories260K/checkpoint_v1.bin"
    vocabulary = shared / "tokenizer/stories260K/tok512.bin"
    if kind == "gguf":
        convert(source, path, "gguf", "f32", vocabulary)
    else:
        path = tmp_path / "stories.bin"
        path.write_bytes(source.read_bytes())
        (tmp_path / "tokenizer.bin").write_bytes(vocabulary.read_bytes())
    (tmp_path / "a.txt").write_text("Once upon a time there was a girl named Lily. " * 200)
    words = ["--train.init_from", str(path), "--data.sources", str(tmp_path / "a.txt"), "--train.context", "32"]
    words += ["--data.cache", str(tmp_path / "cache"), "--optim.lr", "1e-8", "--optim.muon_lr", "0"]
    words += ["--train.steps", "1", "--train.batch_size", "1", "--sample.max_new_tokens", "0"]
    config = load_run_config("tiny", [*words, "--train.compile", "false", "--train.dtype", "float32"])
    assert train(config, str(tmp_path / "run"), report=Lines()) == 0
    before, after = Decoder.from_pretrained(path), Decoder.from_pretrained(tmp_path / "run/model")
    ids = torch.tensor([Tokenizer.load(tmp_path / "run/model").encode("Once upon a time")])
    torch.testing.assert_close(after(ids), before(ids), atol=1e-4, rtol=1e-4)
