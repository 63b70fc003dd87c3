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
from minillama.formats.rows import to_half_split, to_interleaved

Make = Callable[..., Decoder]


def test_the_permutation_by_hand() -> None:
    """Two heads of eight rows; the orders are those of transformers' conversion script."""
    rows = torch.arange(16.0)[:, None]
    assert to_half_split(rows, 2).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert to_interleaved(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


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
        meta.write(tmp_path / "meta", make(head_dim=32).config, {})
    convert(tmp_path / "hf", tmp_path / "free", "hf")
    assert not (tmp_path / "meta/consolidated.00.pth").exists()
