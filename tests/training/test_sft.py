"""Supervised fine-tuning: packed and single conversations, micro-batches, weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.data.instructions import Example, Instructions, Packing, collate
from minillama.data.packing import best_fit
from minillama.errors import InputError
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.runs.config import RunConfig, load_run_config
from minillama.tokenizer import Tokenizer
from minillama.training.gradients import accumulate
from minillama.training.objectives.sft import FineTuning
from minillama.training.objectives.unpadded import unpadded
from minillama.training.run import train

from .test_init_stages import Lines
from .test_several_models import StopAt
from .test_trainer import Quiet

Make = Callable[..., RunConfig]

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=61, max_seq_len=320)
LENGTHS = [3, 300, 17, 44, 151, 90, 5, 66, 31, 12, 255, 8]


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    """Conversations with prompts of weight 0 and two answers of unequal weights."""
    rng, found = np.random.default_rng(7), []
    for number, length in enumerate(lengths):
        ids = rng.integers(1, 61, length).astype(np.int32)
        weights = np.zeros(length, np.float32)
        weights[length // 3 : length // 2] = 0.5
        weights[length // 2 + 1 :] = 1 + number % 3
        found.append(Example(ids, weights, ids[: length // 3].tolist(), f"file:{number}"))
    return found


def model() -> Decoder:
    made = Decoder(CONFIG)
    made.init_weights(torch.Generator().manual_seed(2))
    return made


def data(packing: Packing, context: int = 320, lengths: Sequence[int] = LENGTHS) -> Instructions:
    made = examples(lengths)
    return Instructions.of(made, made[:4], context, packing)


def of(packing: Packing, rows: int, micro: int, context: int = 320) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step over all conversations."""
    made = model()
    objective = FineTuning(made, data(packing, context), 1, rows)
    losses = accumulate(objective, objective.batch(0), micro, torch.device("cpu"))
    return losses.loss, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


def by_hand() -> tuple[float, dict[str, Tensor]]:
    """The same, conversation by conversation, without weights of 0, rows or masks."""
    made, total, weight = model(), torch.zeros(()), 0.0
    for example in examples():
        ids, weights = torch.tensor(example.ids.astype(np.int64)), torch.tensor(example.weights)
        logits = made(ids[None, :-1])[0]
        total = total + (F.cross_entropy(logits, ids[1:], reduction="none") * weights[1:]).sum()
        weight += weights[1:].sum().item()
    (total / weight).backward()
    return total.item() / weight, {name: p.grad for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro", [1, 2, 4, 12])
@pytest.mark.parametrize("packing", ["none", "best-fit"])
def test_packed_and_single_rows_have_the_loss_and_gradients_of_each_alone(packing: Packing, micro: int) -> None:
    rows = len(best_fit([length - 1 for length in LENGTHS], 320)) if packing == "best-fit" else len(LENGTHS)
    assert rows == (4 if packing == "best-fit" else 12)
    expected, expected_grads = by_hand()
    loss, grads = of(packing, rows, micro)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], atol=1e-6, rtol=1e-5)


def test_packed_rows_of_compiled_code_have_the_loss_and_gradients_of_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whole rows, as GPUs get them: documents by the attention mask, padding and all."""
    monkeypatch.setattr("minillama.training.objectives.sft.unpadded", lambda batch, model: batch)
    expected, expected_grads = by_hand()
    for micro in (1, 4):
        loss, grads = of("best-fit", 4, micro)
        assert loss == pytest.approx(expected, abs=1e-6)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("packing", ["none", "best-fit", "wrap"])
def test_a_batch_without_padding_is_the_batch(packing: Packing) -> None:
    """Fewer tokens, those up to each sequence's last trained one; compiled blocks, or GPUs, get whole rows."""
    made, step = model(), data(packing, context=300)
    batch = FineTuning(made, step, 1, {"none": 12, "best-fit": 4, "wrap": 3}[packing]).batch(0)
    small = unpadded(batch, made)
    whole, less = (made.hidden(part.tokens, positions=part.positions, mask=part.mask) for part in (batch, small))
    kept = batch.kept
    torch.testing.assert_close(less[0], whole[kept], atol=1e-5, rtol=1e-5)
    assert torch.equal(small.targets[0], batch.targets[kept]) and torch.equal(small.weights[0], batch.weights[kept])
    assert small.weights.sum() == batch.weights.sum() and small.totals == batch.totals
    if packing != "wrap":
        last = [int(np.flatnonzero(example.weights)[-1]) for example in step.train]
        assert small.mask.segments is not None and sorted(small.mask.segments) == sorted(last)
    made.compile_blocks()
    assert unpadded(batch, made) is batch


def test_other_positions_and_mixers_keep_their_rows() -> None:
    for changes in ({"position": "alibi"}, {"mixer": "wkv", "mlp": "channel-mix", "position": "none", "n_kv_heads": 4}):
        made = Decoder(replace(CONFIG, **changes))  # type: ignore[arg-type]
        batch = FineTuning(made, data("none"), 1, 12).batch(0)
        assert unpadded(batch, made) is batch
        assert torch.isfinite(FineTuning(made, data("none"), 1, 12).loss(batch)[0]["loss"])


def test_a_conversation_does_not_see_its_neighbors() -> None:
    first, second = examples([20, 30])
    rows = collate([[first, second]], 64)
    assert rows.positions is not None and rows.documents is not None
    assert rows.positions[0].tolist() == [*range(19), *range(29), *range(16)]
    assert rows.documents[0].tolist() == [0] * 19 + [1] * 29 + [2] * 16
    objective = FineTuning(model(), data("best-fit"), 1, 4)
    batch = objective.batch(0)
    changed = batch.tokens.clone()
    assert batch.mask.documents is not None
    row = int((batch.mask.documents[:, 0] != batch.mask.documents[:, -1]).nonzero()[0])
    end = int((batch.mask.documents[row] == 0).sum())
    changed[row, :end] = (changed[row, :end] + 1) % 61
    before, after = (
        objective.model(ids, positions=batch.positions, mask=batch.mask) for ids in (batch.tokens, changed)
    )
    assert torch.equal(before[row, end:], after[row, end:]) and not torch.equal(before[row, :end], after[row, :end])


def test_a_packed_row_on_a_worked_example() -> None:
    """Conversations of 3, 2 and 4 targets: no target crosses from one into the next."""
    made = examples([4, 3, 5])
    rows = collate([made], 9)
    assert rows.positions is not None and rows.documents is not None
    assert rows.positions[0].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert rows.documents[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert rows.targets[0].tolist() == [token for example in made for token in example.ids[1:].tolist()]
    assert rows.weights[0].tolist() == [weight for example in made for weight in example.weights[1:].tolist()]


@pytest.mark.parametrize("packing", ["none", "best-fit", "wrap"])
def test_an_end_token_with_the_id_of_padding_is_trained(packing: Packing) -> None:
    """Rows are padded with 0, which is some tokenizers' EOS: weights are of slots, and not of ids."""
    made = [replace(example, ids=np.append(example.ids[:-1], np.int32(0))) for example in examples()]
    step, rows = Instructions.of(made, made[:4], 320, packing), {"none": 12, "best-fit": 4, "wrap": 3}[packing]
    batch = FineTuning(model(), step, 1, rows).batch(0)
    for part in (batch, unpadded(batch, model())):
        ends = part.weights[part.targets == 0]
        # wrap: those behind the last whole row are left out
        assert (ends > 0).sum() == len(made) if packing != "wrap" else 0 < len(made) - (ends > 0).sum() < 3
        assert part.weights.sum() == batch.totals["loss"]


def test_best_fit_on_a_worked_example() -> None:
    """Items 6, 5, 5, 3, 1 into rows of 10: 6, then 5 and 5, 3 and 1 beside 6."""
    assert best_fit([3, 6, 5, 1, 5], 10) == [[1, 0, 3], [2, 4]]
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 257, 2000).tolist()
    rows = best_fit(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert all(sum(lengths[i] for i in row) <= 256 for row in rows)
    assert len(rows) <= -(-sum(lengths) // 256) * 11 / 9 + 1  # the bound of best-fit decreasing


@pytest.mark.parametrize("packing", ["none", "best-fit", "wrap"])
def test_an_epoch_reads_every_answer_once(packing: Packing) -> None:
    made = data(packing, context=320)
    total = sum(example.weights[1:].sum() for example in made.train)
    rows = {"none": 12, "best-fit": 4, "wrap": 3}[packing]
    for epoch in range(2):
        seen = made.rows(5, epoch, rows).weights.sum()
        # wrap: a cut drops no target but those behind the last whole row
        assert seen == total if packing != "wrap" else 0 <= total + 0.5 * 12 - seen < 320 * 3
    first, again, other = ([made.rows(seed, step, 1).tokens.tolist() for step in range(12)] for seed in (5, 5, 6))
    assert first == again != other
    halves = [FineTuning(model(), made, 5, 4).batch(1, rank, 2) for rank in range(2)]
    whole = FineTuning(model(), made, 5, 4).batch(1)
    assert torch.equal(torch.cat([half.tokens for half in halves]), whole.tokens)
    assert all(half.totals == whole.totals for half in halves)


def test_wrapped_rows_are_the_conversations_one_after_the_other() -> None:
    made = data("wrap", context=50)
    rows = made.rows(1, 0, 5)
    joined = np.concatenate([made.train[int(i)].ids for i in _order(made)])
    assert np.array_equal(rows.tokens.ravel(), joined[:250]) and np.array_equal(rows.targets.ravel(), joined[1:251])


def test_wrapped_rows_without_a_trained_token_are_in_no_epoch() -> None:
    """Prompts of 60 and answers of 6 tokens in rows of 16: at most two rows in four have a target."""
    rng, found = np.random.default_rng(1), []
    for _ in range(5):
        ids, weights = rng.integers(1, 61, 66).astype(np.int32), np.repeat(np.float32([0, 1]), [60, 6])
        found.append(Example(ids, weights))
    made = Instructions.of(found, found, 16, "wrap")
    totals = [made.rows(3, step, 1).weights.sum() for step in range(60)]
    assert min(totals) > 0 and sum(totals) >= 60 * 30 / 10  # an epoch: at most 10 rows, 30 targets
    again = Instructions.of(found, found, 16, "wrap")  # a run that is resumed begins in the middle
    assert [again.rows(3, step, 1).weights.sum() for step in (41, 12)] == [totals[41], totals[12]]
    cut = [Example(found[0].ids, np.repeat(np.float32([0, 1]), [65, 1]))]  # behind the last whole row
    with pytest.raises(InputError, match="no row of joined conversations"):
        Instructions.of(cut, cut, 16, "wrap").rows(3, 0, 1)


def _order(made: Instructions) -> list[int]:
    """The order of the first epoch, told from the ids."""
    ids, _ = made._joined(1, 0)
    order, at = [], 0
    while at < len(ids):
        found = next(i for i, e in enumerate(made.train) if np.array_equal(e.ids, ids[at : at + len(e.ids)]))
        order.append(found)
        at += len(made.train[found].ids)
    return order


@pytest.mark.parametrize("packing", ["best-fit", "wrap"])
def test_held_out_loss_is_that_of_each_conversation(packing: Packing) -> None:
    """Also where training joins them."""
    objective = FineTuning(model(), data(packing), 1, 2)
    total = weight = 0.0
    for example in objective.data.val:
        ids, weights = torch.tensor(example.ids.astype(np.int64)), torch.tensor(example.weights)
        with torch.no_grad():
            nats = F.cross_entropy(objective.model(ids[None, :-1])[0], ids[1:], reduction="none")
        total, weight = total + float((nats * weights[1:]).sum()), weight + float(weights[1:].sum())
    for rows in (1, 3, 4):
        assert objective.validate(rows, 0)["val_loss"] == pytest.approx(total / weight, abs=1e-6)


def conversations_file(path: Path) -> Path:
    """Sums in words, each with its answer."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    records = [
        {"instruction": f"Which word is {number}, asked {time}?", "output": f"It is {word}."}
        for number, word in enumerate(words)
        for time in range(4)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("packing", ["best-fit", "wrap", "none"])
def test_a_run_over_conversations_makes_a_chat_model(tiny_config: Make, tmp_path: Path, packing: str) -> None:
    small = tiny_config("--train.steps", "2", "--model.max_seq_len", "128", "--train.context", "32")
    assert train(small, str(tmp_path / "base"), report=Quiet()) == 0
    base, file = tmp_path / "base/model", conversations_file(tmp_path / "sums.jsonl")
    words = ["--train.init_from", str(base), "--data.template", "auto", "--data.sources", str(file), "--train.context"]
    words += ["128", "--data.packing", packing, "--data.val_fraction", "0.2", "--train.steps", "12", "--train.dtype"]
    words += [
        "float32",
        "--sample.prompts",
        "Which word is 3?",
        "--sample.max_new_tokens",
        "4",
        "--validate.every",
        "12",
        "--train.batch_size",
        "2",
        "--data.on_error",
        "skip",
    ]
    report = Lines()
    assert train(tiny_config(*words), str(tmp_path / "whole"), report=report) == 0
    assert any("template chatml" in line for line in report.said)
    question = "  | user\n  | Which word is 3?\n  | assistant"  # a sample's prompt is one, and no text to continue
    assert any(line.startswith(question) for line in report.said)
    assert any(line.startswith("  chat") and "minillama chat" in line for line in report.said)
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] and all(line["answer_tokens"] > 0 for line in lines if "lr" in line)
    tokenizer, opened = Tokenizer.load(tmp_path / "whole/model"), open_model(tmp_path / "whole/model")
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert end is not None and {end, tokenizer.eos_id} <= opened.stop_ids
    assert tokenizer.chat_template is not None and "<|im_start|>" in tokenizer.chat_template
    assert opened.config.vocab_size == tokenizer.vocab_size == Tokenizer.load(base).vocab_size + 2
    assert train(tiny_config(*words), str(tmp_path / "cut"), report=StopAt(7)) == 143
    assert train(tiny_config(*words), str(tmp_path / "cut"), resume=True, report=Quiet()) == 0
    ours, again = (load_file(tmp_path / name / "model/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_conversations_that_cannot_be_trained_are_refused(tiny_config: Make, tmp_path: Path) -> None:
    file = conversations_file(tmp_path / "sums.jsonl")
    words = ["--data.template", "chatml", "--data.sources", str(file)]
    with pytest.raises(InputError, match="conversations train no tokenizer"):
        train(tiny_config(*words), str(tmp_path / "run"), report=Quiet())
    with pytest.raises(InputError, match="recurrent model cannot isolate"):
        load_run_config("sft", ["--train.init_from", ""], "rwkv-tiny")
    with pytest.raises(InputError, match="next-token prediction"):
        load_run_config("sft", ["--train.init_from", ""], "glm-tiny")
