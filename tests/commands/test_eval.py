"""`minillama eval`: a table, files, where it goes on, the paired difference, perplexity with its units."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import Decoder, ModelConfig
from minillama.commands.cli import main
from minillama.commands.progress import Progress
from minillama.config.lora import LoRAConfig
from minillama.evaluate import likelihood, multiple_choice
from minillama.model.lora import add_lora, lora_parameters, save_adapter
from minillama.tokenizer import byte_tokenizer
from minillama.tokenizer.blanks import BLANK_TOKENS

WORDS = ["a kite", "a stone", "a lamp", "the sea", "a horse", "some bread", "two shoes"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and seven records of PIQA."""
    torch.manual_seed(3)
    tokenizer = byte_tokenizer()
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 128}
    for name in ("one", "two"):
        Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **shape)).save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name, 128)
    data = tmp_path / "data" / "piqa"
    data.mkdir(parents=True)
    records = ({"goal": f"Find {word}.", "sol1": f"look {word}", "sol2": f"{word} it is"} for word in WORDS)
    (data / "valid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (data / "valid-labels.lst").write_text("0\n1\n1\n0\n1\n0\n1\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "one", "--tasks", "piqa", "--data", "data", "--output", "out"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.split()[:4] == ["set", "items", "acc", "acc_norm"] and "PIQA" in out and "57.14" in out  # four of seven
    found = json.loads((folder / "out/lm-eval.json").read_text())["sets"]["piqa"]
    items = lines(folder / "out/items.jsonl")
    right = [line["nats"].index(max(line["nats"])) == line["gold"] for line in items]
    assert (found["items"], found["acc"], found["constant"]) == (7, sum(right) / 7, 4 / 7)
    assert (folder / "out/lm-eval.md").read_text().startswith("| set | items |")
    assert {line["id"] for line in items} == {*map(str, range(7))}
    assert (found["split"], found["shots"], found["truncated"]) == ("validation", 0, 0)
    note = "split and number of few-shot examples: PIQA validation, 0."
    assert note in out and note in (folder / "out/lm-eval.md").read_text() and "lost tokens" not in out


def test_what_does_not_fit_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "one", "--tasks", "piqa", "--data", "data", "--output", "out", "--shots", "4"]) == 0
    out, err = capsys.readouterr()
    note = "PIQA: 7 of 7 items lost tokens on the left, for the model's context."
    assert note in out and note in err and note in (folder / "out/lm-eval-4shot.md").read_text()
    found = json.loads((folder / "out/lm-eval-4shot.json").read_text())["sets"]["piqa"]
    assert (found["truncated"], found["shots"]) == (7, 4)


def test_results_are_those_of_a_model_as_it_was_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By whatever path, and with `auto` as this device takes it."""
    words = ["--tasks", "piqa", "--data", "data", "--output", "out"]
    assert main(["eval", "one", *words]) == 0
    made = json.loads((folder / "out/model.json").read_text())
    assert (made["model"], made["dtype"], made["quantize"]) == (str(folder / "one"), "float32", "none")
    same = [[str(folder / "one")], ["two/../one"], ["one", "--dtype", "float32"], ["one", "--quantize", "auto"]]
    for one in same:
        assert main(["eval", *one, *words]) == 0 and "7 items, 7 of them known" in capsys.readouterr().err
    assert main(["eval", "one", *words, "--dtype", "bfloat16"]) == 1
    assert "found: dtype 'float32'" in capsys.readouterr().err


def test_it_goes_on_where_it_was(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after three items, with a line that was not written to its end."""
    words = ["eval", "one", "--tasks", "piqa", "--data", "data", "--output", "out"]
    score, asked = multiple_choice.score, []

    def stopping(model, items, *rest):
        asked.append(len(items))
        for number, found in enumerate(score(model, items, *rest)):
            if number == 3 and len(items) == 7:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(multiple_choice, "score", stopping)
    assert main(words) == 130
    with (folder / "out/items.jsonl").open("a") as file:
        file.write('{"task": "piqa", "id"')
    assert main(words) == 0
    assert [count for count in asked if count] == [7, 4]
    assert "7 items, 3 of them known" in capsys.readouterr().err
    resumed = {line["id"]: line["nats"] for line in lines(folder / "out/items.jsonl")}
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert main([*words[:-1], "whole"]) == 0
    for line in lines(folder / "whole/items.jsonl"):
        assert resumed[line["id"]] == pytest.approx(line["nats"], abs=1e-4)


def test_items_that_begin_alike_are_saved_as_they_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of 400 share a beginning; stopped before the last pass, most are known."""
    records = [{"goal": f"Find {i * 37 % 400:03}.", "sol1": f"look {i}", "sol2": f"{i} it is"} for i in range(400)]
    (folder / "data/piqa/valid.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "data/piqa/valid-labels.lst").write_text("0\n1\n" * 200)
    words, one, done = ["eval", "one", "--tasks", "piqa", "--data", "data", "--output"], likelihood._Reader._pass, []
    stop = [0]

    def counted(*given, **options):
        done.append(1)
        if len(done) == stop[0]:
            raise KeyboardInterrupt
        return one(*given, **options)

    monkeypatch.setattr(likelihood._Reader, "_pass", counted)
    assert main([*words, "whole"]) == 0
    stop[0] = 2 * len(done) - 1
    assert main([*words, "cut"]) == 130
    assert 200 < len(lines(folder / "cut/items.jsonl")) < 400
    assert main([*words, "cut"]) == 0
    found = {line["id"]: line["nats"] for line in lines(folder / "cut/items.jsonl")}
    assert len(found) == len(lines(folder / "cut/items.jsonl")) == 400
    for line in lines(folder / "whole/items.jsonl"):
        assert found[line["id"]] == pytest.approx(line["nats"], abs=1e-4)


def test_paired_difference_with_a_model_or_its_results(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["eval", "one", "--tasks", "piqa", "--data", "data"]
    assert main([*words, "--against", "two"]) == 0
    assert "difference: * of the model less that of two" in capsys.readouterr().out
    (other,), (own,) = (folder / "evals").glob("two-*"), (folder / "evals").glob("one-*")
    first = json.loads((own / "lm-eval.json").read_text())["sets"]["piqa"]["against"]
    assert main([*words, "--against", str(other)]) == 0
    assert json.loads((own / "lm-eval.json").read_text())["sets"]["piqa"]["against"] == first
    assert main([*words, "--against", str(own)]) == 0
    same = json.loads((own / "lm-eval.json").read_text())["sets"]["piqa"]["against"]
    assert (same["difference"], same["stderr"], same["items"]) == (0.0, 0.0, 7)


def test_a_difference_on_fewer_items_says_on_how_many(folder: Path) -> None:
    """And a file of the other results is as good as their folder."""
    words = ["--tasks", "piqa", "--data", "data", "--output"]
    assert main(["eval", "two", *words, "theirs", "--limit", "2"]) == 0
    assert main(["eval", "one", *words, "ours", "--against", "theirs/lm-eval.json"]) == 0
    assert re.search(r"\| PIQA \| 7 \|.*\], 2 items \|", (folder / "ours/lm-eval.md").read_text())
    assert json.loads((folder / "ours/lm-eval.json").read_text())["sets"]["piqa"]["against"]["items"] == 2
    assert main(["eval", "one", *words, "ours", "--limit", "2", "--against", "theirs"]) == 0
    assert "2 items" not in (folder / "ours/lm-eval.md").read_text()


def test_the_results_of_another_evaluation_stay_as_they_are(folder: Path) -> None:
    """It may be running: its last line is not complete yet."""
    words = ["--tasks", "piqa", "--data", "data", "--output"]
    assert main(["eval", "two", *words, "theirs"]) == 0
    path = folder / "theirs/items.jsonl"
    before = path.read_text()[:-9]
    path.write_text(before)
    assert main(["eval", "one", *words, "ours", "--against", "theirs"]) == 0
    assert path.read_text() == before
    assert json.loads((folder / "ours/lm-eval.json").read_text())["sets"]["piqa"]["against"]["items"] == 6


def test_the_other_model_has_its_own_tokenizer(folder: Path) -> None:
    """That of the first would read its texts in other tokens."""
    words = ["eval", "one", "--tasks", "piqa", "--data", "data", "--tokenizer", "one", "--against", "two"]
    assert main(words) == 0
    (other,) = (folder / "evals").glob("two-*")
    assert json.loads((other / "model.json").read_text())["tokenizer"] is None


def test_a_summary_keeps_the_sets_of_earlier_runs(folder: Path) -> None:
    siqa = folder / "data/siqa"
    siqa.mkdir()
    (siqa / "dev.jsonl").write_text(
        '{"context": "He left.", "question": "Why?", "answerA": "x", "answerB": "y", "answerC": "z", "correct": "A"}\n'
    )
    words = ["eval", "one", "--data", "data", "--output", "out", "--tasks"]
    assert main([*words, "piqa", "--against", "two"]) == 0 and main([*words, "siqa"]) == 0
    found = json.loads((folder / "out/lm-eval.json").read_text())
    assert list(found["sets"]) == ["piqa", "siqa"] and "against" not in found["sets"]["piqa"]
    table = (folder / "out/lm-eval.md").read_text()
    assert "| PIQA | 7 |" in table and "| SIQA | 1 |" in table and "| mean of * | 8 |" in table
    assert main([*words, "siqa", "--limit", "1"]) == 0  # other items
    assert list(json.loads((folder / "out/lm-eval.json").read_text())["sets"]) == ["siqa"]


@pytest.mark.parametrize("kind", ["gguf", "int8", "adapter", "rwkv-tiny", "bloom-tiny", "glm-tiny"])
def test_whatever_opens_is_evaluated(kind: str, folder: Path) -> None:
    """Sums of a GGUF file are its folder's; int8 weights and an adapter move them."""
    words, model = ["--tasks", "piqa", "--data", "data", "--limit", "2"], "one"
    if kind == "gguf":
        assert main(["convert", "one", "one.gguf", "--to", "gguf", "--dtype", "f32"]) == 0
        model = "one.gguf"
    elif kind == "int8":
        words += ["--quantize", "int8"]
    elif kind == "adapter":
        lora = add_lora(Decoder.from_pretrained(folder / "one"), LoRAConfig())
        with torch.no_grad():
            for parameter in lora_parameters(lora).values():
                parameter.add_(0.1)
        save_adapter(lora, folder / "lora")
        words += ["--adapter", "lora"]
    else:
        model = kind
        tokenizer = byte_tokenizer().with_special(BLANK_TOKENS if kind == "glm-tiny" else ())
        config = replace(ModelConfig.load(kind), vocab_size=tokenizer.vocab_size, max_seq_len=128, n_layers=2)
        Decoder(config).save_pretrained(folder / kind)
        tokenizer.save(folder / kind, 128)
    assert main(["eval", model, *words, "--output", "out"]) == 0
    found = [value for line in lines(folder / "out/items.jsonl") for value in line["nats"]]
    assert len(found) == 4 and all(-math.inf < value < 0 for value in found)
    if kind in ("gguf", "int8", "adapter"):
        assert main(["eval", "one", *words[:6], "--output", "plain"]) == 0
        plain = [value for line in lines(folder / "plain/items.jsonl") for value in line["nats"]]
        assert found == pytest.approx(plain, rel=1e-5 if kind == "gguf" else 0.2)
        assert kind == "gguf" or found != pytest.approx(plain, rel=1e-7)


def test_results_of_another_model_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tasks", "piqa", "--data", "data", "--output", "out"]
    assert main(["eval", "one", *words]) == 0
    before = (folder / "out/items.jsonl").read_text()
    assert main(["eval", "two", *words]) == 1
    assert "results of another model" in capsys.readouterr().err
    shutil.copy(folder / "two/model.safetensors", folder / "one/model.safetensors")  # retrained, under the same name
    assert main(["eval", "one", *words]) == 1
    assert (folder / "out/items.jsonl").read_text() == before


def test_perplexity_has_its_units(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.txt").write_text("the tide comes in\n" * 20)
    assert main(["eval", "one", "--perplexity", "t.txt"]) == 0
    out = capsys.readouterr().out
    for unit in ("nats per token", "perplexity per token", "perplexity per word", "bits per byte"):
        assert unit in out
    assert "bytes                 360" in out


def test_perplexity_is_written_and_takes_files_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.txt").write_text("the tide comes in\n" * 20)
    words = ["eval", "one", "--perplexity"]
    assert main([*words, "t.txt", "--output", "out", "--context", "100"]) == 0
    found = json.loads((folder / "out/perplexity.json").read_text())
    assert (found["text"], found["context"], found["bytes"], found["tokens"]) == ("t.txt", 100, 360, 360)
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / 360 / math.log(2))
    assert f"bits per byte         {found['bits_per_byte']:.6g}" in capsys.readouterr().out
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"name": "b"}\n')
    (folder / "none.jsonl").write_text('{"name": "b", "url": "c"}\n')
    (folder / "empty").mkdir()
    for name in ("hf:wikitext", "python-docs", "nowhere.txt", "bad.jsonl", "none.jsonl", "empty"):
        assert main([*words, name]) == 1
        err = capsys.readouterr().err
        assert "where: --perplexity" in err and "data." not in err and "hf:NAME" not in err, name
    assert main(["eval", "two", "--perplexity", "t.txt", "--output", "out"]) == 1
    assert "results of another model" in capsys.readouterr().err


def test_documents_are_scored_each_behind_its_own_bos(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["a b c d", "é a"]  # 7 and 4 bytes, each a token
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main(["eval", "one", "--perplexity", "t.jsonl"]) == 0
    pairs = (re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines())
    found = {name: float(value) for name, value in pairs}
    model, bos, nats = Decoder.from_pretrained(folder / "one").eval(), byte_tokenizer().bos_id, 0.0
    for text in texts:
        ids = byte_tokenizer().encode(text)
        with torch.inference_mode():
            logits = model(torch.tensor([[bos, *ids[:-1]]]))[0].log_softmax(-1)
        nats -= sum(logits[i, token].item() for i, token in enumerate(ids))
    assert [found[unit] for unit in ("documents", "tokens", "words", "bytes")] == [2, 11, 6, 11]
    for unit, value in (
        ("nats per token", nats / 11),
        ("perplexity per token", math.exp(nats / 11)),
        ("perplexity per word", math.exp(nats / 6)),
        ("bits per byte", nats / 11 / math.log(2)),
    ):
        assert found[unit] == pytest.approx(value, rel=2e-5)


def test_progress_is_that_of_windows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Progress, "advance", lambda self, amount: steps.append(amount))
    (folder / "t.txt").write_text("the tide comes in\n" * 20)
    assert main(["eval", "one", "--perplexity", "t.txt", "--context", "100"]) == 0
    assert sorted(steps) == [60, 100, 100, 100]


def test_perplexity_of_a_text_without_spaces(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "t.txt").write_text("潮水來了又去了" * 50, encoding="utf-8")
    assert main(["eval", "one", "--perplexity", "t.txt"]) == 0
    found = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    power = re.fullmatch(r" *10\^([0-9.]+), words end at spaces", found["perplexity per word"])
    nats = float(found["nats per token"]) * int(found["tokens"])
    assert power and float(power[1]) == pytest.approx(nats / math.log(10), abs=0.2)


def test_a_model_that_does_not_open_leaves_no_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text("{}")
    for model in ("adapter", "nowhere"):
        assert main(["eval", model, "--tasks", "piqa", "--data", "data"]) == 1
    assert "no such model" in capsys.readouterr().err and not (folder / "evals").exists()


def test_arguments_are_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--data", "data"], "either --tasks or --perplexity"),
        (["--tasks", "piqa"], "no folder of the sets"),
        (["--tasks", "pika", "--data", "data"], "no such evaluation set"),
        (["--tasks", "boolq", "--data", "data"], "files of BoolQ are missing"),
        (["--tasks", "piqa", "--data", "data", "--shots", "9"], "too few examples"),
        (["--tasks", "all", "--data", "data"], "files of BoolQ, SIQA, HellaSwag, WinoGrande, ARC-Easy, ARC-Challenge,"),
        (["--perplexity", "data/piqa/valid-labels.lst", "--context", "99999"], "--context"),
        (["--perplexity", "x", "--against", "two", "--shots", "3"], "where: --shots, --against"),
        (["--perplexity", "x", "--data", "data", "--style", "llama", "--limit", "1"], "--data, --style, --limit"),
        (["--tasks", "piqa", "--data", "data", "--context", "9"], "--tasks has no such option"),
    ):
        assert main(["eval", "one", *words]) == 1
        assert message in capsys.readouterr().err
