"""Rewards together: weights, parts, reward models as in training, LLaMA 2's gate, pass@k."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import tensor

from minillama.config import ModelConfig
from minillama.data import preference_set
from minillama.data.prompts import Prompt, Prompts
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.evaluate.rewards import Rewards, check_context, gated, pass_at_k, whitened
from minillama.evaluate.rules import Answer, Reward
from minillama.model import Decoder
from minillama.model.heads import scores, with_score
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.template import load_template, special_tokens
from minillama.tokenizer.train import byte_tokenizer, train_byte_bpe

SHAPE = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=257, max_seq_len=64)
TOKENIZER = byte_tokenizer()
END = 256


def reward_model(path: Path, seed: int) -> str:
    model = Decoder(SHAPE)
    model.init_weights(torch.Generator().manual_seed(seed))
    made = with_score(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        made.score.weight.mul_(40)  # type: ignore[union-attr]
    made.save_pretrained(path)
    TOKENIZER.save(path)
    return str(path)


def answers() -> list[Answer]:
    given = [([7, 8, 9], "ab", True), ([7], "c", False), ([7, 8], "defgh", True), ([9, 9, 9, 9], "", True)]
    return [
        Answer("P", [*map(ord, text), *([END] if ended else [])], text, {"answer": "c"}, ids, ended)
        for ids, text, ended in given
    ]


def test_the_sum_and_its_parts() -> None:
    rewards = Rewards([Reward("verified", 2.0), Reward("length", -0.5, maximum=2)], TOKENIZER, END)
    scored = rewards(answers())
    assert scored.parts["verified"].tolist() == [0, 1, 0, 0]
    assert scored.parts["length"].tolist() == pytest.approx([2 / 3, 1, 1 / 3, 1])
    assert scored.total.tolist() == pytest.approx([-1 / 3, 1.5, -1 / 6, -0.5])
    one = Rewards([Reward("verified"), Reward("ended")], TOKENIZER, END)([Answer("P", [1], "c", {})])
    assert one.total.isnan().all() and one.parts["ended"].tolist() == [1]
    shown = Rewards([Reward("verified", 0.0), Reward("ended")], TOKENIZER, END)([Answer("P", [1], "c", {})])
    assert shown.total.tolist() == [1] and shown.parts["verified"].isnan().all()


def test_names_are_told_apart() -> None:
    with pytest.raises(InputError, match="same name"):
        Rewards([Reward("length"), Reward("length")], TOKENIZER, END)
    assert len(Rewards([Reward("length"), Reward("length", label="short")], TOKENIZER, END)(answers()).parts) == 2
    with pytest.raises(InputError, match="no reward"):
        Rewards([], TOKENIZER, END)


def test_a_reward_model_scores_the_ids_of_its_training(tmp_path: Path) -> None:
    """At the end token, put behind an answer that was cut off; whatever stands beside it in the batch."""
    path = reward_model(tmp_path / "rm", 3)
    rewards = Rewards([Reward(path)], TOKENIZER, END)
    together = rewards(answers()).total
    model = rewards.models[path]
    assert isinstance(model, Decoder) and not any(p.requires_grad for p in model.parameters())
    for answer, found in zip(answers(), together, strict=True):
        ids = [*answer.prompt_ids, *answer.ids] + ([] if answer.ended else [END])
        expected = scores(model, tensor([ids]))[0, -1]
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rewards([answer]).total[0], found, atol=1e-5, rtol=1e-5)
    assert together.std() > 0.1


def test_answers_are_scored_by_the_ids_of_training_from_the_record_on(tmp_path: Path) -> None:
    """Template, BOS and end token: of a chat model whose turns do not end with EOS, also where it wrote EOS instead."""
    tokenizer = TOKENIZER.with_special(special_tokens("chatml"))
    template, file = load_template("chatml", tokenizer), tmp_path / "r.jsonl"
    lines = [{"prompt": f"Q{i}?", "chosen": "good " * (1 + i), "rejected": "bad"} for i in range(6)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = preference_set.load([Source(path=str(file))], template, tokenizer, 64, 0.5)
    asked = Prompts.load([Source(path=str(file))], template, tokenizer, 64, 0.5)
    model = Decoder(replace(SHAPE, vocab_size=tokenizer.vocab_size))
    model.init_weights(torch.Generator().manual_seed(3))
    made = with_score(model, torch.Generator().manual_seed(3))
    made.score.weight.data.mul_(40)  # type: ignore[union-attr]
    made.save_pretrained(tmp_path / "rm")
    tokenizer.save(tmp_path / "rm")
    rewards = Rewards([Reward(str(tmp_path / "rm"))], tokenizer, asked.end_id)
    rows = {row.where: row for row in (*trained.train, *trained.val)}
    assert asked.end_id == tokenizer.backend.token_to_id("<|im_end|>") != tokenizer.eos_id and len(rows) == 6
    for prompt in (*asked.train, *asked.val):
        row = rows[prompt.where]
        for ids in row.answers:
            text, whole = ids[:-1].tolist(), tensor([[*row.prompt.tolist(), *ids.tolist()]])
            expected = scores(rewards.models[str(tmp_path / "rm")], whole)[0, -1].item()  # type: ignore[arg-type]
            ends = ([asked.end_id], True), ([tokenizer.eos_id], True), ([], False)
            given = [Answer("", [*text, *end], "", {}, prompt.ids, ended) for end, ended in ends]
            assert rewards(given).total.tolist() == pytest.approx([expected] * 3, abs=1e-5)


def test_a_reward_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    path = reward_model(tmp_path / "rm", 3)
    with pytest.raises(InputError, match="another tokenizer"):
        Rewards([Reward(path)], train_byte_bpe(["abc abc"], 258), END)
    with pytest.raises(InputError, match="unknown reward"):
        Rewards([Reward(str(tmp_path / "none"))], TOKENIZER, END)


def test_a_model_of_a_shorter_context_is_refused(tmp_path: Path) -> None:
    """64 tokens: what a prompt, an answer that is cut off, and the end token may be."""
    path = reward_model(tmp_path / "rm", 3)
    models = Rewards([Reward(path)], TOKENIZER, END).models
    asked = [Prompt([1] * count, "", {}, Conversation(()), "") for count in (9, 31, 5)]
    check_context(models, asked, 32)
    check_context(models, asked, 33, end=0)
    with pytest.raises(InputError, match=r"context of this model is shorter[\s\S]*rm\n[\s\S]*64\n[\s\S]*31 \+ 33 \+ 1"):
        check_context(models, asked, 33)


def test_llama_2s_gate_and_whitened_logit(tmp_path: Path) -> None:
    probabilities = tensor([0.10, 0.80, 0.95, 0.20])
    none = torch.zeros(4, dtype=torch.bool)
    found = whitened(gated(torch.full((4,), 9.0), probabilities.logit(), none, 0.15))
    torch.testing.assert_close(found, tensor([-1.14963, 0.57842, 1.32979, -0.75858]), atol=1e-4, rtol=1e-4)
    safety, helpful = tensor([0.10, 0.80, 0.95, 0.14]).logit(), tensor([0.9, 0.3, 0.2, 0.7]).logit()
    chosen = tensor([0.10, 0.3, 0.95, 0.14]).logit()  # low, helpful, tagged, low
    tagged = tensor([False, False, True, False])
    white = (chosen - chosen.mean()) / chosen.std(correction=0)
    torch.testing.assert_close(whitened(gated(safety, helpful, tagged, 0.15)), white, atol=1e-5, rtol=1e-5)
    one, two = reward_model(tmp_path / "safe", 3), reward_model(tmp_path / "helpful", 4)
    rewards = Rewards([Reward("llama-2", safety=one, path=two)], TOKENIZER, END)
    assert sorted(rewards.models) == sorted([one, two])
    scored, none = rewards(answers()), none[:1]
    trained = scored.signal
    assert trained.mean().item() == pytest.approx(0, abs=1e-6)
    assert trained.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    raw = [scored.parts[f"llama_2{name}"] for name in ("_safety", "_helpfulness", "")]
    for path, found in ((one, raw[0]), (two, raw[1])):
        torch.testing.assert_close(found, Rewards([Reward(path)], TOKENIZER, END)(answers()).total)
    torch.testing.assert_close(raw[2], gated(raw[0], raw[1], none.expand(4), 0.15))
    assert torch.equal(scored.total, raw[2])  # which compares over batches
    torch.testing.assert_close(rewards(answers()[:1]).total, scored.total[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.3), (2, 0.5333333), (5, 0.9166667), (8, 1.0)])
def test_pass_at_k(k: int, expected: float) -> None:
    assert pass_at_k(10, 3, k) == pytest.approx(expected)
    assert pass_at_k(10, 0, k) == 0 and not math.isnan(pass_at_k(k, k, k))
