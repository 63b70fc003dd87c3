"""Trained vocabularies: worked merges, the pre-tokenization, determinism, limits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import regex

from minillama.errors import InputError
from minillama.tokenizer import TokenizerTrainer, byte_tokenizer, char_tokenizer, train_byte_bpe
from minillama.tokenizer.pre import BYTE_TO_CHAR, piece_bytes

GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def smollm_cut(text: str) -> Iterator[str]:
    """llama.cpp's "smollm": cut at every digit, then GPT-2's words within the parts."""
    for part in regex.splititer(r"(\p{N})", text):
        yield from GPT2.findall(part)


def merges(tokenizer_json: str) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer_json)["model"]["merges"]]


def test_worked_merges() -> None:
    # hug 10, pug 5, pun 12, bun 4, hugs 5: u+g 20, u+n 16, h+ug 15, p+un 12
    texts = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
    tokenizer = train_byte_bpe(texts, 257 + 4)
    assert merges(tokenizer.backend.to_str()) == ["u g", "u n", "h ug", "p un"]
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("bug hugs mug")]
    assert pieces == ["b", "ug", " ", "hug", "s", " ", "m", "ug"]


def test_the_pretokenization_is_smollms(shared: Path) -> None:
    backend = train_byte_bpe([], 257).backend
    text = (shared / "tokenizer/llama3/ggml-vocab-llama-bpe.gguf.inp").read_bytes().decode()
    texts = [
        *text.split("\n__ggml_vocab_test__\n")[:-1],
        text,
        (shared / "text/en/alice.txt").read_text(encoding="utf-8"),
    ]
    assert len(texts) == 48
    for text in texts:
        pieces = [piece_bytes(piece).decode() for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        assert pieces == list(smollm_cut(text))


def test_ids_are_laid_out_as_documented() -> None:
    bpe = train_byte_bpe(["aaaa aaaa"], 300)
    assert (bpe.eos_id, bpe.bos_id, bpe.pre) == (0, 0, "smollm")
    assert bpe.vocab_size < 300, "there is nothing left to merge"
    assert {bpe.backend.id_to_token(i) for i in range(1, 257)} == set(BYTE_TO_CHAR)
    assert [byte_tokenizer().encode(chr(i)) for i in range(128)] == [[i] for i in range(128)]
    assert (byte_tokenizer().eos_id, byte_tokenizer().vocab_size) == (256, 257)
    chars = char_tokenizer(["ba\n", "b字"])
    assert [chars.backend.id_to_token(i) for i in range(chars.vocab_size)] == [
        "<|endoftext|>", "<unk>", "\n", "a", "b", "字",
    ]  # fmt: skip


def test_a_pair_seen_once_is_not_merged() -> None:
    assert train_byte_bpe(["abc"], 999).vocab_size == 257
    assert merges(train_byte_bpe(["ab", "ab"], 999).backend.to_str()) == ["a b"]


@pytest.mark.parametrize("kind", ["byte-bpe", "bytes", "char"])
def test_same_texts_same_files(kind: str, shared: Path, tmp_path: Path) -> None:
    texts = (shared / "text/en/botchan.txt").read_text(encoding="utf-8").split("\n\n")
    for name in ("a", "b"):
        TokenizerTrainer(kind, 1000)(iter(texts)).save(tmp_path / name)  # type: ignore[arg-type]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_bpe_fills_its_vocabulary_and_compresses(shared: Path) -> None:
    text = (shared / "text/en/tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = train_byte_bpe(text.split("\n\n"), 1024)
    assert tokenizer.vocab_size == 1024
    assert len(text) / len(tokenizer.encode(text)) > 2.3
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_descriptions_tell_trainers_apart() -> None:
    trainers = [
        TokenizerTrainer("byte-bpe", 4096),
        TokenizerTrainer("byte-bpe", 512),
        TokenizerTrainer("bytes"),
        TokenizerTrainer("char", 0),
    ]
    assert len({trainer.description for trainer in trainers}) == 4
    assert TokenizerTrainer("bytes", 5).description == TokenizerTrainer("bytes", 6).description


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(InputError, match="the 256 bytes"):
        train_byte_bpe(["a"], 256)
    with pytest.raises(InputError, match="unknown kind"):
        TokenizerTrainer("words")  # type: ignore[arg-type]
