"""WordPiece by hand and against the library."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from minillama.errors import InputError
from minillama.tokenizer.reference.splitting import count_words
from minillama.tokenizer.reference.wordpiece import decode, encode, train

HUGS = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
ALPHABET = ["[UNK]", "##g", "##n", "##s", "##u", "b", "h", "p"]
PIECES = [
    "[UNK]", "un", "##aff", "##able", "runn", "##ing", "b", "h", "p", "##g", "##n", "##s", "##u", "##gs", "hu", "hug",
]  # fmt: skip


def test_the_score_by_hand() -> None:
    """(##g, ##s) 5/(20*5); then a tie of 1/36, the first is (h, ##u); (hu, ##gs) and (hu, ##g) 1/15."""
    assert train(HUGS, 12) == [*ALPHABET, "##gs", "hu", "hugs", "hug"]


def test_by_count_it_is_bpe() -> None:
    assert train(HUGS, 12, "count") == [*ALPHABET, "##ug", "##un", "hug", "pun"]
    with pytest.raises(InputError, match="unknown score"):
        train(HUGS, 12, "luck")  # type: ignore[arg-type]


def test_nothing_is_left_to_join() -> None:
    assert train({"ab": 1, "": 3}, 99) == ["[UNK]", "##b", "a", "ab"]
    assert train({}, 9) == ["[UNK]"]


@pytest.mark.parametrize(
    ("word", "cut"),
    [
        ("unaffable", "un ##aff ##able"), ("running", "runn ##ing"), ("hugs", "hug ##s"), ("bugs", "b ##u ##gs"),
        ("mug", "[UNK]"), ("unaffablez", "[UNK]"), ("h" + "u" * 100, "[UNK]"),
    ],
)  # fmt: skip
def test_cuts_by_hand(word: str, cut: str) -> None:
    assert encode(word, {piece: i for i, piece in enumerate(PIECES)}) == cut.split()


LIBRARY = Backend(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))


@given(word=st.text("hugpbnsraf", min_size=1, max_size=12))
def test_cuts_are_the_librarys(word: str) -> None:
    assert encode(word, {piece: i for i, piece in enumerate(PIECES)}) == LIBRARY.encode(word).tokens


def test_real_text_is_cut_as_the_library_cuts_it(shared: Path) -> None:
    text = (shared / "text/en/tinystories_sample.txt").read_text(encoding="utf-8")
    words = count_words([text], "words")
    pieces = {piece: i for i, piece in enumerate(train(words, 400))}
    library = Backend(models.WordPiece(pieces, unk_token="[UNK]"))
    assert len(pieces) == 400
    for word in [*words, "unbelievable", "Ünicode", "zzz"]:
        assert encode(word, pieces) == library.encode(word).tokens


def test_words_come_back_with_blanks_between_them() -> None:
    assert decode(["un", "##aff", "##able", ",", "hug", "##s"]) == "unaffable , hugs"
