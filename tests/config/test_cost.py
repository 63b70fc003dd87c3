"""Memory against what autograd really keeps, and numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.config.cost import inference_memory, training_days, training_memory
from minillama.layers.cross_entropy import cross_entropy
from minillama.layers.mask import KernelMask
from minillama.model import Decoder

B, T = 3, 32
CONFIG = ModelConfig(
    dim=64, n_layers=2, n_heads=8, n_kv_heads=4, head_dim=8, hidden_dim=160, vocab_size=96, max_seq_len=T
)
CONFIGS = {
    "grouped": CONFIG,
    "tied": replace(CONFIG, tie_embeddings=True),
    "all heads": replace(CONFIG, n_kv_heads=8, n_layers=3),
    "wide heads": replace(CONFIG, head_dim=16, hidden_dim=80),
    "qkv bias": replace(CONFIG, bias="qkv", sliding_window=7),
    "normalized heads": replace(CONFIG, qk_norm=True),
}


def saved_bytes(model: Decoder, bfloat16: bool) -> int:
    """Bytes of what the forward pass keeps, parameters aside, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(0, model.config.vocab_size, (B, T))
    with saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = model.loss(model.hidden(tokens), tokens)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: KernelMask) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=mask.is_causal, enable_gqa=q.shape[1] != k.shape[1])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("width", [4, 2])
def test_activations_are_what_autograd_keeps(config: ModelConfig, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.layers.attention.attend", fused)  # the CPU has its own for bfloat16
    memory = training_memory(config, B, T, activation_bytes=width)
    gradients = B * T * config.dim * width + 4 * config.vocab_size * config.dim
    assert memory.logits == width * B * T * config.vocab_size + gradients
    rotary = 2 * T * config.head_dim * width
    measured = saved_bytes(Decoder(config), bfloat16=width == 2)
    casts = memory.casts - width * config.vocab_size * config.dim if memory.casts else 0  # the loss keeps no matrix
    assert measured == memory.activations + casts + gradients + rotary


def test_checkpointing_keeps_the_inputs_of_the_blocks() -> None:
    deep = replace(CONFIG, n_layers=5)
    model = Decoder(deep)
    model.checkpointing = True
    forward = saved_bytes(model, bfloat16=False) - 4 * deep.dim * (B * T + deep.vocab_size)
    one_block = sum(
        sign * training_memory(replace(CONFIG, n_layers=layers), B, T).activations for layers, sign in ((2, 1), (1, -1))
    )
    own_input = 4 * B * T * deep.dim
    memory = training_memory(deep, B, T, checkpointing=True)
    assert memory.activations == forward + one_block - own_input
    assert memory.activations < training_memory(deep, B, T).activations


def test_parameters_gradients_and_moments() -> None:
    model = Decoder(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, CONFIG.vocab_size, (B, T))
    cross_entropy(model(tokens), tokens).backward()
    optimizer.step()
    memory = training_memory(CONFIG, B, T)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert memory.optimizer == sum(t.nbytes for t in moments)
    assert memory.casts == 0
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits)
    assert memory.total == sum(parts)


def test_sixteen_bytes_a_parameter() -> None:
    config = ModelConfig.load("llama-7b")
    memory = training_memory(config, 1, 2048)
    assert memory.weights + memory.gradients + memory.optimizer == 16 * 6_738_415_616


def test_pure_bfloat16_casts_nothing() -> None:
    memory = training_memory(CONFIG, B, T, weight_bytes=2, grad_bytes=2, optimizer_bytes=4, activation_bytes=2)
    assert memory.casts == 0
    assert memory.total < training_memory(CONFIG, B, T, activation_bytes=2).total


def test_inference_memory() -> None:
    config = ModelConfig.load("llama-2-70b")
    memory = inference_memory(config, 2, 4096)
    assert memory.weights == 2 * 68_976_648_192
    assert memory.state == 2 * 4096 * 327_680
    assert memory.total == memory.weights + memory.state
    assert inference_memory(config, 1, 1, weight_bytes=0.5).weights == 34_488_324_096
    small = Decoder(CONFIG).state(B, T)
    held = sum(tensor.nbytes for layer in small.layers for tensor in layer.tensors)
    assert inference_memory(CONFIG, B, T, kv_bytes=4).state == held


def test_training_days() -> None:
    config = ModelConfig.load("llama-65b")
    # arXiv 2302.13971, section 2.4: 380 tokens/s on each of 2048 A100, 1.4T tokens in about 21 days
    flops_per_second = 380 * config.flops_per_token(2048)
    assert training_days(config, 1.4e12, 2048, flops_per_second, 2048) == pytest.approx(20.8, abs=0.1)
    assert 0.4 < flops_per_second / 312e12 < 0.6
    half = training_days(config, 1.4e12, 2048, flops_per_second, 2048, utilization=0.5)
    assert half == pytest.approx(41.6, abs=0.2)
