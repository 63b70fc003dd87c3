"""Shapes: known counts, derived widths, refusals."""

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
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "phi-3-mini": 3_821_079_552,
    "phi-4": 14_659_507_200,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
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
    assert (grouped.n_kv_heads, grouped.head_dim, grouped.hidden_dim) == (8, 64, 28672 // 2)
    own = SMALL.changed({"head_dim": 32}).changed({"dim": 128})
    assert (own.head_dim, own.hidden_dim) == (32, 128 * SMALL.hidden_dim // SMALL.dim)


def test_a_preset_keeps_its_proportions() -> None:
    """llama-tiny's feed-forward width is 2.75 dim, a multiple of 64; another dim has another, unless it is given."""
    tiny = ModelConfig.load("llama-tiny")
    widths = {dim: tiny.changed({"dim": dim}).hidden_dim for dim in (64, 104, 128, 256, 512)}
    assert widths == {64: 192, 104: 288, 128: 352, 256: 704, 512: 1408}
    assert tiny.changed({"dim": 64, "hidden_dim": 700}).hidden_dim == 700
    assert ModelConfig.from_table({"preset": "rwkv-tiny", "dim": 64}).hidden_dim == 256
    assert tiny.changed({"n_heads": 8}).hidden_dim == tiny.hidden_dim
    with pytest.raises(InputError, match=r"found: head_dim = 25[\s\S]*such as 26 \(dim = 104\)"):
        tiny.changed({"dim": 100})
    with pytest.raises(InputError, match=r"dim[\s\S]*found: 'wide'"):
        tiny.changed({"dim": "wide"})


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


@given(shapes())
def test_to_hf_and_back(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
