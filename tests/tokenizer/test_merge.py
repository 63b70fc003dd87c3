"""Vocabularies that grow: Chinese-LLaMA's merge with its published numbers, Ziya's characters, byte-level BPE."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from minillama import Tokenizer
from minillama.errors import InputError
from minillama.tokenizer import TokenizerTrainer
from minillama.tokenizer.merge import extend, new_characters

ENGLISH = ["The miller kept two donkeys, a clock and a barrel of rain. " * 9]
CHINESE = ["磨坊主有两头驴子、一个钟和一桶雨水。驴子在磨坊里，钟在墙上。" * 9]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    shared = Path(__file__).resolve().parents[2] / "../shared/data"
    if not shared.is_dir():
        pytest.skip("real data is absent: no ../shared/data beside the checkout")
    made = extend(shared / "tokenizer/llama2/tokenizer.model", shared / "tokenizer/chinese/chinese_sp.model")
    assert (made.merged, made.tokenizer.vocab_size) == (17_953, 49_953)
    folder = tmp_path_factory.mktemp("merged")
    made.tokenizer.save(folder)
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("text", "before", "after"),
    [
        ("你好", 3, [42390]),
        ("中文", 3, [29871, 33782]),
        ("人工智能是计算机科学", 11, [29871, 43819, 30392, 33482, 32599]),
        ("12345", 6, [36055, 33559, 29945]),
    ],
)
def test_the_published_token_counts(text: str, before: int, after: list[int], merged: Tokenizer, shared: Path) -> None:
    assert len(Tokenizer.load(shared / "tokenizer/llama2").encode(text)) == before
    assert merged.encode(text) == after
    assert merged.decode(after) == text


def test_old_ids_are_unchanged_and_new_ones_are_the_published(merged: Tokenizer, shared: Path) -> None:
    old = Tokenizer.load(shared / "tokenizer/llama2/tokenizer.model").backend
    assert all(old.id_to_token(i) == merged.backend.id_to_token(i) for i in range(32_000))
    known = {32000: "\u4f46", 32001: "\u4e00\u4e2a", 49952: "\u5121"}
    assert {i: merged.backend.id_to_token(i) for i in known} == known


def test_real_text_is_cut_as_sentencepiece_cuts_it(merged: Tokenizer, shared: Path) -> None:
    theirs = SentencePieceProcessor(model_proto=merged._model)
    for language in ("eng_Latn", "zho_Hans", "zho_Hant"):
        lines = (shared / f"text/flores200/{language}.dev").read_text(encoding="utf-8").splitlines()[:200]
        assert merged.encode_batch(lines) == theirs.encode(lines)


def test_one_more_mark_makes_it_chinese_alpacas(shared: Path) -> None:
    base, extra = shared / "tokenizer/llama2/tokenizer.model", shared / "tokenizer/chinese/chinese_sp.model"
    made = extend(base, extra, special=["[PAD]"]).tokenizer
    assert made.vocab_size == 49_954 and made.backend.token_to_id("[PAD]") == 49_953 in made.special_ids
    with pytest.raises(InputError, match=r"already\n.*\n  found: <s>"):
        extend(base, special=["<s>"])


def test_ziyas_characters(shared: Path) -> None:
    """The commonest first, those that are pieces already left out; the texts hold fewer than 7,410 new ones."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((shared / "text/zh/trpl").glob("*.md"))]
    base = shared / "tokenizer/llama2/tokenizer.model"
    known = {piece.piece for piece in sentencepiece_model_pb2.ModelProto.FromString(base.read_bytes()).pieces}
    expected = new_characters(texts, known)
    made = extend(base, characters=100, texts=texts)
    assert made.characters == 100 and made.tokenizer.vocab_size == 32_100
    assert [made.tokenizer.backend.id_to_token(i) for i in range(32_000, 32_100)] == expected[:100]
    joined = "".join(texts)
    assert [joined.count(char) for char in expected] == sorted((joined.count(char) for char in expected), reverse=True)
    assert not known & set(expected) and not any(map(str.isspace, expected))
    everything = extend(base, characters=7410, texts=texts)
    assert everything.characters == len(expected) < 7410
    assert everything.tokenizer.encode(expected[0]) == [29871, 32_000]


def test_byte_level_vocabularies(tmp_path: Path) -> None:
    TokenizerTrainer("byte-bpe", 320)(ENGLISH).save(tmp_path / "a")
    TokenizerTrainer("byte-bpe", 330)(CHINESE).save(tmp_path / "b")
    first, second = Tokenizer.load(tmp_path / "a"), Tokenizer.load(tmp_path / "b")
    made = extend(tmp_path / "a", tmp_path / "b")
    table = made.tokenizer.backend.get_vocab()
    assert all(table[piece] == i for piece, i in first.backend.get_vocab().items())
    assert set(table) == {*first.backend.get_vocab(), *second.backend.get_vocab()}
    assert made.merged == len(table) - first.vocab_size > 50
    for text in [*ENGLISH, *CHINESE]:
        assert made.tokenizer.decode(made.tokenizer.encode(text)) == text
    assert made.tokenizer.encode(ENGLISH[0]) == first.encode(ENGLISH[0])
    assert len(made.tokenizer.encode(CHINESE[0])) == len(second.encode(CHINESE[0])) < len(first.encode(CHINESE[0])) / 2


def test_what_does_not_fit_together(tmp_path: Path, shared: Path) -> None:
    llama2, chinese = shared / "tokenizer/llama2/tokenizer.model", shared / "tokenizer/chinese/chinese_sp.model"
    TokenizerTrainer("byte-bpe", 300)(ENGLISH).save(tmp_path / "bytes")
    TokenizerTrainer("byte-bpe", 300, pattern="llama-3")(ENGLISH).save(tmp_path / "other")
    with pytest.raises(InputError, match="different kinds"):
        extend(llama2, tmp_path / "bytes")
    with pytest.raises(InputError, match=r"cannot be merged[\s\S]*smollm[\s\S]*llama-3"):
        extend(tmp_path / "bytes", tmp_path / "other")
    with pytest.raises(InputError, match=r"BPE model alone[\s\S]*unigram"):
        extend(chinese, llama2)
    with pytest.raises(InputError, match="no SentencePiece model another one"):
        extend(tmp_path / "bytes", characters=3, texts=["中"])
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        extend(tmp_path / "nothing", chinese)
    proto = sentencepiece_model_pb2.ModelProto.FromString(chinese.read_bytes())
    proto.pieces.add(piece="[MASK]", score=0, type=4)
    (tmp_path / "marked.model").write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=r"special tokens do not match[\s\S]*\[MASK\]"):
        extend(llama2, tmp_path / "marked.model")


def test_ids_that_would_move_are_refused(tmp_path: Path, shared: Path) -> None:
    folder = tmp_path / "added"
    made = Tokenizer.load(shared / "tokenizer/llama2/tokenizer.model")
    made.backend.add_special_tokens(["<pad>"])
    made.save(folder)
    with pytest.raises(InputError, match=r"tokenizer\.model lacks[\s\S]*found: <pad>"):
        extend(folder, special=["[PAD]"])
    assert extend(folder / "tokenizer.model", special=["[PAD]"]).tokenizer.vocab_size == 32_001
    with pytest.raises(InputError, match="nothing to append"):
        extend(folder / "tokenizer.model")


def test_a_chat_template_stays(tmp_path: Path) -> None:
    TokenizerTrainer("byte-bpe", 320)(ENGLISH).save(tmp_path / "a")
    (tmp_path / "a/chat_template.jinja").write_text("{{ messages }}")
    TokenizerTrainer("byte-bpe", 330)(CHINESE).save(tmp_path / "b")
    assert extend(tmp_path / "a", tmp_path / "b").tokenizer.chat_template == "{{ messages }}"
