"""Logits and gradients against transformers' LlamaForCausalLM, on tiny random models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from minillama.config import ModelConfig, RopeScaling
from minillama.model import Decoder

# widths, heads and groups that differ from one another, so that a permutation or a swapped count shows
GQA = ModelConfig(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=97, max_seq_len=64)
CASES = {
    "mha": replace(GQA, n_kv_heads=6),
    "gqa": GQA,
    "mqa": replace(GQA, n_kv_heads=1),
    "tied": replace(GQA, tie_embeddings=True),
    "wide_heads": replace(GQA, head_dim=14),
    "eps_theta": replace(GQA, norm_eps=1e-3, rope_theta=500.0),
    "linear": replace(GQA, rope_scaling=RopeScaling("linear", 4.0)),
    "llama3": replace(GQA, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 24)),
    "ntk": replace(GQA, rope_scaling=RopeScaling("ntk", 4.0)),
}


def randomize(model: torch.nn.Module) -> None:
    """Norms that are not ones, and matrices large enough for softmaxes that are not flat."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1.0 / parameter.shape[1] ** 0.5, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    config = CASES[name]
    ours = Decoder(config)
    randomize(ours)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf()))
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    tokens = torch.randint(0, config.vocab_size, (3, 50), generator=torch.Generator().manual_seed(5))

    a, b = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    for logits in (a, b):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for n, parameter in ours.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[n], atol=1e-5, rtol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


def test_folder_opens_in_transformers_and_back(tmp_path) -> None:
    config = CASES["llama3"]
    ours = Decoder(config)
    randomize(ours)
    ours.save_pretrained(tmp_path / "a")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    tokens = torch.arange(40)[None] % config.vocab_size
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    theirs.save_pretrained(tmp_path / "b")
    back = Decoder.from_pretrained(tmp_path / "b")
    assert back.config == config
    assert all(torch.equal(p, dict(ours.named_parameters())[n]) for n, p in back.named_parameters())
