"""Meta's layout in and out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama import Decoder, Tokenizer
from minillama.convert import convert
from minillama.errors import InputError
from minillama.formats import meta
from minillama.formats.layout import Entry

Make = Callable[..., Decoder]


def test_the_permutation_by_hand() -> None:
    """Two heads of eight rows; the orders are those of transformers' conversion script."""
    rows = torch.arange(16.0)[:, None]
    entry = Entry("wq", (16, 1), ("n_heads x head_dim", "dim"), {"q_proj": (16, 1)}, heads=2)
    assert entry.half_split(rows).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert entry.interleaved(rows).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("hidden_dim", [128, 98, 256, 344])
def test_round_trip_is_the_identity(make: Make, tied: bool, ranks: int, hidden_dim: int, tmp_path: Path) -> None:
    model = make(tied, hidden_dim=hidden_dim, max_seq_len=2048)
    meta.write(tmp_path, model.config, model.state_dict(), ranks=ranks)
    assert len(list(tmp_path.glob("*.pth"))) == ranks
    back = Decoder.from_pretrained(tmp_path)
    assert back.config == model.config
    for (name, mine), theirs in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    params = json.loads((tmp_path / "params.json").read_text())
    width = int(params.get("ffn_dim_multiplier", 1) * int(2 * 4 * params["dim"] / 3))  # Meta's FeedForward
    assert params["multiple_of"] * math.ceil(width / params["multiple_of"]) == hidden_dim


def test_llama3s_embedding_is_shared_by_rows(make: Make, tmp_path: Path) -> None:
    model = make(max_seq_len=2048)
    meta.write(tmp_path, model.config, model.state_dict(), ranks=2)
    for rank in range(2):
        file = tmp_path / f"consolidated.0{rank}.pth"
        table = torch.load(file, weights_only=True)
        table["tok_embeddings.weight"] = model.model.embed_tokens.weight.detach().chunk(2)[rank].clone()
        torch.save(table, file)
    assert torch.equal(Decoder.from_pretrained(tmp_path).model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_scaled_rope_comes_back(make: Make, tmp_path: Path) -> None:
    scaling = {"kind": "llama3", "factor": 32.0}
    config = make(rope_theta=500000.0, max_seq_len=131072).config.changed({"rope_scaling": scaling})
    meta.write(tmp_path, config, make(max_seq_len=131072).state_dict())
    assert Decoder.from_pretrained(tmp_path).config == config


def test_hf_to_meta_to_hf_with_llama2s_tokenizer(make: Make, shared: Path, tmp_path: Path) -> None:
    vocabulary = Tokenizer.load(shared / "tokenizer/llama2/tokenizer.model")
    model = make(vocab_size=32000, max_seq_len=2048)
    model.save_pretrained(tmp_path / "hf")
    vocabulary.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "back", "hf")
    mine, theirs = model.state_dict(), Decoder.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    text = "Der Müller, 粉屋 and  two donkeys 🫏\n\tate."
    assert Tokenizer.load(tmp_path / "back").encode(text) == vocabulary.encode(text)
    from sentencepiece import SentencePieceProcessor

    written = SentencePieceProcessor(model_file=str(tmp_path / "meta/tokenizer.model"))
    assert written.encode(text) == vocabulary.encode(text)


def test_what_it_cannot_express_is_refused_by_name(make: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "hf")
    bpe.save(tmp_path / "hf")
    with pytest.raises(InputError, match="neither Llama 2's nor Llama 3's"):
        convert(tmp_path / "hf", tmp_path / "meta", "meta")
    with pytest.raises(InputError, match=r"cannot express this(?s:.*)head_dim"):
        meta.write(tmp_path / "meta", (wide := make(head_dim=32)).config, wide.state_dict())
    convert(tmp_path / "hf", tmp_path / "free", "hf")
    assert not (tmp_path / "meta/consolidated.00.pth").exists()


@pytest.mark.parametrize("dim", [32, 96, 256, 288, 1000, 4096])
def test_every_width_follows_from_metas_rule(dim: int) -> None:
    for hidden_dim in range(1, 4 * dim + 1, 1 + dim // 300):
        keys = meta._width(dim, hidden_dim)
        width = int(keys.get("ffn_dim_multiplier", 1) * int(8 * dim / 3))
        assert keys["multiple_of"] * ((width + keys["multiple_of"] - 1) // keys["multiple_of"]) == hidden_dim


def test_bands_that_params_json_has_not_are_refused(make: Make, tmp_path: Path) -> None:
    scaling = {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 1024}
    with pytest.raises(InputError, match=r"cannot express this(?s:.*)rope_scaling"):
        meta.write(tmp_path, make().config.changed({"rope_scaling": scaling}), make().state_dict())
    with pytest.raises(InputError, match="ranks do not divide"):
        meta.write(tmp_path, make().config, make().state_dict(), ranks=3)


def test_a_tokenizer_that_grew_is_not_replaced_by_the_old_file(make: Make, shared: Path, tmp_path: Path) -> None:
    file = shared / "tokenizer/llama2/tokenizer.model"
    make(vocab_size=32001, max_seq_len=2048).save_pretrained(tmp_path / "hf")
    grown = Tokenizer.load(file)
    grown.backend.add_special_tokens(["<|im_start|>"])
    grown.save(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.model").write_bytes(file.read_bytes())
    convert(tmp_path / "hf", tmp_path / "meta", "meta")
    ids = Tokenizer.load(tmp_path / "meta").encode("<|im_start|>hi", special=True)
    assert ids == grown.encode("<|im_start|>hi", special=True) and ids[0] == 32000


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 96).expand(2**20, 96),
        torch.zeros(320, 96, dtype=torch.complex64),
        torch.zeros(()),
        torch.eye(4).to_sparse(),
        torch.zeros(320, 96, 1),
    ],
    ids=["stride 0", "complex", "scalar", "sparse", "three axes"],
)
def test_tensors_that_are_no_arrays_of_numbers(tensor: torch.Tensor, make: Make, tmp_path: Path) -> None:
    meta.write(tmp_path, make().config, make().state_dict())
    table = torch.load(tmp_path / "consolidated.00.pth", weights_only=True)
    torch.save(table | {"tok_embeddings.weight": tensor}, tmp_path / "consolidated.00.pth")
    with pytest.raises(InputError, match=r"tok_embeddings.weight|more than tensors"):
        Decoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("params", ['{"dim": Infinity, "n_layers": 2, "n_heads": 6}', '{"dim": 96}', "[]", "[" * 10**5])
def test_params_json_that_is_none(params: str, make: Make, tmp_path: Path) -> None:
    meta.write(tmp_path, make().config, make().state_dict())
    (tmp_path / "params.json").write_text(params)
    with pytest.raises(InputError, match=r"params\.json"):
        Decoder.from_pretrained(tmp_path)
