"""Loss and gradients of fine-tuning against transformers' own loss, with labels of -100 on what is not trained."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.data.conversations import conversations
from minillama.data.instructions import Example, Instructions, Packing
from minillama.data.sources import Source
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.rendering import encode, truncated
from minillama.tokenizer.template import load_template
from minillama.training.gradients import accumulate
from minillama.training.objectives.sft import FineTuning

transformers = pytest.importorskip("transformers")
FILES = [
    "alpaca_en_demo.json",
    "alpaca_zh_demo.json",
    "dolly_fixture.json",
    "dolly_hhrlhf_train_small.jsonl",
    "glaive_toolcall_en_demo.json",
    "messages_v1_sft_demo.jsonl",
    "seed_tasks.jsonl",
    "sharegpt_dummy_conversation.json",
]
CONTEXT = 160


def examples(path: Path, tokenizer: Tokenizer, count: int, context: int) -> list[Example]:
    """The first records of a file by SmolLM2's own template, or ChatML where it has no place for tools."""
    own, found = load_template("chatml" if "toolcall" in path.name else "own", tokenizer), []
    for conversation in islice(conversations(Source(path=str(path))), count):
        rendered = truncated(encode(conversation, own, tokenizer), context + 1)
        if rendered.trained:
            found.append(Example.of(rendered.ids, rendered.weights, conversation.where))
    return found


def compare(
    model: Decoder,
    folder: Path,
    found: list[Example],
    packing: Packing,
    context: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Loss within 1e-5; gradients too, per element in float32, relative to each tensor's norm in float64."""
    data = Instructions.of(found, found[:1], context, packing)
    rows = len(data._plan())
    objective = FineTuning(model, data, 1, rows)
    model.train()
    loss = accumulate(objective, objective.batch(0), 4, torch.device("cpu")).loss
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    weight = sum(float(example.weights[1:].sum()) for example in found)
    total = 0.0
    for example in found:
        ids, weights = torch.tensor(example.ids.astype(int))[None], torch.tensor(example.weights)
        values = set(weights[1:].unique().tolist()) - {0.0} if dtype == torch.float32 else set()
        if dtype == torch.float64:  # their loss casts logits to float32
            nats = F.cross_entropy(theirs(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            own = (nats * weights[1:]).sum() / weight
            own.backward()
            total += own.item()
        for value in values:  # one loss per weight: transformers knows trained and not trained
            labels = torch.where(weights == value, ids, -100)
            own = theirs(ids, labels=labels).loss * int((labels[0, 1:] != -100).sum()) * value / weight
            own.backward()
            total += own.item()
    assert loss == pytest.approx(total, rel=1e-5)
    grads = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = grads[name].grad
        assert expected is not None
        if dtype == torch.float32:
            torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)
        assert (parameter.grad - expected).norm() <= (1e-3 if dtype == torch.float32 else 1e-5) * expected.norm()


@pytest.mark.parametrize(
    ("name", "packing"), [*((name, "best-fit") for name in FILES), (FILES[0], "none"), (FILES[5], "none")]
)
def test_loss_and_gradients_are_transformers(
    name: str, packing: Packing, shared: Path, smollm2: Path, tmp_path: Path
) -> None:
    """32 records of each format, a small random model with SmolLM2's vocabulary."""
    tokenizer = Tokenizer.load(smollm2)
    config = ModelConfig(
        dim=24, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=40, vocab_size=tokenizer.vocab_size, max_seq_len=CONTEXT
    )
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(3))
    model.save_pretrained(tmp_path)
    found = examples(shared / "sft" / name, tokenizer, 32, CONTEXT)
    assert len(found) >= (6 if "fixture" in name else 16)
    compare(model, tmp_path, found, packing, CONTEXT)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_loss_and_gradients_of_real_weights_are_transformers(
    name: str, shared: Path, smollm2: Path, tmp_path: Path
) -> None:
    """32 records, in float64: in float32 torch's log_softmax over 49,152 tokens rounds to about 1e-5 on both sides."""
    tokenizer, model = Tokenizer.load(smollm2), Decoder.from_pretrained(open_model(smollm2), torch.float64)
    found = examples(shared / "sft" / name, tokenizer, 32, 32)
    assert len(found) >= (12 if "fixture" in name else 24)
    Decoder.from_pretrained(smollm2, torch.float32).save_pretrained(tmp_path)
    compare(model, tmp_path, found, "best-fit", 32, torch.float64)
