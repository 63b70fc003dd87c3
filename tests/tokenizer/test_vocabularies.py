"""Vocabularies of every kind, on llama.cpp's test strings and against SentencePiece."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers

from minillama import Tokenizer
from minillama.errors import InputError
from minillama.tokenizer import byte_tokenizer, char_tokenizer, tiktoken
from minillama.tokenizer.gguf_export import vocabulary
from minillama.tokenizer.sentencepiece_vocab import Pieces, merges_by_score

LLAMA2 = ["tokenizer.model", "tokenizer.bin", "tokenizer.json", "ggml-vocab-llama-spm.gguf"]
FILES = [("llama2", "spm", name) for name in LLAMA2] + [("llama3", "bpe", "tokenizer.model")]


def cases(folder: Path, kind: str) -> list[tuple[str, list[int]]]:
    texts = (folder / f"ggml-vocab-llama-{kind}.gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = (folder / f"ggml-vocab-llama-{kind}.gguf.out").read_text().splitlines()
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


@pytest.mark.parametrize(("family", "kind", "name"), FILES)
def test_the_46_strings(family: str, kind: str, name: str, shared: Path) -> None:
    folder = shared / "tokenizer" / family
    tokenizer, table = Tokenizer.load(folder / name), cases(folder, kind)
    assert len(table) == 46
    for text, ids in table:
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        parts = [stream.push(i) for i in ids] + [stream.flush()]
        assert "".join(parts) == text and "\ufffd" not in "".join(parts)


@pytest.mark.parametrize(("family", "kind", "name"), FILES)
def test_no_text_becomes_a_special_token_unasked(family: str, kind: str, name: str, shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer" / family / name)
    for token in (tokenizer.bos_token, tokenizer.eos_token, "<unk>", "<|eot_id|>", "<0x41>"):
        ids = tokenizer.encode(f"a{token}b")
        assert tokenizer.special_ids.isdisjoint(ids), token
        assert tokenizer.decode(ids) == f"a{token}b"
    assert tokenizer.eos_id in tokenizer.encode(f"a{tokenizer.eos_token}b", special=True)


def test_llama3s_special_tokens(shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer/llama3/tokenizer.model")
    known = {
        "<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004,
        "<|start_header_id|>": 128006, "<|end_header_id|>": 128007, "<|eom_id|>": 128008, "<|eot_id|>": 128009,
        "<|python_tag|>": 128010, "<|reserved_special_token_0|>": 128002, "<|reserved_special_token_247|>": 128255,
    }  # fmt: skip
    assert {name: tokenizer.backend.token_to_id(name) for name in known} == known
    assert tokenizer.vocab_size == 128256 and len(tokenizer.special_ids) == 256
    # meta-llama/llama-models, tests/api/test_tokenizer.py
    sentence = tokenizer.encode("This is a test sentence.", bos=True)
    assert sentence == [128000, 2028, 374, 264, 1296, 11914, 13]
    assert tokenizer.encode("\n\n") == [271] and tokenizer.encode("assistant") == [78191]


def test_llama3s_ranks_are_written_as_they_were(shared: Path, tmp_path: Path) -> None:
    file = shared / "tokenizer/llama3/tokenizer.model"
    tiktoken.write(tmp_path / "tokenizer.model", Tokenizer.load(file).backend)
    assert (tmp_path / "tokenizer.model").read_bytes() == file.read_bytes()
    with pytest.raises(InputError, match="neither"):
        tiktoken.write(tmp_path / "other", byte_tokenizer().backend)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, SentencePieceProcessor]:
    file = Path(__file__).resolve().parents[2] / "../shared/data/tokenizer/llama2/tokenizer.model"
    if not file.exists():
        pytest.skip("real data is absent: no ../shared/data beside the checkout")
    return Tokenizer.load(file), SentencePieceProcessor(model_file=str(file))


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_text_is_cut_as_sentencepiece_cuts_it(text: str, llama2: tuple[Tokenizer, SentencePieceProcessor]) -> None:
    mine, theirs = llama2
    if "\0" in text or "\u2581" in text:
        return  # sentencepiece stops at NUL, and reads U+2581 as a blank
    assert mine.encode(text) == theirs.encode(text)


def test_chinese_unigram_model(shared: Path) -> None:
    """On prose, where its normalization (nmt_nfkc) has little to do."""
    file = shared / "tokenizer/chinese/chinese_sp.model"
    mine, theirs = Tokenizer.load(file), SentencePieceProcessor(model_file=str(file))
    lines = (shared / "text/flores200/zho_Hans.dev").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 900
    same = sum(mine.encode(line) == theirs.encode(line) for line in lines)
    assert same == len(lines)


def test_merges_follow_the_scores() -> None:
    """`ab` before `bc`; `abc` can be cut twice, and both cuts are merges."""
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -1.0, "bc": -2.0, "abc": -3.0, "xy": -1.0}
    assert merges_by_score(scores) == [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c")]
    with pytest.raises(InputError, match="is NaN"):
        merges_by_score({"a": float("nan")})


def test_pieces_of_a_backend_are_the_files(shared: Path) -> None:
    folder = shared / "tokenizer/llama2"
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    pieces = Pieces.of(tokenizer.backend)
    assert pieces is not None and pieces.dummy_prefix
    again = Tokenizer(pieces.backend(), eos="</s>", bos="<s>")
    assert all(again.encode(text) == ids for text, ids in cases(folder, "spm"))
    assert Pieces.of(byte_tokenizer().backend) is None


def test_a_tokenizer_that_gguf_cannot_express_is_refused() -> None:
    chars = char_tokenizer(["abc"])
    with pytest.raises(InputError, match="GGUF cannot express this tokenizer"):
        vocabulary(chars, chars.vocab_size)
    with pytest.raises(InputError, match="larger than the model"):
        vocabulary(byte_tokenizer(), 100)


@pytest.mark.parametrize("text", ["<s>", "a </s> b", "<unk>", "x<s>y</s>", "<unk"])
def test_a_unigram_model_makes_no_mark_of_text(text: str, shared: Path) -> None:
    file = shared / "tokenizer/chinese/chinese_sp.model"
    assert Tokenizer.load(file).encode(text) == SentencePieceProcessor(model_file=str(file)).encode(text)


def test_merges_that_are_not_sentencepieces_are_not_pieces() -> None:
    """`b c` before `a b`: SentencePiece would also merge `a bc`, and cut `abc` otherwise."""
    names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "c", "bc", "ab", "abc"]
    vocab = {name: i for i, name in enumerate(names)}
    for chosen, kept in [
        ([("b", "c"), ("a", "b"), ("ab", "c")], False),
        ([("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")], True),
    ]:
        backend = Backend(models.BPE(vocab=vocab, merges=chosen, byte_fallback=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        assert (Pieces.of(backend) is not None) == kept


@pytest.mark.parametrize("charsmap", [b"garbage", b"\0\0\0\0", b""])
def test_damaged_sentencepiece_models(charsmap: bytes, tmp_path: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    for name, kind in [("<unk>", 2 if charsmap else 1), ("<s>", 3), ("</s>", 3), ("▁a", 1)]:
        proto.pieces.add(piece=name, score=-1.0, type=kind)
    proto.normalizer_spec.precompiled_charsmap = charsmap
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path)


def test_a_forged_piece_and_a_forged_score_cost_nothing(tmp_path: Path) -> None:
    data = b"".join(struct.pack("<fi", 0.0, 1) + bytes([i % 96 + 32]) for i in range(300))
    long = struct.pack("<fi", 0.0, 10**6) + b"a" * 10**6
    for extra in (long, struct.pack("<fi", float("nan"), 1) + b"z"):
        (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 10**6) + data + extra)
        with pytest.raises(InputError, match=r"tokenizer\.bin"):
            Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", LLAMA2)
@pytest.mark.parametrize(
    "parts", [("Once", " upon a time"), ("中文", "字 x"), ("", "Hello"), ("a\n", " b"), ("🦙", "🦙 y")]
)
def test_a_stream_goes_on_where_the_prompt_ended(name: str, parts: tuple[str, str], shared: Path) -> None:
    """The blank of `▁upon` is part of the text, unless nothing stands before it."""
    tokenizer = Tokenizer.load(shared / "tokenizer/llama2" / name)
    prompt, ids = tokenizer.encode(parts[0], bos=True), tokenizer.encode("".join(parts), bos=True)
    assert ids[: len(prompt)] == prompt
    stream = tokenizer.stream(after=prompt)
    text = "".join(stream.push(i) for i in ids[len(prompt) :]) + stream.flush()
    assert parts[0] + text == "".join(parts)
