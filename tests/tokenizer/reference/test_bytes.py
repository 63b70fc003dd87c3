"""Text from broken bytes, and byte n-grams."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillama.errors import InputError
from minillama.tokenizer.reference import byte_fallback
from minillama.tokenizer.reference.byte_ngrams import ByteNgrams
from minillama.tokenizer.reference.splitting import count_words
from minillama.tokenizer.reference.utf8 import is_character, recover

WORDS = count_words(["磨坊主有两头驴子，驴子在磨坊里。the mill and the miller " * 9], "gpt-2")
NGRAMS = ByteNgrams.train(WORDS, 300)


@given(text=st.text())
def test_valid_text_is_what_it_is(text: str) -> None:
    assert recover(text.encode()) == text
    assert NGRAMS.decode(NGRAMS.encode(text)) == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a\xffb", "a\ufffdb"),
        ("中文".encode()[1:], "\ufffd\ufffd文"),
        ("中文".encode()[:-1], "中\ufffd\ufffd"),
        (b"\xe4\xb8" + "é".encode(), "\ufffd\ufffdé"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate is no character
    ],
)
def test_broken_bytes_by_hand(data: bytes, text: str) -> None:
    assert recover(data) == text
    assert recover(data, "") == text.replace("\ufffd", "")


@given(data=st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, 0xA6, 0x99])).map(bytes))
def test_no_other_reading_has_more_characters(data: bytes) -> None:
    """Against all sets of disjoint spans, of at most nine bytes."""
    data = data[:9]
    spans = [(i, j) for i, j in combinations(range(len(data) + 1), 2) if j - i <= 4 and is_character(data[i:j])]

    def most(at: int) -> int:
        return max([0, *(1 + most(j) for i, j in spans if i >= at)])

    assert len(recover(data, "")) == most(0)


def test_the_cut_has_the_fewest_pieces() -> None:
    pieces = ByteNgrams([b"ab", b"bcd", b"abc", b"cde"])
    cut = [pieces.pieces[i] for i in pieces.encode("abcde")]
    assert cut == [b"ab", b"cde"]
    with pytest.raises(InputError, match="256 bytes"):
        ByteNgrams.train({}, 255)


def test_ngrams_shorten_what_was_trained_on() -> None:
    assert len(NGRAMS.pieces) == 300 and NGRAMS.longest > 3
    for word in ("驴子在磨坊里", " miller"):
        assert len(NGRAMS.encode(word)) < len(word.encode()) / 2.5


@given(text=st.text(st.characters(exclude_categories=["Cs"])), known=st.frozensets(st.sampled_from("abcé中")))
def test_byte_fallback_loses_nothing(text: str, known: frozenset[str]) -> None:
    pieces = byte_fallback.encode(text, known)
    assert all(piece in known or len(piece) == 6 for piece in pieces)
    assert byte_fallback.decode(pieces) == text


def test_byte_fallback_by_hand() -> None:
    assert byte_fallback.encode(["▁a", "é"], {"▁a"}) == ["▁a", "<0xC3>", "<0xA9>"]
    assert byte_fallback.decode(["a", "<0xC3>", "b", "<0xC3>", "<0xA9>"]) == "a\ufffdbé"
    assert byte_fallback.decode(["<0xE4>", "<0xB8>"]) == "\ufffd\ufffd"
