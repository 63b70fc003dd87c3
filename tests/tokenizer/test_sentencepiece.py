"""SentencePiece files: every type of piece and every rule against the library itself."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from minillama import Tokenizer
from minillama.errors import InputError
from minillama.tokenizer import TokenizerTrainer, sentencepiece
from minillama.tokenizer.sentencepiece_vocab import BYTES, PieceType

NORMAL, CONTROL, USER, UNUSED = (PieceType[name] for name in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED"))
UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
CHARS = list("▁abc<>/s中")
TEXT = st.lists(
    st.sampled_from(
        [*"abc x中é", "  ", "<sep>", "Ⅷ", "<s>", "</s>", "<unk>", "<0x41>", "ﬁ", "\u3000", "b ", "\n", "ab"]
    ),
    max_size=10,
).map("".join)


@pytest.fixture(scope="module")
def charsmap() -> bytes:
    """The library's compiled nmt_nfkc."""
    data = TokenizerTrainer("sentencepiece", 275)(["hello world"])._model
    return bytes(sentencepiece.message(data, "").normalizer_spec.precompiled_charsmap)


def model(seed: int, kind: int, charsmap: bytes = b"", **rules: bool) -> Any:
    """A model with random pieces and scores; equal scores in some of the BPE models."""
    r, proto = random.Random(seed), sentencepiece_model_pb2.ModelProto()
    proto.pieces.add(piece="<unk>", score=0, type=2)
    for name in ("<s>", "</s>"):
        proto.pieces.add(piece=name, score=0, type=CONTROL)
    for name in r.sample(["<sep>", "Ⅷ", "x  y"], 2) if r.random() < 0.5 else []:
        proto.pieces.add(piece=name, score=0, type=USER)
    if r.random() < 0.4:
        for name in BYTES:
            proto.pieces.add(piece=name, score=0, type=PieceType.BYTE)
    joined = {"".join(r.choice("▁abc中") for _ in range(r.randint(2, 4))) for _ in range(25)}
    names = [*CHARS, *(sorted(joined) if kind != CHAR else [])]
    r.shuffle(names)
    tied, unused = r.random() < 0.3, r.random() < 0.4
    for i, name in enumerate(names):
        score = -1.0 - i // (5 if tied else 1) if kind == BPE else -1 - 9 * r.random()
        hidden = unused and kind != CHAR and len(name) > 1 and r.random() < 0.15
        proto.pieces.add(piece=name, score=score, type=UNUSED if hidden else NORMAL)
    proto.trainer_spec.model_type = kind
    proto.trainer_spec.byte_fallback = any(piece.type == PieceType.BYTE for piece in proto.pieces)
    proto.normalizer_spec.add_dummy_prefix = rules.get("dummy", True)
    proto.normalizer_spec.remove_extra_whitespaces = rules.get("squeeze", True)
    proto.normalizer_spec.precompiled_charsmap = charsmap
    return proto


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from([UNIGRAM, BPE, CHAR]),
    dummy=st.booleans(),
    squeeze=st.booleans(),
    is_plain=st.booleans(),
    texts=st.lists(TEXT, min_size=8, max_size=8),
)
@settings(deadline=None, max_examples=250)
def test_ids_and_texts_are_the_librarys(
    seed: int, kind: int, dummy: bool, squeeze: bool, is_plain: bool, texts: list[str], charsmap: bytes
) -> None:
    proto = model(seed, kind, b"" if is_plain else charsmap, dummy=dummy, squeeze=squeeze)
    theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
    mine = Tokenizer.of(sentencepiece.parse(proto.SerializeToString(), "model"))
    for text in texts:
        ids = theirs.encode(text)
        assert mine.encode(text) == ids, [theirs.id_to_piece(i) for i in ids]
        if (
            is_plain and kind == UNIGRAM and all(piece.type != USER for piece in proto.pieces)
        ):  # the tokenizer.json finds a cut that is as good
            near = [i for i in mine.backend.encode(text, add_special_tokens=False).ids if i]
            scores = [sum(theirs.get_score(i) for i in cut if i and not theirs.is_byte(i)) for cut in (ids, near)]
            assert scores[0] == pytest.approx(scores[1]), [theirs.id_to_piece(i) for i in near]
        if 0 not in ids:  # of an unknown piece the library makes " ⁇ ", we nothing
            assert mine.decode(ids) == theirs.decode(ids)
            stream = mine.stream()
            assert "".join([*map(stream.push, ids), stream.flush()]) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("rule", "text", "normal"),
    [
        ("nmt_nfkc", "Ｈｅｌｌｏ　ｗｏｒｌｄ", "▁Hello▁world"),
        ("nmt_nfkc", "①②\u3000ﬁne", "▁12▁fine"),
        ("nmt_nfkc", "  a  b  ", "▁a▁b"),
        ("nmt_nfkc", "a\tb\nc", "▁a▁b▁c"),
        ("nmt_nfkc", "\u337f", "▁株式会社"),
        ("nmt_nfkc", "\uff76\uff9e", "▁\u30ac"),
        ("nmt_nfkc", "\uff5e", "▁\uff5e"),
        ("nfkc", "\uff5e", "▁~"),
        ("nfkc", "a\tb", "▁a\tb"),
        ("nfkc_cf", "ABC ß", "▁abc▁ß"),
        ("identity", "  a  b  ", "▁▁▁a▁▁b▁▁"),
    ],
)
def test_normalization(rule: str, text: str, normal: str) -> None:
    made = TokenizerTrainer("sentencepiece", 300, normalization=rule)(["abc fine hello world 12 ABC ß"])
    theirs = SentencePieceProcessor(model_proto=made._model)
    assert theirs.normalize(text) == normal
    assert made.encode(text) == theirs.encode(text)
    again = Tokenizer.of(sentencepiece.parse(made._model, "model"))
    assert again.encode(text) == theirs.encode(text)


def test_equal_scores_are_merged_from_left_to_right(tmp_path: Path) -> None:
    """A tokenizer.json cannot say so; the folder then says that the .model is to be asked."""
    proto = sentencepiece_model_pb2.ModelProto()
    for name, score, kind in [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("45", 0, 1), ("34", 0, 1)]:
        proto.pieces.add(piece=name, score=score, type=kind)
    for i, char in enumerate("▁345"):
        proto.pieces.add(piece=char, score=-1 - i, type=1)
    proto.trainer_spec.model_type, proto.normalizer_spec.remove_extra_whitespaces = BPE, False
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    mine = Tokenizer.load(tmp_path)
    assert [mine.backend.id_to_token(i) for i in mine.encode("345")] == ["▁", "34", "5"]
    mine.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.encode("345") == mine.encode("345") != again.backend.encode("345").ids
    assert again.fingerprint == mine.fingerprint and again.pieces is not None
    with pytest.raises(InputError, match="lone surrogate"):
        again.encode("a\ud800")


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("trainer_spec", "model_type", WORD),
        ("trainer_spec", "treat_whitespace_as_suffix", True),
        ("normalizer_spec", "escape_whitespaces", False),
        ("denormalizer_spec", "precompiled_charsmap", b"x"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(section: str, field: str, value: object) -> None:
    proto = model(1, BPE)
    setattr(getattr(proto, section), field, value)
    with pytest.raises(InputError, match=rf"not supported\n  where: m\.model, {section}"):
        sentencepiece.parse(proto.SerializeToString(), "m.model")


@pytest.mark.parametrize("name", ["llama2/tokenizer.model", "chinese/chinese_sp.model"])
def test_real_models_are_exact_and_written_as_they_were(name: str, shared: Path, tmp_path: Path) -> None:
    file = shared / "tokenizer" / name
    mine, theirs = Tokenizer.load(file), SentencePieceProcessor(model_file=str(file))
    assert (mine._encoder is None) == name.startswith("llama2")  # the other has nmt_nfkc
    for language in ("eng_Latn", "zho_Hans", "jpn_Jpan", "arb_Arab"):
        lines = (shared / f"text/flores200/{language}.dev").read_text(encoding="utf-8").splitlines()[:300]
        assert mine.encode_batch(lines) == theirs.encode(lines)
    mine.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == file.read_bytes()
    assert Tokenizer.load(tmp_path).encode("中文 text") == theirs.encode("中文 text")


def test_pieces_that_are_kept_whole_are_the_librarys(tmp_path: Path) -> None:
    """User-defined ones of blanks, as Gemma's, and characters of private use, which stand for nothing here."""
    from sentencepiece import SentencePieceTrainer

    for prefix in ("true", "false"):
        SentencePieceTrainer.train(
            f"--input={__file__} --model_prefix={tmp_path}/m --vocab_size=400 --model_type=bpe --minloglevel=3 "
            f"--user_defined_symbols=▁▁,▁▁▁,<b> --normalization_rule_name=identity --byte_fallback=true "
            f"--remove_extra_whitespaces=false --add_dummy_prefix={prefix}"
        )
        mine, theirs = Tokenizer.load(tmp_path / "m.model"), SentencePieceProcessor(f"{tmp_path}/m.model")
        for text in ("  ", "the   <b>  x", "a<b>b", "<b>", "\U000f0001 x", "▁", " ▁▁ a", ""):
            ids = theirs.encode(text)
            assert mine.encode(text) == ids
            assert mine.decode(ids) == theirs.decode(ids)


def test_special_tokens_stand_between_parts_that_are_cut_exactly() -> None:
    made = TokenizerTrainer("sentencepiece", 300)(["ﾊﾟﾀｰﾝ pattern ㌔ " * 9])
    ids = made.encode("ﾊﾟ</s>㌔", special=True)
    assert ids == [*made.encode("ﾊﾟ"), made.eos_id, *made.encode("㌔")]
    assert made.encode("ﾊﾟ ㌔", special=True) == made.encode("ﾊﾟ ㌔")


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    made = TokenizerTrainer("sentencepiece", 300)(["ﾊﾟﾀｰﾝ pattern ㌔ " * 9])
    made.add_bos = False
    made.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    again = Tokenizer.load(tmp_path)
    assert not again.add_bos and again.chat_template == "{{ messages }}" and not again.is_exact
    assert again.encode("ﾊﾟ ㌔") == made.encode("ﾊﾟ ㌔")
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"is not there\n  where: .*tokenizer_config\.json, encode_with"):
        Tokenizer.load(tmp_path)
