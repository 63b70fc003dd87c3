"""Vocabularies that are pruned, of another model, or named in another file; added words; streams."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minillama import InputError, Tokenizer
from minillama.tokenizer.pre import BYTE_TO_CHAR

WORDS = ["café", "đem", "über", "čau", "«user»", "§1", "Ġx", "Ä", "¡", "½ cup", "中文", "<|réponse|>", "a b", "<ok>"]


def backend(special: tuple[str, ...] = ("<s>", "</s>"), words: tuple[str, ...] = ()) -> Backend:
    made = Backend(models.BPE(vocab={char: i for i, char in enumerate(BYTE_TO_CHAR)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    made.add_tokens([AddedToken(word, normalized=False) for word in words])
    return made


def save(folder: Path, made: Backend, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def row(content: str, special: bool = True) -> dict[str, Any]:
    return {"content": content, "special": special} | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"))


# pruned SentencePiece vocabularies


@pytest.mark.parametrize("how", ["unused", "missing"])
def test_a_vocabulary_without_a_character(how: str, shared: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString((shared / "tokenizer/llama2/tokenizer.model").read_bytes())
    piece = next(piece for piece in proto.pieces if piece.piece == "H")
    if how == "unused":
        piece.type = 5
    else:
        proto.pieces.remove(piece)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    mine, text = Tokenizer.load(tmp_path), "Hello Harry, the House of High Hills: HHH H Höhe"
    assert not mine.is_exact
    assert mine.encode(text) == SentencePieceProcessor(model_proto=proto.SerializeToString()).encode(text)


def test_a_gguf_vocabulary_without_a_character(tmp_path: Path) -> None:
    """llama.cpp merges characters too, of which no token piece is made."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    names = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "e",
        "l",
        "o",
        "He",
        "▁He",
        "llo",
        "lo",
    ]
    types = [2, 3, 3, *[6] * 256, *[1] * 8]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([-float(i) for i in range(len(names))])
    writer.add_token_types(types)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    mine = Tokenizer.load(tmp_path / "v.gguf")
    assert [names[i] for i in mine.encode("Hello")] == ["▁He", "llo"]
    assert [names[i] for i in mine.encode("H")] == ["▁", "<0x48>"]


# ranks of other models


@pytest.mark.parametrize(("name", "count"), [("qwen.tiktoken", 300), ("tokenizer.model", 128001)])
def test_ranks_of_another_model_are_not_llama_3s(name: str, count: int, tmp_path: Path) -> None:
    lines = (base64.b64encode(i.to_bytes(3, "big")) + b" %d\n" % i for i in range(count))
    (tmp_path / name).write_bytes(b"".join(lines))
    with pytest.raises(InputError, match="not Llama 3's ranks") as error:
        Tokenizer.load(tmp_path / name)
    assert error.value.found == f"{count} ranks"


# special tokens in other files


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"special_tokens_map": {"eos_token": "<end>", "bos_token": row("<s>")}}, "<end>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": row("<end>")}}, "<end>"),
        ({"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<end>"}}, "</s>"),
        ({"tokenizer_config": {"eos_token": "<new>", "added_tokens_decoder": {"259": row("<new>")}}}, "<new>"),
        ({"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": 258}}, "<end>"),
    ],
)
def test_where_the_end_of_a_text_is_named(files: dict[str, Any], eos: str, tmp_path: Path) -> None:
    """As transformers reads them, but for the last, where it knows none."""
    assert Tokenizer.load(save(tmp_path, backend(("<s>", "</s>", "<end>")), **files)).eos_token == eos


def test_special_tokens_that_are_in_the_settings_alone(tmp_path: Path) -> None:
    table = {"258": row("<|user|>"), "10000": row("</s>"), "259": row("word", special=False)}
    folder = save(tmp_path, backend(), tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": table})
    made = Tokenizer.load(folder)
    assert made.encode("<|user|>hi", special=True) == [258, *b"hi"]
    assert made.encode("<|user|>") == [*b"<|user|>"] and made.encode("a word") == [*b"a ", 259]
    table["300"] = row("<gap>")
    with pytest.raises(InputError, match="another id"):
        Tokenizer.load(save(tmp_path, backend(), tokenizer_config={"eos_token": "</s>", "added_tokens_decoder": table}))


def test_special_tokens_that_are_whole_words(tmp_path: Path) -> None:
    made = backend()
    made.add_special_tokens([AddedToken("<tool>", single_word=True, normalized=False, special=True)])
    mine = Tokenizer.load(save(tmp_path, made, tokenizer_config={"eos_token": "</s>"}))
    for text, count in (("<tool>", 1), ("a <tool> b", 1), ("a<tool>", 0), ("<tool>s", 0), ("(<tool>)", 1)):
        assert mine.encode(text, special=True).count(258) == count, text


@pytest.mark.parametrize("normalized", [False, True])
def test_special_tokens_that_are_normalized(normalized: bool, tmp_path: Path) -> None:
    """The library's own name of a `normalized` token is "▁<tool>" here, and "▁<end>" is in no file."""
    made = backend()
    made.pre_tokenizer, made.normalizer = None, normalizers.Sequence([normalizers.Prepend("▁")])
    made.add_special_tokens([AddedToken(name, normalized=normalized, special=True) for name in ("<tool>", "<end>")])
    folder = save(tmp_path, made, tokenizer_config={"bos_token": "<s>"}, generation_config={"eos_token_id": 259})
    mine = Tokenizer.load(folder)
    assert mine.encode("<tool><tool>", special=True) == [258, 258]
    assert 258 not in mine.encode("<tool>")
    assert mine.eos_token == "<end>"


def test_a_padding_token_beyond_the_models_rows(tmp_path: Path) -> None:
    """A [PAD] that was added for batches is never written; a word of the vocabulary might be."""
    mine = Tokenizer.load(save(tmp_path, backend(("<s>", "</s>", "[PAD]")), tokenizer_config={"eos_token": "</s>"}))
    mine.check_fits(258, spares_special=True)
    with pytest.raises(InputError, match="larger than the model's"):
        mine.check_fits(257 - 2, spares_special=True)


# text of tokens


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = save(tmp_path_factory.mktemp("words"), backend(words=tuple(WORDS)), tokenizer_config={"eos_token": "</s>"})
    return Tokenizer.load(folder)


@pytest.mark.parametrize("word", WORDS)
def test_added_words_are_their_own_text(word: str, added: Tokenizer) -> None:
    """And no bytes of the alphabet in which byte-level vocabularies write them."""
    for text in (f"x {word} y", word, f"{word}{word}é", f"中{word}"):
        ids = added.encode(text)
        assert added.decode(ids) == text
        stream = added.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == text


@given(text=st.text(st.sampled_from("aÄĀá é中é Ġđ🦙")))
@settings(deadline=None)
def test_added_letters_and_bytes_do_not_mix(text: str, added: Tokenizer) -> None:
    """Ä is an added word with the id of byte 0xC4, with which Ā begins."""
    assert added.decode(added.encode(text)) == text


@pytest.mark.parametrize(
    "decoder",
    [decoders.BPEDecoder("Ġ"), decoders.CTC(), decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])],
)
def test_a_stream_is_decode_whatever_the_decoder(decoder: Any, tmp_path: Path) -> None:
    names = ["</s>", "Ġamigos", "革", "Ġun", "b", "a", "b|", "<pad>"]
    made = Backend(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    made.decoder = decoder
    mine = Tokenizer.load(save(tmp_path, made, tokenizer_config={"eos_token": "</s>"}))
    for ids in ([1, 2, 3, 4], [5, 4, 5, 4], [4, 4, 1], [6, 5, 7, 2]):
        stream = mine.stream()
        assert "".join([*map(stream.push, ids), stream.flush()]) == mine.decode(ids)
