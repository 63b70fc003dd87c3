"""GGUF in and out. That llama.cpp agrees is in tests/oracles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import quants

from minillama import Decoder, Tokenizer
from minillama.convert import convert
from minillama.errors import InputError
from minillama.formats import gguf_header
from minillama.formats.gguf import NAMES
from minillama.formats.gguf_header import read_header
from minillama.formats.layout import rename
from minillama.formats.open import open_model

Make = Callable[..., Decoder]

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def saved(make: Make, folder: Path, bpe: Tokenizer, tied: bool = False, **changes: object) -> Decoder:
    model = make(tied, **changes)
    model.save_pretrained(folder)
    bpe.save(folder)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 32},
        {"rope_scaling": {"kind": "llama3", "factor": 8.0}, "rope_theta": 500000.0},
        {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_seq_len": 64}, "rope_theta": 500000.0},
        {"rope_scaling": {"kind": "linear", "factor": 4.0}},
    ],
    ids=["plain", "head_dim", "llama3", "llama3 of 64", "linear"],
)
def test_round_trip_in_float32_is_the_identity(
    make: Make, story: str, tied: bool, changes: dict, bpe: Tokenizer, tmp_path: Path
) -> None:
    scaling, changes = changes.get("rope_scaling"), {k: v for k, v in changes.items() if k != "rope_scaling"}
    model = saved(make, tmp_path / "hf", bpe, tied, **changes)
    config = model.config.changed({"rope_scaling": scaling}) if scaling else model.config
    (tmp_path / "hf/config.json").write_text(json.dumps(config.to_hf()))
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", "f32")
    convert(tmp_path / "a.gguf", tmp_path / "back", "hf")
    back = Decoder.from_pretrained(tmp_path / "back")
    assert back.config == config
    for (name, mine), theirs in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    mine, theirs = Tokenizer.load(tmp_path / "hf"), Tokenizer.load(tmp_path / "back")
    assert theirs.encode(story) == mine.encode(story)
    assert (theirs.bos_id, theirs.eos_id, theirs.add_bos) == (mine.bos_id, mine.eos_id, mine.add_bos)


@pytest.mark.parametrize("kind", KINDS + K_QUANTS)
def test_every_type_is_read_as_the_gguf_package_reads_it(make: Make, kind: str, tmp_path: Path) -> None:
    """Random blocks of each type, written by the package; the permuted ones are compared after the permutation."""
    model = make(dim=256, n_heads=8, n_kv_heads=2, hidden_dim=512)
    path = tmp_path / "a.gguf"
    number = gguf.GGMLQuantizationType[kind]
    block, width = gguf.GGML_QUANT_SIZES[number]
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    for key, value in {
        "embedding_length": config.dim, "block_count": 2, "attention.head_count": 8, "attention.head_count_kv": 2,
        "feed_forward_length": 512, "context_length": 128,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    generator = np.random.default_rng(0)
    expected = {}
    for ours, shape in config.tensors().items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            data, used = values, gguf.GGMLQuantizationType.F32
        elif kind in KINDS:
            data, used = quants.quantize(values, number), number
        else:  # the package has no K-quants to write: any bytes are some numbers, if the scales are finite
            data = generator.integers(0, 60, (shape[0], shape[1] // block * width), dtype=np.uint8)
            used = number
        expected[ours] = torch.from_numpy(quants.dequantize(data, used).astype(np.float32)).reshape(shape)
        writer.add_tensor(rename(ours, NAMES), data, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_model(path)
    for ours, tensor in opened.tensors.items():
        want = expected[ours]
        heads = {"q_proj": 8, "k_proj": 2}.get(ours.split(".")[-2])
        if heads:
            want = torch.stack(
                [want[h * 32 + 2 * i + two] for h in range(heads) for two in range(2) for i in range(16)]
            )
        assert torch.equal(tensor.float(), want), ours
        assert (ours in opened.int4) == (kind in ("Q4_0", "Q4_1") and want.dim() > 1)
        if ours in opened.int4:
            torch.testing.assert_close(opened.int4[ours].weight(), want, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "error"), [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 7e-3), ("q4_0", 9e-2), ("q4_1", 8e-2)]
)
def test_shorter_types_are_near(make: Make, dtype: str, error: float, bpe: Tokenizer, tmp_path: Path) -> None:
    model = saved(make, tmp_path / "hf", bpe)
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", dtype)  # type: ignore[arg-type]
    kinds = {info.dtype for name, info in read_header(tmp_path / "a.gguf").tensors.items() if "norm" not in name}
    assert kinds == ({"Q4_1", "Q8_0"} if dtype == "q4_1" else {dtype.upper()})
    back = Decoder.from_pretrained(tmp_path / "a.gguf", dtype=torch.float32)
    for (name, mine), theirs in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert (mine - theirs).norm() <= error * mine.norm(), name
        assert ("norm" in name) == torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", ["q4_0", "q4_1"])
def test_numbers_of_four_bits_are_handed_on_as_they_are(make: Make, dtype: str, bpe: Tokenizer, tmp_path: Path) -> None:
    """The same blocks from Q4_1 to Q4_1; from Q4_0 the same weights."""
    saved(make, tmp_path / "hf", bpe)
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", dtype)  # type: ignore[arg-type]
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", "q4_1")
    a, b = (read_header(tmp_path / f"{name}.gguf") for name in "ab")
    for name, info in b.tensors.items():
        if name.startswith("blk.") and len(info.shape) > 1:
            kinds = (gguf.GGMLQuantizationType[header.tensors[name].dtype] for header in (a, b))
            raw = [
                np.memmap(header.path, np.uint8, "r", start.start, (start.shape[0], start.size // start.shape[0]))
                for header, start in ((a, a.tensors[name]), (b, info))
            ]
            weights = [quants.dequantize(data, kind) for data, kind in zip(raw, kinds, strict=True)]
            assert np.allclose(*weights, rtol=1e-6, atol=1e-7), name
            assert info.dtype == "Q4_1" and (dtype == "q4_0" or np.array_equal(*raw)), name


def test_rows_that_fit_no_block_stay_in_float16(make: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    saved(make, tmp_path / "hf", bpe, hidden_dim=100)
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", "q4_0")
    kinds = {name: info.dtype for name, info in read_header(tmp_path / "a.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_a_vocabulary_smaller_than_the_model_is_padded(story: str, make: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    saved(make, tmp_path / "hf", bpe, vocab_size=333)
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf")
    names = read_header(tmp_path / "a.gguf").metadata["tokenizer.ggml.tokens"]
    assert len(names) == 333 and names[-1] == "[PAD332]"
    assert Tokenizer.load(tmp_path / "a.gguf").encode(story) == bpe.encode(story)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    cases = (("gemma2", 0, "gemma2, with soft-capping of logits"), ("llama", 8, "llama, with mixture of experts"))
    for kind, experts, found in cases:
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", kind)
        writer.add_expert_count(experts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InputError, match=rf"architecture is not supported(?s:.*){found}(?s:.*)llama\.cpp"):
            open_model(tmp_path / "a.gguf")


def test_a_value_beyond_float16_is_refused(make: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 5] = 1e6
    model.save_pretrained(tmp_path / "hf")
    bpe.save(tmp_path / "hf")
    with pytest.raises(InputError, match=r"too large for float16(?s:.*)embed_tokens"):
        convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", "f16")
    assert not list(tmp_path.glob("*a.gguf*"))


def test_the_table_of_types_is_the_packages() -> None:
    for kind in quants._type_traits:
        block, width = gguf.GGML_QUANT_SIZES[kind]
        assert gguf_header._TYPES[int(kind)] == (kind.name, block, width)
