"""Model files that say one thing and hold another: refused with what was found, or read as what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillama import Decoder, InputError, ModelConfig
from minillama.convert import convert
from minillama.data.sources import find_files
from minillama.formats import gguf, meta
from minillama.formats.gguf_header import read_header
from minillama.formats.open import open_model
from minillama.tokenizer import Tokenizer, byte_tokenizer
from minillama.tokenizer.pre import pattern_of

SHAPE = {"dim": 64, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 96, "vocab_size": 257}
CONFIG = ModelConfig(**SHAPE, max_seq_len=32)  # type: ignore[arg-type]
IDS = torch.tensor([[5, 9, 77, 200]])
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(0)
    return Decoder(CONFIG).eval()


@pytest.fixture
def folder(model: Decoder, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save(tmp_path / "m")
    return tmp_path / "m"


def edit(folder: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: object) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))


def test_a_stored_head_is_used_though_tied(folder: Path, model: Decoder, capsys: pytest.CaptureFixture[str]) -> None:
    """As transformers does, with a word; an equal copy is the tied one."""
    edit(folder, tie_word_embeddings=True)
    assert torch.equal(Decoder.from_pretrained(folder)(IDS), model(IDS))
    assert "ties lm_head.weight" in capsys.readouterr().err
    edit(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert Decoder.from_pretrained(folder).lm_head is None
    assert capsys.readouterr().err == ""


def test_the_single_file_counts_beside_an_old_index(folder: Path, tmp_path: Path, model: Decoder) -> None:
    """transformers' order; also where the index's shards are gone."""
    old = tmp_path / "old"
    torch.manual_seed(1)
    Decoder(CONFIG).save_pretrained(old, max_shard_size="100KB")
    (old / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert torch.equal(Decoder.from_pretrained(old)(IDS), model(IDS))
    for shard in old.glob("model-*"):
        shard.unlink()
    assert torch.equal(Decoder.from_pretrained(old)(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_integers_are_no_weights(folder: Path, dtype: torch.dtype) -> None:
    edit(
        folder, lambda t: t.update({name: w.view(dtype).flatten()[: w.numel()].view(w.shape) for name, w in t.items()})
    )
    with pytest.raises(InputError, match="not a type of weights"):
        open_model(folder)


def _fp8(tensors: Tensors) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _gptq(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.down_proj.qweight"] = tensors.pop("model.layers.0.mlp.down_proj.weight").int()


@pytest.mark.parametrize("change", [_fp8, _gptq])
def test_a_quantization_is_named(folder: Path, change: Callable[[Tensors], object], model: Decoder) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert torch.equal(Decoder.from_pretrained(folder)(IDS), model(IDS)), "one that is left over does no harm"
    edit(folder, change)
    with pytest.raises(InputError, match="quantized in this way") as error:
        open_model(folder)
    assert "quantization_config" in str(error.value.where) and "gptq" in str(error.value.found)


@pytest.mark.parametrize(("dim", "layers", "factor"), [(2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8.0)])
def test_metas_rope_factor_of_llama_3_2(dim: int, layers: int, factor: float, tmp_path: Path) -> None:
    """params.json leaves it out (meta-llama/llama-models, issue 241; config.json of Llama-3.2-1B and -3B)."""
    params = {"dim": dim, "n_layers": layers, "n_heads": 32, "use_scaled_rope": True}
    (tmp_path / "params.json").write_text(json.dumps(params))
    rank = {"tok_embeddings.weight": torch.zeros(8, dim), "layers.0.feed_forward.w1.weight": torch.zeros(16, dim)}
    scaling = meta._config(tmp_path, [rank]).rope_scaling
    assert scaling is not None and scaling.factor == factor


@pytest.mark.parametrize("name", ["two words", "[brackets]*?", "粉屋 é", "a#b%20", "x.gguf", "-dash"])
def test_a_folder_of_any_name(name: str, folder: Path, tmp_path: Path, model: Decoder) -> None:
    """With files that are links, as in the hub's cache, and a byte-order mark."""
    place = tmp_path / name
    place.mkdir()
    (place / "config.json").write_text("\ufeff" + (folder / "config.json").read_text(), encoding="utf-8")
    (place / "model.safetensors").symlink_to(folder / "model.safetensors")
    (place / "a.txt").write_text("text")
    found = Decoder.from_pretrained(place).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in model.state_dict().items())
    assert find_files(str(place / "a.txt")) == [place / "a.txt"] and place / "a.txt" in find_files(str(place))


# GGUF


@pytest.fixture
def written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """The model as GGUF with other keys."""

    def write(drop: tuple[str, ...] = (), **extra: Any) -> Path:
        path, original = tmp_path / "x.gguf", gguf._write_metadata
        keys = {key.replace("__", "."): value for key, value in extra.items()}

        def patched(writer: Any, *rest: Any) -> None:
            add = writer.add_key_value
            writer.add_key_value = lambda key, *more, **k: key in {*drop, *keys} or add(key, *more, **k)
            original(writer, *rest)
            writer.add_key_value = add
            for key, value in keys.items():
                kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
                {**kinds, bool: writer.add_bool, list: writer.add_array}[type(value)](key, value)

        with monkeypatch.context() as patch:
            patch.setattr(gguf, "_write_metadata", patched)
            path.unlink(missing_ok=True)
            convert(folder, path, "gguf", "f32")
        return path

    return write


REFUSED: dict[str, Any] = {
    "llama.rope.dimension_count": 16,
    "llama.attention.value_length": 16,
    "llama.rope.scaling.attn_factor": 1.2,
    "llama.logit_scale": 0.5,
    "llama.embedding_scale": 12.0,
    "llama.residual_scale": 0.2,
    "llama.attention.causal": False,
    "llama.rope.scaling.type": "yarn",
    "llama.attention.head_count_kv": [1, 2],
    "llama.attention.layer_norm_rms_epsilon": 1e38,
    "llama.rope.freq_base": 1e38,
}


@pytest.mark.parametrize("key", REFUSED)
def test_gguf_keys_that_are_not_computed_are_refused(written: Callable[..., Path], key: str) -> None:
    with pytest.raises(InputError) as error:
        open_model(written(**{key.replace(".", "__"): REFUSED[key]}))
    assert str(error.value.where).endswith(key)


@pytest.mark.parametrize(
    "keys",
    [{"llama.rope.scale_linear": 4.0}, {"llama.rope.scaling.factor": 4.0}, {"llama.attention.head_count_kv": [1, 1]}],
)
def test_gguf_keys_as_llama_cpp_reads_them(written: Callable[..., Path], keys: dict[str, Any]) -> None:
    """The scale before 2023-11, a factor without a type, a number of heads per layer."""
    config = open_model(written(**{key.replace(".", "__"): value for key, value in keys.items()})).config
    linear = CONFIG.changed({"rope_scaling": {"kind": "linear", "factor": 4.0}})
    assert replace(config, model_type="") == (linear if "rope" in next(iter(keys)) else CONFIG)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [("llama-bpe", "llama-3"), ("llama3", "llama-3"), ("llama-v3", "llama-3"), ("deepseek-r1-qwen", "qwen2")],
)
def test_llama_cpps_names_of_a_pre_tokenizer(written: Callable[..., Path], name: str, pattern: str) -> None:
    backend = Tokenizer.load(written(tokenizer__ggml__pre=name)).backend
    assert pattern_of(backend) == pattern
    assert (backend.normalizer is not None) == (pattern == "qwen2")


@pytest.mark.parametrize("name", ["default", "tekken"])
def test_an_unknown_pre_tokenizer_is_named(written: Callable[..., Path], name: str) -> None:
    with pytest.raises(InputError, match="this pre-tokenizer is not known") as error:
        Tokenizer.load(written(tokenizer__ggml__pre=name))
    assert error.value.found == name and "llama-v3" in str(error.value.expected)


def test_a_gguf_template_for_tools(written: Callable[..., Path]) -> None:
    keys = {"tokenizer__chat_template": "D:{{ messages[0].content }}", "tokenizer__chat_templates": ["tool_use"]}
    tokenizer = Tokenizer.load(written(**keys, tokenizer__chat_template__tool_use="T:{{ tools[0].function.name }}"))
    messages, tools = [{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "clock"}}]
    assert tokenizer.apply_chat_template(messages) == "D:hi"
    assert tokenizer.apply_chat_template(messages, tools=tools) == "T:clock"


def test_gguf_tensors_that_are_smaller_than_their_place(written: Callable[..., Path]) -> None:
    """A type is forged in the header: 4 bytes a value become half a byte, in the middle and at the end."""
    path = written()
    tensors, data = read_header(path).tensors, path.read_bytes()
    for name in ("blk.0.attn_norm.weight", max(tensors, key=lambda name: tensors[name].start), "blk.1.ffn_up.weight"):
        at = data.index(name.encode()) + len(name) + 4 + 8 * len(tensors[name].shape)
        assert data[at : at + 4] == bytes(4)
        path.write_bytes(data[:at] + bytes([2, 0, 0, 0]) + data[at + 4 :])
        with pytest.raises(InputError, match="there is a gap before"):
            open_model(path)


def test_a_norm_in_blocks_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where it fills its place."""
    import gguf as package

    monkeypatch.setattr(gguf, "_kind", lambda *rest: package.GGMLQuantizationType.Q8_0)
    convert(folder, tmp_path / "x.gguf", "gguf", "q8_0")
    with pytest.raises(InputError, match="not a type of a norm"):
        open_model(tmp_path / "x.gguf")


def test_fault_42_a_json_of_ranks_is_no_tokenizer_json(tmp_path: Path) -> None:
    """As Mistral's tekken files: what there is is named, and not a column of the library's parser."""
    file = tmp_path / "tekken.json"
    vocabulary = [{"rank": i, "token_bytes": "AA==", "token_str": None} for i in range(3)]
    file.write_text(json.dumps({"config": {"pattern": "x"}, "vocab": vocabulary, "special_tokens": []}))
    with pytest.raises(InputError, match=r"not a tokenizer.json[\s\S]*keys config, vocab, special_tokens") as caught:
        Tokenizer.load(file)
    assert "column" not in str(caught.value)
