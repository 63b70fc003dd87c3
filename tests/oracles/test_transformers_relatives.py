"""BLOOM and RWKV against transformers: the same logits from the same folder, in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, RwkvConfig, RwkvForCausalLM

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.model import Decoder


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Weights and biases that would show a swapped head or a missing bias."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2)
            if "ln" in name or "norm" in name:
                parameter.add_(1.0)
    return model.eval()


def bloom() -> torch.nn.Module:
    """Six heads, no power of two, so that both kinds of slopes are there."""
    return randomized(BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=48, n_layer=3, n_head=6)))


def rwkv() -> torch.nn.Module:
    config = RwkvConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=3, intermediate_size=80, attention_hidden_size=48,
        context_length=64, rescale_every=0,
    )  # fmt: skip
    return randomized(RwkvForCausalLM(config))


IDS = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("make", "kind"), [(bloom, "bloom"), (rwkv, "rwkv")])
def test_logits_of_a_folder_of_theirs_and_back(make, kind: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    theirs = make()
    theirs.save_pretrained(tmp_path / "theirs")
    mine = Decoder.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(IDS).logits
        torch.testing.assert_close(mine(IDS), expected, atol=1e-5, rtol=1e-5)
        state = mine.state(2)
        steps = torch.cat([mine(part, state=state) for part in IDS.split([5, 1, 11], 1)], 1)
        torch.testing.assert_close(steps, expected, atol=1e-5, rtol=1e-5)
        mine.save_pretrained(tmp_path / "mine")
        again = type(theirs).from_pretrained(tmp_path / "mine").eval()
        torch.testing.assert_close(again(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert ModelConfig.load(tmp_path / "mine").to_hf()["model_type"] == kind


def test_blooms_first_files_had_no_prefix(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = bloom()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(Decoder.from_pretrained(tmp_path)(IDS), theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def test_a_switch_of_blooms_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=97, hidden_size=48, n_head=6, apply_residual_connection_post_layernorm=True)
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="apply_residual_connection_post_layernorm is not supported"):
        ModelConfig.load(tmp_path)
