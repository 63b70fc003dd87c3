"""Shapes in Hugging Face's config.json, of every generation, in both directions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minillama.config import ModelConfig, RopeScaling
from minillama.errors import InputError

SMALL = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=128, max_seq_len=32)
LLAMA3 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
LLAMA3_KEYS = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
V4 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
    "torch_dtype": "float16",
}


def test_the_oldest_files_have_few_keys() -> None:
    assert ModelConfig.from_hf(V4) == ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=96, vocab_size=128, max_seq_len=2048, norm_eps=1e-6
    )


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_theta": 500000, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}, "rope_scaling": None},
    ],
)
def test_every_generation_of_rope_keys(keys: dict[str, Any]) -> None:
    config = ModelConfig.from_hf(V4 | keys)
    assert (config.rope_theta, config.rope_scaling) == (5e5, RopeScaling("linear", 4.0))


def test_mistral_without_a_window_is_a_llama() -> None:
    same = V4 | {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "sliding_window": None}
    mistral = ModelConfig.from_hf(same | {"model_type": "mistral", "max_position_embeddings": 2048})
    assert replace(mistral, model_type="") == ModelConfig.from_hf(same)
    assert ModelConfig.from_hf(same | {"model_type": "mistral"}).max_seq_len == 131072  # transformers' default


def test_other_spellings_of_transformers() -> None:
    """AutoConfig's attribute_map, hidden_act's other name, a base that is null, a window that LLaMA has not."""
    bloom = {"model_type": "bloom", "vocab_size": 32, "layer_norm_epsilon": 1e-5}
    for width in ("hidden_size", "n_embed"):
        for layers in ("n_layer", "num_hidden_layers"):
            for heads in ("n_head", "num_attention_heads"):
                found = ModelConfig.from_hf(bloom | {width: 64, layers: 2, heads: 4})
                assert (found.dim, found.n_layers, found.n_heads) == (64, 2, 4)
    rwkv = {"model_type": "rwkv", "vocab_size": 32, "layer_norm_epsilon": 1e-5, "hidden_size": 64}
    assert ModelConfig.from_hf(rwkv | {"num_hidden_layers": 2, "max_position_embeddings": 99}).max_seq_len == 99
    odd = {"hidden_act": "swish", "rope_theta": None, "sliding_window": 64}
    assert ModelConfig.from_hf(V4 | odd) == ModelConfig.from_hf(V4)


def test_rope_settings_in_two_places() -> None:
    """Version 4's table wins, as in transformers; two different bases are refused."""
    linear, llama3 = {"type": "linear", "factor": 4.0}, {"rope_type": "llama3", "factor": 8.0}
    for other in ({"rope_type": "default", "rope_theta": 10000.0}, llama3, None):
        found = ModelConfig.from_hf(V4 | {"rope_scaling": linear, "rope_parameters": other}).rope_scaling
        assert found is not None and (found.kind, found.factor) == ("linear", 4.0)
    with pytest.raises(InputError, match="two values of rope_theta"):
        ModelConfig.from_hf(V4 | {"rope_scaling": linear | {"rope_theta": 1e4}, "rope_parameters": {"rope_theta": 5e5}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rms_norm_eps", 1e308), ("rms_norm_eps", 1.0), ("rope_theta", 1e38), ("vocab_size", 10**22)),
        *(("max_position_embeddings", 2**40), ("intermediate_size", 10**22), ("head_dim", 2**30)),
    ],
)
def test_absurd_constants_are_out_of_range(key: str, value: float) -> None:
    with pytest.raises(InputError, match="is out of range"):
        ModelConfig.from_hf(V4 | {key: value})


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "rope parameters of type linear"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor"),
        ({"rope_theta": "1e4"}, "rope_theta"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], where: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V4 | keys))
    with pytest.raises(InputError) as error:
        ModelConfig.load(tmp_path)
    assert error.value.where == f"{path}, {where}"


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("mixtral", "mixtral, with mixture of experts"),
        ("qwen3_moe", "qwen3_moe, with mixture of experts"),
        ("deepseek_v2", "deepseek_v2, with mixture of experts and latent attention"),
        ("gemma2", "gemma2, with soft-capping of logits and scaled embeddings"),
        ("gpt2", "gpt2, with learned positions"),
        ("blenderbot", "blenderbot, with layers that are unknown here"),
        (None, None),
    ],
)
def test_a_bare_type_is_refused_with_what_is_missing(kind: str | None, found: str | None) -> None:
    with pytest.raises(InputError, match="transformers, or as GGUF") as error:
        ModelConfig.from_hf({} if kind is None else {"model_type": kind})
    assert error.value.found == found and (kind or "model_type is missing") in str(error.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"model_type": "llama"}', '{"rope_scaling": "linear"}'])
def test_a_damaged_config_json_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        ModelConfig.load(path)
    assert str(path) in str(error.value.where)


def test_a_null_size_is_a_missing_one() -> None:
    with pytest.raises(InputError, match="hidden_size is missing"):
        ModelConfig.from_hf(V4 | {"hidden_size": None})
    with pytest.raises(InputError, match="rope parameters are not a table"):
        ModelConfig.from_hf(V4 | {"rope_scaling": "linear"})


def test_a_folder_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read config\.json"):
        ModelConfig.load(tmp_path)


def test_scalings_that_divide_by_zero_are_refused() -> None:
    with pytest.raises(InputError, match="factor is empty") as error:
        ModelConfig.from_hf(V4 | {"rope_scaling": LLAMA3_KEYS | {"high_freq_factor": 1.0}})
    assert error.value.where == "config.json, rope_scaling.low_freq_factor"
    with pytest.raises(InputError, match="more than one rotary pair"):
        ModelConfig(dim=8, n_heads=4, rope_scaling=RopeScaling("ntk", 2.0))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_forged_size_is_refused_at_once(key: str) -> None:
    with pytest.raises(InputError, match="out of range") as error:
        ModelConfig.from_hf(V4 | {key: 10**12})
    assert error.value.where == f"config.json, {key}"


@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0), LLAMA3])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_shape_and_writes_it_back(
    tmp_path: Path, scaling: RopeScaling | None, tied: bool
) -> None:
    transformers = pytest.importorskip("transformers")
    config = replace(SMALL, rope_scaling=scaling, tie_embeddings=tied, rope_theta=5e5, head_dim=24, norm_eps=1e-5)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.LlamaConfig
    assert (theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers) == (64, 96, 2)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim) == (4, 2, 24)
    assert (theirs.rms_norm_eps, theirs.tie_word_embeddings, theirs.vocab_size) == (1e-5, tied, 128)
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.rope_parameters["rope_type"] == (scaling.kind if scaling else "default")
    theirs.save_pretrained(tmp_path / "theirs")
    assert ModelConfig.load(tmp_path / "theirs") == config


def test_both_generations_keys_are_written() -> None:
    values = replace(SMALL, rope_theta=5e5, rope_scaling=RopeScaling("linear", 2.0)).to_hf("bfloat16")
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 5e5
    assert values["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert values["architectures"] == ["LlamaForCausalLM"]


def test_ntk_is_written_as_the_base_that_it_is() -> None:
    values = replace(SMALL, rope_scaling=RopeScaling("ntk", 4.0)).to_hf()
    assert values["rope_scaling"] is None
    assert values["rope_theta"] == pytest.approx(10000.0 * 4.0 ** (16 / 14))
