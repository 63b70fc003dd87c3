"""Streaming: pushes and flush add up to decode, and no push ends inside a character."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.errors import InputError
from minillama.tokenizer import StreamDecoder, Tokenizer, byte_tokenizer, char_tokenizer, train_byte_bpe

TEXT = "tea 🍵 与 东坡 l'été"
TOKENIZERS = {"bpe": train_byte_bpe([TEXT * 4], 300), "bytes": byte_tokenizer(), "chars": char_tokenizer([TEXT])}


@pytest.fixture(scope="session")
def llama2(shared: Path) -> Tokenizer:
    return Tokenizer.load(shared / "tokenizer" / "llama2")


def pushes(stream: StreamDecoder, ids: list[int]) -> list[str]:
    return [*map(stream.push, ids), stream.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("skip", [True, False])
@given(data=st.data())
@settings(deadline=None)
def test_any_ids_add_up(name: str, skip: bool, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert "".join(pushes(tokenizer.stream(skip), ids)) == tokenizer.decode(ids, skip)


@given(data=st.data())
@settings(deadline=None)
def test_any_sentencepiece_ids_add_up(llama2: Tokenizer, data: st.DataObject) -> None:
    blank, byte = llama2.encode("")[:1] or [29871], st.integers(3, 258)  # a lone blank; <0x00>..<0xFF>
    some = st.sampled_from([*blank, 0, 1, 2]) | byte | st.integers(0, 31999)
    ids = data.draw(st.lists(some))
    for skip in (True, False):
        assert "".join(pushes(llama2.stream(skip), ids)) == llama2.decode(ids, skip)


@given(text=st.text(alphabet=st.sampled_from("a 🍵与東é👩‍🚀")))
@settings(deadline=None)
def test_a_character_comes_whole_and_at_once(text: str) -> None:
    tokenizer = TOKENIZERS["bytes"]
    pieces = pushes(tokenizer.stream(), tokenizer.encode(text))
    assert [piece for piece in pieces if piece] == list(text)


def test_invalid_bytes_by_hand() -> None:
    stream = TOKENIZERS["bytes"].stream()
    sent = [0xF0, 0x9F, 0x41, 0xFF, 0xE4, 0xB8, 0x8E, 0xE4]  # a tea cup cut short, A, never UTF-8, 与, cut by the end
    assert pushes(stream, sent) == ["", "", "\ufffdA", "\ufffd", "", "", "与", "", "\ufffd"]
    assert pushes(stream, [0x41]) == ["A", ""], "a flushed stream starts anew"


def test_sentencepiece_bytes_wait_for_the_end_of_their_run(llama2: Tokenizer) -> None:
    cup = [byte + 3 for byte in "🍵".encode()]
    tea = llama2.encode("tea")
    assert pushes(llama2.stream(), [*tea, *cup, *tea]) == ["tea", "", "", "", "", "🍵 tea", ""]
    assert pushes(llama2.stream(), [*cup, 0xFF + 3]) == ["", "", "", "", "", "\ufffd" * 5]


def test_an_id_outside_the_vocabulary_gives_a_stream_nothing_and_decode_an_error() -> None:
    """A model may have more rows than its tokenizer has tokens, and draw one of them."""
    tokenizer = TOKENIZERS["bytes"]
    assert pushes(tokenizer.stream(), [65, 257, 66]) == ["A", "", "B", ""]
    for bad in (257, -1):
        with pytest.raises(InputError, match=f"not in the vocabulary\n  found: {bad}\n  expected: 0 to 256"):
            tokenizer.decode([65, bad])
