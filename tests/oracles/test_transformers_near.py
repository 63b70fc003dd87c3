"""LLaMA's nearest relatives against transformers: the same logits from the same folder, in and out, and decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.inference.engine import Engine
from minillama.inference.request import Request
from minillama.model import Decoder

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0, 1.25, 1.5], "long_factor": [1.0, 2.5, 4.0],
    "partial_rotary_factor": 0.75, "original_max_position_embeddings": 16,
}  # fmt: skip
CASES = {
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 7, "head_dim": 10}),
    "phi3": ("Phi3", {}),
    "phi3, long": ("Phi3", {"sliding_window": 21, "original_max_position_embeddings": 16, "rope_parameters": LONG}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
}


def theirs(name: str) -> Any:
    """Random weights, norms that are no ones, biases that are no zeros."""
    kind, changes = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**SHAPE, **changes)
    model, generator = transformers.AutoModelForCausalLM.from_config(config).eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.2, generator=generator)
    return model


def ids(length: int) -> torch.Tensor:
    return torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_logits_of_a_folder_of_theirs_and_back(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    mine = Decoder.from_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32).eval()
    assert type(again) is type(model) and ModelConfig.load(tmp_path / "mine") == mine.config
    for length in (12, 40):  # within the original context of the long one, and beyond
        tokens = ids(length)
        expected, state = model(tokens).logits, mine.state(2, length)
        torch.testing.assert_close(mine(tokens), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        steps = torch.cat([mine(part, state=state) for part in tokens.split([5, 1, length - 6], 1)], 1)
        torch.testing.assert_close(steps, expected, atol=1e-4, rtol=1e-4)
    fused = Decoder.from_pretrained(tmp_path / "mine").fuse()
    torch.testing.assert_close(fused(ids(40)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_requests_of_short_and_long_sequences_share_an_engine(tmp_path: Path) -> None:
    """Greedy tokens of each are those of the whole sequence's frequencies, whatever runs beside it."""
    theirs("phi3, long").save_pretrained(tmp_path)
    model, prompts = Decoder.from_pretrained(tmp_path), ids(30)[0].tolist()
    asked = [Request(prompts[:size], count) for size, count in ((6, 8), (30, 9), (9, 20), (4, 5))]
    engine = Engine(model, max_rows=3, chunk=4)
    for request in engine.run(asked):
        sequence = [*request.ids, *request.tokens]
        long = len(sequence) > 16
        padded = torch.tensor([sequence + [0] * (40 - len(sequence) if long else 0)])  # a longer one has long factors
        chosen = model(padded)[0, len(request.ids) - 1 : len(sequence) - 1].argmax(-1).tolist()
        assert chosen == request.tokens and len(chosen) == request.max_new_tokens


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}, "in some of the layers"),
        ("SmolLM3", {"no_rope_layers": [1, 0, 0]}, "irregular intervals"),
        ("Mistral", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "this rope type"),
        ("Mixtral", {}, "mixture of experts"),
        ("Gemma2", {}, "soft-capping"),
        ("DeepseekV3", {}, "latent attention"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kind: str, changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    getattr(transformers, f"{kind}Config")(**SHAPE | changes).save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        ModelConfig.load(tmp_path)
    assert what in str(error.value) and "config.json" in str(error.value)
    assert "transformers" in str(error.value) or changes
