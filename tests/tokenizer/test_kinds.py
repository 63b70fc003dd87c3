"""Every kind of vocabulary, by the library and by the readable code: the same, or the same cuts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from minillama import Tokenizer
from minillama.errors import InputError
from minillama.tokenizer import TokenizerTrainer
from minillama.tokenizer.backends import splitter
from minillama.tokenizer.pre import STEPS
from minillama.tokenizer.reference import wordpiece
from minillama.tokenizer.reference.splitting import LOSSLESS_PATTERNS, PATTERNS, count_words
from minillama.tokenizer.reference.unigram import Unigram
from minillama.tokenizer.train import Kind

TRAINED: list[Kind] = ["byte-bpe", "bpe", "unigram", "sentencepiece", "wordpiece", "word", "char"]
LOSSLESS: list[Kind] = ["byte-bpe", "bpe", "unigram", "bytes"]


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[str]:
    english = (shared / "text/en/alice.txt").read_text(encoding="utf-8")[:60_000].split("\n\n")
    chinese = (shared / "text/flores200/zho_Hans.dev").read_text(encoding="utf-8").splitlines()[:60]
    return [*english, *chinese]


@pytest.mark.parametrize("kind", ["byte-bpe", "bpe", "word", "char"])
def test_the_readable_code_makes_the_librarys_file(kind: Kind, texts: list[str]) -> None:
    size = {"bpe": 2200}.get(kind, 700)
    fast, readable = (TokenizerTrainer(kind, size, reference=reference)(texts) for reference in (False, True))
    assert fast.vocab_size == size
    assert fast.backend.to_str() == readable.backend.to_str()


@pytest.mark.parametrize("pattern", STEPS)
def test_patterns_of_byte_level_bpe(pattern: str, texts: list[str]) -> None:
    fast, readable = (
        TokenizerTrainer("byte-bpe", 400, pattern=pattern, reference=reference)(texts[:80])
        for reference in (False, True)
    )
    assert fast.backend.to_str() == readable.backend.to_str()
    text = "I'LL pay $12345.67  now\n\n\n  ok 中文"
    assert fast.decode(fast.encode(text)) == text


def test_the_third_partys_merges_are_a_tokenizers(shared: Path) -> None:
    folder = shared / "tokenizer/bpe_train"
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    texts = (folder / "corpus.en").read_text(encoding="utf-8").split("<|endoftext|>")
    made = TokenizerTrainer("byte-bpe", 257 + len(lines), pattern="gpt-2", ties="greatest")(texts)
    merges = json.loads(made.backend.to_str())["model"]["merges"]
    assert [" ".join(pair) for pair in merges] == lines


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("reference", [False, True])
def test_the_same_texts_give_the_same_file(kind: Kind, reference: bool, texts: list[str]) -> None:
    trainer = TokenizerTrainer(kind, 1800 if kind in ("bpe", "unigram", "sentencepiece") else 500, reference=reference)
    first, second = (trainer(texts[:60] + texts[-15:]) for _ in range(2))
    assert first.backend.to_str() == second.backend.to_str()


@pytest.mark.parametrize("reference", [False, True])
def test_a_unigram_vocabulary_is_cut_as_the_readable_model_cuts_it(reference: bool, texts: list[str]) -> None:
    made = TokenizerTrainer("unigram", 2400, reference=reference)(texts)
    scores = {p: s for p, s in json.loads(made.backend.to_str())["model"]["vocab"] if not p.startswith("<")}
    model = Unigram(scores)
    for text in filter(None, [*texts[:40], *texts[-20:]]):
        spelt = "▁" + text.replace(" ", "▁")
        ids = made.encode(text)
        assert made.decode(ids) == text
        if any(char not in scores for char in spelt):
            continue  # bytes stand for it
        mine = sum(scores[piece] for piece in model.encode(spelt))
        theirs = sum(scores[made.backend.id_to_token(i)] for i in ids)
        assert mine == pytest.approx(theirs)


@pytest.mark.parametrize("score", ["count", "information"])
def test_a_wordpiece_vocabulary_is_cut_as_the_readable_code_cuts_it(score: wordpiece.Score, texts: list[str]) -> None:
    made = TokenizerTrainer("wordpiece", 1500, score=score)(texts)
    pieces = made.backend.get_vocab()
    for word in count_words(texts, "bert"):
        assert made.backend.encode(word, add_special_tokens=False).tokens == wordpiece.encode(word, pieces)


def test_wordpiece_by_count_is_the_librarys_vocabulary() -> None:
    """Where no two pairs are equally common; of ties its trainer takes any."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    words = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
    theirs = Backend(models.WordPiece(unk_token="[UNK]"))
    theirs.train_from_iterator(
        words, trainers.WordPieceTrainer(vocab_size=17, special_tokens=["[UNK]", "<|endoftext|>"], show_progress=False)
    )
    for reference in (False, True):
        made = TokenizerTrainer("wordpiece", 17, reference=reference)(words)
        assert set(made.backend.get_vocab()) == set(theirs.get_vocab())


def test_words_are_the_librarys(texts: list[str]) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, trainers

    theirs = Backend(models.WordLevel(unk_token="<unk>"))
    theirs.pre_tokenizer = splitter("words")
    special = ["<|endoftext|>", "<unk>"]
    theirs.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=700, min_frequency=0, special_tokens=special, show_progress=False)
    )
    assert TokenizerTrainer("word", 700)(texts).backend.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_the_readable_sentencepiece_model_opens_in_the_library(model: str, texts: list[str]) -> None:
    made = TokenizerTrainer("sentencepiece", 1900, model=model, reference=True)(texts)  # type: ignore[arg-type]
    theirs = SentencePieceProcessor(model_proto=made._model)
    lines = [line for text in texts for line in text.split("\n")]
    assert made.encode_batch(lines) == theirs.encode(lines)
    assert [made.decode(ids) for ids in made.encode_batch(lines)] == lines


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("reference", [False, True])
@given(text=st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=60)
def test_nothing_is_lost(kind: Kind, reference: bool, text: str) -> None:
    made = MADE[kind, reference]
    assert made.decode(made.encode(text)) == text


MADE = {
    (kind, reference): TokenizerTrainer(kind, 290, reference=reference)(
        ["low lower newest\nwidest, isn't it 1 24? " * 9]
    )
    for kind in LOSSLESS
    for reference in (False, True)
}


@pytest.mark.parametrize("pattern", PATTERNS)
@given(text=st.text(st.sampled_from("ab1 \n\t's.é٣½\u3000中$_…\u0301\ufe0f")))
@settings(deadline=None)
def test_a_pattern_is_the_same_in_both_libraries(pattern: str, text: str) -> None:
    from minillama.tokenizer.pre import piece_bytes

    mine = regex.findall(PATTERNS[pattern], text)
    assert "".join(mine) == text or pattern not in LOSSLESS_PATTERNS
    if pattern in STEPS:
        theirs = [piece_bytes(word).decode() for word, _ in STEPS[pattern].pre_tokenize_str(text)]
    else:
        theirs = [word for word, _ in splitter(pattern).pre_tokenize_str(text)]
    assert mine == theirs


@pytest.mark.parametrize("kind", TRAINED)
def test_a_folder_opens_again_and_in_transformers(kind: Kind, texts: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = TokenizerTrainer(kind, 1800)(texts)
    made.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == made.fingerprint
    for text in texts[:5]:
        assert again.encode(text) == made.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("kind", [kind for kind in TRAINED if kind not in ("word", "char")])
def test_a_vocabulary_larger_than_the_text_allows(kind: Kind) -> None:
    with pytest.raises(
        InputError, match=r"larger than the text allows\n  where: vocab_size\n  found: 9000\n  expected"
    ):
        TokenizerTrainer(kind, 9000, full=True)(["the cat sat on the mat with the hat"])
    assert TokenizerTrainer(kind, 9000)(["the cat sat on the mat with the hat"]).vocab_size < 400


@pytest.mark.parametrize("kind", TRAINED)
def test_a_vocabulary_too_small(kind: Kind) -> None:
    with pytest.raises(InputError, match="cannot hold its special tokens"):
        TokenizerTrainer(kind, 2)
    if kind in ("bpe", "wordpiece", "unigram", "sentencepiece"):
        with pytest.raises(InputError, match="vocab_size"):
            TokenizerTrainer(kind, 265 if kind != "wordpiece" else 9)(["abcdefghijklmnopqrstuvwxyz " * 9])


@pytest.mark.parametrize(
    ("field", "value"), [("kind", "x"), ("pattern", "x"), ("ties", "x"), ("score", "x"), ("normalization", "x")]
)
def test_unknown_choices_are_named(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"unknown {field} of a tokenizer"):
        TokenizerTrainer(**{field: value})  # type: ignore[arg-type]


def test_no_text_at_all() -> None:
    for kind in TRAINED:
        if kind in ("unigram", "sentencepiece"):
            with pytest.raises(InputError, match="no text"):
                TokenizerTrainer(kind, 300)([])
        else:
            assert TokenizerTrainer(kind, 300)([]).vocab_size <= 258


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sentencepiece"])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("model", ["unigram", "bpe"])
def test_marks_are_never_learned_from_text(kind: Kind, reference: bool, model: str) -> None:
    text = "<unk>\n<|endoftext|>\n<0x41>\n<s>\n</s>\n" * 20 + "ab ac ad"
    own = {"model": model, "normalization": "identity"} if kind == "sentencepiece" else {}
    made = TokenizerTrainer(kind, 330, reference=reference, **own)([text])  # type: ignore[arg-type]
    for name in ("<unk>", "<|endoftext|>", "<0x41>", "<s>", "</s>"):
        ids = made.encode(f"x{name} y")
        assert made.special_ids.isdisjoint(ids) and made.decode(ids) == f"x{name} y"


def test_a_long_line_is_not_lost() -> None:
    made = TokenizerTrainer("sentencepiece", 290)(["qq ww " * 200_000, "xyz xyz\n" * 5])
    assert {"q", "w"} <= set("".join(made.backend.get_vocab()))
    with pytest.raises(InputError, match="lone surrogate"):
        TokenizerTrainer("byte-bpe", 300)(["a\ud800"])


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        ("bpe", {"pattern": "gpt-2"}),
        ("unigram", {"ties": "first"}),
        ("bpe", {"score": "information"}),
        ("char", {"model": "bpe"}),
        ("word", {"normalization": "identity"}),
        ("unigram", {"coverage": 1.0}),
    ],
)
def test_a_setting_of_another_kind_is_refused(kind: Kind, setting: dict[str, object]) -> None:
    with pytest.raises(InputError, match="another kind's"):
        TokenizerTrainer(kind, 500, **setting)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"0\.98 to 1"):
        TokenizerTrainer("sentencepiece", 500, coverage=0.5)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "sentencepiece", "wordpiece"])
@pytest.mark.parametrize("reference", [False, True])
def test_the_least_size_that_is_named_is_enough(kind: Kind, reference: bool) -> None:
    text = "abcdefghijklmnopqrstuvwxyz ABCDEFG hig kl " * 9
    with pytest.raises(InputError, match="expected: at least") as caught:
        TokenizerTrainer(kind, 262 if kind != "wordpiece" else 10, reference=reference)([text])
    least = int(str(caught.value.expected).removeprefix("at least "))
    assert TokenizerTrainer(kind, least, reference=reference)([text]).vocab_size <= least
