"""Stages with data of their own, grades by difficulty, and the configurations of Chinese-LLaMA and Ziya."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from minillama.commands.cli import main
from minillama.evaluate.difficulty import buckets
from minillama.files import digest
from minillama.model import Decoder
from minillama.runs.config import RunConfig, load_run_config, to_table
from minillama.tokenizer import Tokenizer, TokenizerTrainer
from minillama.tokenizer.merge import extend
from minillama.training.data import load_data, load_stages
from minillama.training.objectives import make_staged
from minillama.training.run import train

from .test_init_stages import CHINESE, Lines
from .test_several_models import StopAt
from .test_trainer import Quiet

Make = Callable[..., RunConfig]
CONFIGS = Path(__file__).parents[2] / "configs/train"
SMALL = ["--train.dtype", "float32", "--train.context", "64", "--train.batch_size", "2", "--validate.every", "4"]
SMALL += ["--checkpoint.every", "4", "--train.micro_batch_size", "0", "--sample.max_new_tokens", "0"]


@pytest.fixture
def base(tiny_config: Make, tmp_path: Path) -> Path:
    config = tiny_config("--train.steps", "2", "--model.max_seq_len", "512", "--train.context", "32")
    assert train(config, str(tmp_path / "base"), report=Quiet()) == 0
    return tmp_path / "base/model"


def records(path: Path, word: str, count: int) -> Path:
    lines = [{"instruction": f"Say {word} {i} times", "output": " ".join([word] * (1 + i % 3))} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def edited(name: str, folder: Path, **changes: object) -> Path:
    """A configuration that ships, with other numbers of steps and paths, which the command line does not reach."""
    text = (CONFIGS / f"{name}.toml").read_text(encoding="utf-8")
    for before, after in changes.items():
        key, _, number = before.partition("__")
        text, count = re.subn(rf"({key} = )[\"]?{number}[\"]?\b", rf"\g<1>{after}", text)
        assert count
    (folder / f"{name}.toml").write_text(text.replace("curriculum/", f"{folder}/graded/"), encoding="utf-8")
    return folder / f"{name}.toml"


def test_a_graded_curriculum_is_trained_from_easy_to_hard(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "all.jsonl"
    parts = [records(tmp_path / f"{word}.jsonl", word, 12).read_text() for word in ("heron", "cart", "lamp")]
    file.write_text("".join(parts) + '{"nothing": 1}\n', encoding="utf-8")
    words = ["data", "difficulty", str(file), "--model", str(base), "--output", str(tmp_path / "graded")]
    assert main([*words, "--template", "ziya", "--batch-size", "2"]) == 1
    assert "all.jsonl:37" in capsys.readouterr().err and not (tmp_path / "graded").exists()
    assert main([*words, "--template", "ziya", "--batch-size", "2", "--on-error", "skip"]) == 0
    out, err = capsys.readouterr()
    assert "1 document left out" in err
    graded = [[json.loads(line) for line in (tmp_path / f"graded/bucket-{n}.jsonl").open()] for n in (1, 2, 3)]
    assert [len(part) for part in graded] == [12, 12, 12]
    for lower, higher in pairwise(graded):
        assert max(r["difficulty"] for r in lower) <= min(r["difficulty"] for r in higher)
    record = graded[1][3]
    model, tokenizer = Decoder.from_pretrained(base, torch.float32), Tokenizer.load(base)
    prompt = tokenizer.encode(f"<human>:{record['instruction']}\n<bot>:", bos=tokenizer.add_bos)
    answer = [*tokenizer.encode(record["output"]), tokenizer.eos_id]
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        expected = F.cross_entropy(model(ids[:, :-1])[0, len(prompt) - 1 :], ids[0, len(prompt) :])
    assert record["difficulty"] == pytest.approx(expected.item(), abs=1e-4)
    assert [int(step) for step in re.findall(r"until_step = (\d+)", out)] == [6, 12, 18]
    assert main([*words, "--template", "ziya"]) == 1  # the folder is there
    path = edited("ziya", tmp_path, until_step__100="4", until_step__200="8", until_step__300="12")
    more = ["--data.sources", str(file), "--data.on_error", "skip", "--data.val_fraction", "0.3"]
    config = load_run_config(str(path), [*SMALL, "--train.init_from", str(base), *more])
    _check_order(config, graded, base, tmp_path)


def _check_order(config: RunConfig, graded: list[list[dict[str, str]]], base: Path, tmp_path: Path) -> None:
    """The batches of each stage are of its bucket; what was held out of the whole is held out there too."""
    tokenizer = Tokenizer.load(base)
    data, _ = load_data(config, tokenizer, Quiet())
    stages, _ = load_stages(config, tokenizer, Quiet())
    objective = make_staged(config, Decoder.from_pretrained(base), tokenizer, data, stages)
    for step in range(12):
        assert all(f"bucket-{1 + step // 4}" in line for line in objective.where(step, [0, 1]))
    assert torch.equal(objective.batch(4).tokens, make_staged(config, *_parts(config, base)).batch(4).tokens)
    held_out = {example.ids.tobytes() for example in data.val}  # type: ignore[union-attr]
    assert {e.ids.tobytes() for part in stages for e in part.val} == held_out  # type: ignore[union-attr]
    config = replace(config, train=replace(config.train, steps=12))
    assert to_table(config)["stages"][1]["data"].keys() == {"sources"}
    assert train(config, str(tmp_path / "whole"), report=Quiet()) == 0
    assert train(config, str(tmp_path / "cut"), report=StopAt(6)) == 143
    assert train(config, str(tmp_path / "cut"), resume=True, report=Quiet()) == 0
    assert digest(tmp_path / "whole/model/model.safetensors") == digest(tmp_path / "cut/model/model.safetensors")
    lines, again = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    measures = ["step", "loss", "val_loss", "stage_val_loss"]
    assert [[line.get(m) for m in measures] for line in lines] == [[line.get(m) for m in measures] for line in again]
    assert sum("stage_val_loss" in line for line in lines) == 4


def _parts(config: RunConfig, base: Path):  # type: ignore[no-untyped-def]
    tokenizer = Tokenizer.load(base)
    data, stages = load_data(config, tokenizer, Quiet())[0], load_stages(config, tokenizer, Quiet())[0]
    return Decoder.from_pretrained(base), tokenizer, data, stages


def test_buckets_by_hand() -> None:
    assert buckets([5.0, 1.0, 4.0, 2.0, 3.0], 2) == [[1, 3], [0, 2, 4]]


def test_chinese_llama_then_chinese_alpaca(base: Path, text_file: Path, tmp_path: Path) -> None:
    """Embeddings, then attention too, on text; then all weights on instructions."""
    TokenizerTrainer("byte-bpe", 320)(CHINESE).save(tmp_path / "chinese")
    extend(base, tmp_path / "chinese").tokenizer.save(tmp_path / "grown")
    path = edited("chinese-llama", tmp_path, until_step__3000="4", until_step__9000="8", steps__9000="8")
    words = [*SMALL, "--train.init_from", str(base), "--data.sources", str(text_file)]
    words += ["--tokenizer.path", str(tmp_path / "grown")]
    report = Lines()
    assert train(load_run_config(str(path), words), str(tmp_path / "llama"), report=report) == 0
    assert sum(line.startswith("stage ") for line in report.said) == 2
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "llama/model"))
    changed = {name for name in before if not torch.equal(after[name][: len(before[name])], before[name])}
    assert any("self_attn" in name for name in changed) and not any("mlp" in name or "norm" in name for name in changed)
    words = [*SMALL, "--train.init_from", str(tmp_path / "llama/model"), "--train.steps", "4"]
    words += ["--data.val_fraction", "0.3", "--data.sources"]
    config = load_run_config("chinese-alpaca", [*words, str(records(tmp_path / "zh.jsonl", "灯", 30))])
    assert train(config, str(tmp_path / "alpaca"), report=Quiet()) == 0
    trained = load_file(tmp_path / "alpaca/model/model.safetensors")
    assert all(not torch.equal(trained[name], after[name]) for name in after)


def test_a_stage_of_text_before_one_of_conversations(base: Path, text_file: Path, tmp_path: Path) -> None:
    """One run: pretraining on text first, the held-out loss that of the conversations."""
    file = records(tmp_path / "all.jsonl", "heron", 20)
    sources = f"[{{ path = {json.dumps(str(text_file))} }}]"
    path = tmp_path / "both.toml"
    path.write_text(
        f'[data]\nsources = [{{ path = "{file}" }}]\ntemplate = "ziya"\nval_fraction = 0.3\n'
        "[[stages]]\nuntil_step = 4\n"
        f'data = {{ sources = {sources}, template = "" }}\n[[stages]]\nuntil_step = 8\n',
        encoding="utf-8",
    )
    config = load_run_config(str(path), [*SMALL, "--train.init_from", str(base), "--train.steps", "8"])
    assert train(config, str(tmp_path / "run"), report=Quiet()) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert ["answer_tokens" in line for line in lines[1:]] == [False] * 4 + [True] * 4
    assert "stage_val_bits_per_byte" in lines[4] and "stage_val_loss" not in lines[8] and "val_loss" in lines[8]
    assert Tokenizer.load(tmp_path / "run/model").chat_template is not None
