"""`minillama eval` by several processes gives what one gives: sums, table, files; it goes on where others stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from minillama import Decoder, ModelConfig
from minillama.commands.cli import main
from minillama.commands.progress import Progress
from minillama.errors import InputError
from minillama.evaluate.task import Item
from minillama.tokenizer import byte_tokenizer
from minillama.training import evaluation
from minillama.training.evaluation import costs, share

from .test_parallel import free_port

WORDS = ["a kite", "a stone", "a lamp", "the sea", "a horse", "some bread", "two shoes"]
ASKED = ["piqa", "siqa", "boolq"]
two_processes = pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models; 23 items of PIQA, one of SIQA, and ten questions on two passages."""
    tokenizer = byte_tokenizer()
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 96}
    for seed, name in enumerate(("one", "other")):
        torch.manual_seed(seed)
        Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **shape)).save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name, 96)
    for name in ASKED:
        (tmp_path / "data" / name).mkdir(parents=True)
    asked = [(f"{'Find' if i % 3 else 'Carry'} {WORDS[i % 7]} {i // 7}.", WORDS[i * i % 7]) for i in range(23)]
    write(
        tmp_path / "data/piqa/valid.jsonl", [{"goal": q, "sol1": f"look {a}", "sol2": f"{a} it is"} for q, a in asked]
    )
    (tmp_path / "data/piqa/valid-labels.lst").write_text("".join(f"{i * i % 3 % 2}\n" for i in range(23)))
    answers = {"answerA": "to sea", "answerB": "home", "answerC": "out, later"}
    question = {"context": "He left early.", "question": "Where to?", **answers, "correct": "B"}
    write(tmp_path / "data/siqa/dev.jsonl", [question])
    passages = ["The tide comes in twice a day.", "The tide mill stands still at night."]
    asked = [(passages[i % 2], f"is {word} wet {i // 7}") for i, word in enumerate([*WORDS, *WORDS[:3]])]
    questions = [{"question": q, "title": "Tide", "passage": p, "answer": len(q) % 2 == 0} for p, q in asked]
    write(tmp_path / "data/boolq/dev.jsonl", questions)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, records: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def work(rank: int, world: int, ports: Sequence[int], jobs: Sequence[Sequence[str]], folder: Path, odd: str) -> None:
    """Commands of one process, whose output goes to files."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    if odd and rank:
        evaluation.outcomes = failing if odd == "fails" else killed  # type: ignore[assignment]
    for number, (port, words) in enumerate(zip(ports, jobs, strict=True)):
        os.environ["MASTER_PORT"] = str(port)
        name = f"{number}-{rank}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(f"{name}.out", "w"))))
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(f"{name}.err", "w"))))
            assert main(words) == 0


def failing(*_: object) -> object:
    raise InputError("this tokenizer is odd", where="a file")


def killed(*_: object) -> object:
    time.sleep(2)  # the first process waits for what is left
    os._exit(9)


def spawn(world: int, jobs: Sequence[Sequence[str]], folder: Path, odd: str = "") -> Any:
    made = multiprocessing.spawn(work, (world, [free_port() for _ in jobs], jobs, folder, odd), world, join=not odd)
    return made


def assert_same(found: Path, expected: Path) -> None:
    """Summaries to the digit, sums but for rounding, each item once."""
    assert (found / "lm-eval.md").read_text() == (expected / "lm-eval.md").read_text()
    one, other = (json.loads((path / "lm-eval.json").read_text()) for path in (found, expected))
    assert one["sets"] == other["sets"] and one["mean"] == other["mean"]
    first, second = ({(i["task"], i["id"]): i for i in lines(path / "items.jsonl")} for path in (found, expected))
    assert first.keys() == second.keys() and len(first) == len(lines(found / "items.jsonl")) == 34
    for key, item in first.items():
        assert item.pop("nats") == pytest.approx(second[key].pop("nats"), rel=1e-5, abs=1e-5)
        assert item == second[key]


@two_processes
def test_two_processes_give_what_one_gives(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And each goes on where the other stopped; the first process alone speaks."""
    words = ["eval", "one", "--tasks", *ASKED, "--data", "data", "--against", "other", "--output"]
    assert main([*words, "alone"]) == 0
    alone = capsys.readouterr()
    (theirs,) = (folder / "evals").glob("other-*")
    theirs.rename(folder / "theirs")
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": w * 9}) + "\n" for w in (*WORDS, "sea " * 99)))
    scores = ["eval", "one", "--perplexity", "t.jsonl", "--context", "40", "--output"]
    assert main([*scores, "scores"]) == 0
    alone_scores = capsys.readouterr()
    text = (folder / "alone/items.jsonl").read_text().splitlines(keepends=True)
    for name in ("begun", "late"):
        (folder / name).mkdir()
        (folder / name / "model.json").write_text((folder / "alone/model.json").read_text())
    (folder / "begun/items.jsonl").write_text("".join(text[:9]) + text[9][:20])
    spawn(2, [[*words, "two"], [*words, "begun"], [*scores, "scores 2"]], folder)
    assert_same(folder / "two", folder / "alone")
    assert_same(folder / "begun", folder / "alone")
    (again,) = (folder / "evals").glob("other-*")
    assert len(lines(again / "items.jsonl")) == len(lines(folder / "theirs/items.jsonl")) == 34
    assert (folder / "0-0.out").read_text() == alone.out
    said = [line for line in alone.err.replace("alone", "two").splitlines() if not line.startswith("compiling")]
    assert (folder / "0-0.err").read_text().splitlines() == said
    assert "34 items, 9 of them known" in (folder / "1-0.err").read_text()
    assert (folder / "2-0.out").read_text() == alone_scores.out
    one, other = (json.loads((folder / name / "perplexity.json").read_text()) for name in ("scores", "scores 2"))
    assert one.pop("nats") == pytest.approx(other.pop("nats"), rel=1e-6) and one.keys() == other.keys()
    assert all((folder / f"{number}-1.{kind}").read_text() == "" for number in range(3) for kind in ("out", "err"))
    # what two processes began one ends
    text = (folder / "two/items.jsonl").read_text().splitlines(keepends=True)
    (folder / "late/items.jsonl").write_text("".join(text[:20]))
    assert main([*words, "late"]) == 0
    assert "34 items, 20 of them known" in capsys.readouterr().err
    assert_same(folder / "late", folder / "alone")


@two_processes
@pytest.mark.parametrize(
    "odd", ["fails", pytest.param("is killed", marks=pytest.mark.slow)]
)  # known by a minute's silence
def test_where_one_process_fails_all_end_with_one_message(folder: Path, odd: str) -> None:
    words = ["eval", "one", "--tasks", "piqa", "--data", "data", "--output", "out"]
    began = time.monotonic()
    made = spawn(2, [words], folder, odd)
    for process in made.processes:
        process.join(100)
    assert all(process.exitcode for process in made.processes) and time.monotonic() - began < 90
    said = "".join((folder / f"0-{rank}.err").read_text() for rank in range(2))
    if odd == "fails":
        assert said.count("error:") == 1 and "process 1 of 2: this tokenizer is odd" in said
    else:
        assert said.count("error:") == 1 and "process 1 of 2" in said
        assert "start all again with the same options: it goes on where it was" in said and "--resume" not in said
    known = lines(folder / "out/items.jsonl")  # of the first process
    assert 5 < len(known) < 23
    if odd == "is killed":  # as it says
        assert main(words) == 0
        assert len(lines(folder / "out/items.jsonl")) == 23


def item(number: int, context: str, *ends: str) -> Item:
    return Item(str(number), tuple((context, end) for end in ends), (), 0)


def test_items_that_begin_alike_stay_together() -> None:
    """Each is one process's, all have about as much to read, and of few prompts hardly any is read twice."""
    prompts = [f"{i * 7919 % 101} " * (30 + 9 * i) for i in range(9)]
    asked = [item(i, prompts[i % 9] + f"question {i * i % 37}", " yes" * (1 + i % 3), " no") for i in range(400)]
    for world in (2, 3, 4):
        parts = [share(asked, rank, world) for rank in range(world)]
        assert Counter(one.id for part in parts for one in part) == Counter(one.id for one in asked)
        reads = [sum(costs(part).values()) for part in parts]
        assert max(reads) < 1.3 * min(reads)
        where = Counter(prompt for part in parts for prompt in {one.pairs[0][0].split("q")[0] for one in part})
        assert sum(where.values()) <= len(prompts) + world - 1
    assert share(asked[:1], 0, 2) + share(asked[:1], 1, 2) == asked[:1] and share([], 0, 2) == []


def test_a_common_beginning_costs_once() -> None:
    asked = [item(0, "abcdef", "12"), item(1, "abcxyz", "123"), item(2, "abcxyz", "1", "2"), item(3, "q", "1")]
    assert costs(asked) == {"0": 8, "1": 6, "2": 2, "3": 2}


def test_progress_ends_at_the_total(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Progress] = []
    monkeypatch.setattr(Progress, "__exit__", lambda self, *_: made.append(self))
    assert main(["eval", "one", "--tasks", *ASKED, "--data", "data", "--output", "out"]) == 0
    assert made[0].done == made[0].total > 34


@two_processes
@pytest.mark.slow
def test_torchrun_starts_it(folder: Path) -> None:
    words = ["-m", "minillama", "eval", "one", "--tasks", *ASKED, "--data", "data", "--output"]
    alone = subprocess.run([sys.executable, *words, "alone"], capture_output=True, text=True, check=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = subprocess.run([*torchrun, *words, "two"], capture_output=True, text=True, check=True)
    assert found.stdout == alone.stdout
    assert_same(folder / "two", folder / "alone")
    judged = subprocess.run([*torchrun, *words[:3], "judge", "one", "other", "--judge", "one"], capture_output=True)
    assert judged.returncode and len(re.findall(rb"error: this works in one process", judged.stderr)) == 1
