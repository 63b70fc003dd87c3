"""Shapes: known counts, derived widths, and Hugging Face's config.json in both directions."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from minillama.config import ModelConfig, RopeScaling
from minillama.config.loader import config_names, to_dict
from minillama.errors import InputError

COUNTS = {
    "palm-8b": 8_632_012_800,
    "palm-62b": 62_495_662_080,
    "palm-540b": 540_356_474_880,
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "rwkv-169m": 169_342_464,
    "rwkv-430m": 430_397_440,
    "rwkv-1b5": 1_515_106_304,
    "rwkv-3b": 2_984_627_200,
    "rwkv-7b": 7_392_649_216,
    "rwkv-14b": 14_148_597_760,
    "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "phi-3-mini": 3_821_079_552,
    "smollm3-3b": 3_075_098_624,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "stories260k": 260_032,
    "stories15m": 15_191_712,
    "stories42m": 41_689_600,
    "stories110m": 109_529_856,
}
SMALL = ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=96, vocab_size=128, max_seq_len=32)
LLAMA3 = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


@st.composite
def shapes(draw: st.DrawFn) -> ModelConfig:
    kv = draw(st.integers(1, 4))
    heads, width = kv * draw(st.integers(1, 4)), 2 * draw(st.integers(1, 8))
    scaling = draw(st.none() | st.just(RopeScaling("linear", 4.0)) | st.just(LLAMA3))
    return ModelConfig(
        dim=draw(st.integers(1, 64)),
        n_layers=draw(st.integers(1, 4)),
        n_heads=heads,
        n_kv_heads=kv,
        head_dim=width,
        hidden_dim=draw(st.integers(1, 64)),
        vocab_size=draw(st.integers(1, 64)),
        max_seq_len=draw(st.integers(1, 64)),
        norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        rope_theta=draw(st.sampled_from([1e4, 5e5])),
        rope_scaling=scaling,
        tie_embeddings=draw(st.booleans()),
    )


def test_every_preset_but_the_tunable_ones_has_a_known_count() -> None:
    """GLM's are published in two digits."""
    tiny = {f"{name}-tiny" for name in ("llama", "palm", "bloom", "glm", "chatglm", "chatglm2", "rwkv")}
    rounded = {"glm-base": 110e6, "glm-large": 335e6, "glm-2b": 2e9, "glm-10b": 10e9}
    assert set(config_names("model")) == {*COUNTS, *tiny, *rounded}
    for name, count in rounded.items():
        assert ModelConfig.load(name).num_params() == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_parameter_counts(name: str, count: int) -> None:
    config = ModelConfig.load(name)
    assert config.num_params() == count
    assert config.preset == name


@given(shapes())
def test_the_count_is_the_sum_over_the_tensors(config: ModelConfig) -> None:
    tensors = config.tensors()
    assert config.num_params() == sum(map(math.prod, tensors.values()))
    embedding = 0 if config.tie_embeddings else math.prod(tensors["model.embed_tokens.weight"])
    assert config.num_params() - config.num_params(embedding=False) == embedding


@pytest.mark.parametrize(
    "name", ["llama-2-70b", "llama-3.2-1b", "smollm2-135m", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b", "smollm3-3b"]
)
def test_tensors_are_those_of_transformers(name: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.load(name)
    with torch.device("meta"):
        theirs = transformers.AutoConfig.for_model(**config.to_hf())
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == config.tensors()
    assert sum(p.numel() for p in model.parameters()) == config.num_params()


@pytest.mark.parametrize(("dim", "width"), [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (96, 256)])
def test_the_feed_forward_rule(dim: int, width: int) -> None:
    assert ModelConfig(dim=dim, n_heads=dim // 32).hidden_dim == width


def test_zero_means_derived() -> None:
    config = ModelConfig(dim=512, n_heads=8)
    assert (config.n_kv_heads, config.head_dim, config.hidden_dim) == (8, 64, 1536)
    config = ModelConfig(dim=100, n_heads=8, n_kv_heads=2, head_dim=16, hidden_dim=30)
    assert (config.n_kv_heads, config.head_dim, config.hidden_dim) == (2, 16, 30)
    assert config.tensors()["model.layers.0.self_attn.o_proj.weight"] == (100, 128)


def test_kv_bytes_per_token() -> None:
    known = {"llama-7b": 524_288, "llama-13b": 819_200, "llama-65b": 2_621_440, "llama-2-70b": 327_680}
    assert {name: ModelConfig.load(name).kv_bytes_per_token() for name in known} == known
    assert ModelConfig.load("llama-7b").kv_bytes_per_token(4) == 1_048_576


def test_flops_per_token_by_hand() -> None:
    # a layer: q 64*64, k and v 32*64, o 64*64, three of 96*64; the head 128*64; the embedding is looked up
    weights = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 96 * 64) + 128 * 64
    # queries 0..3 see 1..4 keys, 2.5 on average: scores and sums take 2 * 2 * 64 FLOPs a key and layer
    forward = 2 * weights + 2 * 2 * 2 * 64 * 2.5
    for config in (SMALL, replace(SMALL, tie_embeddings=True)):
        assert config.flops_per_token(4, training=False) == forward
        assert config.flops_per_token(4) == 3 * forward
    narrow = replace(SMALL, sliding_window=2)  # queries 0..3 see 1, 2, 2, 2 keys, 1.75 on average
    assert narrow.flops_per_token(4, training=False) == 2 * weights + 2 * 2 * 2 * 64 * 1.75


def test_flops_are_near_six_times_the_parameters() -> None:
    config = ModelConfig.load("llama-2-70b")
    assert 1.0 < config.flops_per_token(4096) / (6 * config.num_params()) < 1.05


@pytest.mark.parametrize(
    ("values", "what", "more"),
    [
        ({"position": "abs"}, "position has a value of the wrong type", "'alibi'"),
        ({"position": "ropes"}, "position has a value", "did you mean 'rope'"),
        ({"dim": "100"}, "dim has a value of the wrong type", "a whole number"),
        ({"dim": 64.0}, "dim has a value of the wrong type", "64.0"),
        ({"dim": True}, "dim has a value of the wrong type", "True"),
        ({"tie_embeddings": 1}, "tie_embeddings has a value of the wrong type", "true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling has a value of the wrong type", "RopeScaling"),
        ({"rope_scaling": RopeScaling("lin")}, "rope_scaling.kind has a value", "'linear'"),  # type: ignore[arg-type]
        ({"n_head": 4}, "unknown key 'n_head'", "did you mean 'n_heads'"),
    ],
)
def test_python_is_as_strict_as_toml(values: dict[str, Any], what: str, more: str) -> None:
    with pytest.raises(InputError) as error:
        ModelConfig(**values)
    assert what in str(error.value) and more in str(error.value)
    assert ModelConfig(rope_theta=500000).rope_theta == 500000  # a whole number is a number


def test_numbers_out_of_range_are_refused_without_a_file_too() -> None:
    wrong: list[dict[str, Any]] = [
        {"dim": 0},
        {"n_layers": -1},
        {"n_kv_heads": -8},
        {"head_dim": -2},
        {"max_seq_len": 0},
        {"norm_eps": math.nan},
        {"rope_theta": 0.5},
    ]
    for values in wrong:
        with pytest.raises(InputError, match="out of range") as error:
            ModelConfig(**values)
        assert [error.value.where] == list(values)
    with pytest.raises(InputError) as error:
        ModelConfig(rope_scaling=RopeScaling(factor=0.5))
    assert error.value.where == "rope_scaling.factor"


def test_load_reads_a_toml_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("dim = 64\nn_heads = 2\nn_layers = 1\n")
    assert ModelConfig.load(path) == ModelConfig(dim=64, n_heads=2, n_layers=1)
    path.write_text('[model]\npreset = "llama-2-7b"\nmax_seq_len = 64\n[train]\nsteps = 3\n')
    assert ModelConfig.load(str(path)) == replace(ModelConfig.load("llama-2-7b"), max_seq_len=64)


def test_what_is_written_as_toml_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for name in config_names("model"):
        config = ModelConfig.load(name).changed({"max_seq_len": 64})
        path.write_text(tomli_w.dumps(to_dict(config)))
        assert ModelConfig.load(path) == config


def test_a_change_derives_widths_anew_where_they_were_derived() -> None:
    changed = ModelConfig.load("llama-7b").changed({"dim": 512, "n_heads": 8})
    assert (changed.n_kv_heads, changed.head_dim, changed.hidden_dim) == (8, 64, 1536)
    grouped = ModelConfig.load("llama-2-70b").changed({"dim": 4096})
    assert (grouped.n_kv_heads, grouped.head_dim, grouped.hidden_dim) == (8, 64, 28672)
    own = SMALL.changed({"head_dim": 32}).changed({"dim": 128})
    assert (own.head_dim, own.hidden_dim) == (32, 96)


@pytest.mark.parametrize(
    ("line", "what"), [("preset = 3", "preset is not a name"), ('preset = "lama-7b"', "no model configuration")]
)
def test_a_wrong_preset_is_placed(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"[model]\n{line}\n")
    with pytest.raises(InputError, match=what) as error:
        ModelConfig.load(path)
    assert error.value.where == f"{path}:2, model.preset"


def test_presets_in_a_circle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f"preset = '{path}'\n")
    with pytest.raises(InputError, match="cycle") as error:
        ModelConfig.load(path)
    assert error.value.where == f"{path}:1, preset"


def test_a_file_of_a_presets_name_is_not_that_preset(tmp_path: Path) -> None:
    path = tmp_path / "llama-7b.toml"
    path.write_text("dim = 64\nn_heads = 2\n")
    assert ModelConfig.load(path).preset == ""


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


@given(shapes())
def test_to_hf_and_back(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


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
