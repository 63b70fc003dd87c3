"""Explanations end at the tokenizer's own ids; figures are those that can be counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from minillama import Tokenizer
from minillama.errors import InputError
from minillama.tokenizer import TokenizerTrainer
from minillama.tokenizer.compare import measure, plot
from minillama.tokenizer.explain import explain
from minillama.tokenizer.train import Kind

HUGS = ["hug"] * 10 + ["pug"] * 5 + ["pun"] * 12 + ["bun"] * 4 + ["hugs"] * 5
KINDS: list[Kind] = ["byte-bpe", "bpe", "unigram", "sentencepiece", "wordpiece", "word", "char", "bytes"]


def test_merges_step_by_step() -> None:
    made = TokenizerTrainer("byte-bpe", 261)(HUGS)
    assert list(explain(made, "bug hugs")) == [
        "text        'bug hugs'",
        "model       BPE, 261 tokens",
        "words       bug Ġhugs",
        "",
        "bug",
        "  start                    b u g",
        "  merge 0: u + g           b ug",
        "",
        "Ġhugs",
        "  start                    Ġ h u g s",
        "  merge 0: u + g           Ġ h ug s",
        "  merge 2: h + ug          Ġ hug s",
        "",
        "ids         b=66 ug=257 Ġ=221 hug=259 s=83",
    ]


def test_the_lattice_with_its_scores() -> None:
    made = TokenizerTrainer("unigram", 258 + 11, reference=True)(HUGS)
    lines = list(explain(made, "hugs", n_best=2))
    vocab = {made.backend.id_to_token(i) for i in range(258, made.vocab_size)}
    edges = [
        line.split()[1] for line in lines if line.startswith("    ") and "-" in line.split()[0] and "%" not in line
    ]
    assert set(edges) == {piece for piece in vocab if piece in "▁hugs"}
    shares = [float(line.split()[1].rstrip("%")) for line in lines if "%" in line]
    assert len(shares) == 2 and shares[0] >= shares[1] and sum(shares) <= 100.01


def test_longest_matches() -> None:
    made = TokenizerTrainer("wordpiece", 18)(HUGS)
    lines = list(explain(made, "hugs mug"))
    assert "  longest match in hugs                 hug" in lines
    assert "  longest match in s                    ##s" in lines
    assert "  no match somewhere in mug: the whole word is [UNK]" in lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["hug 中 hugs", "", " ", "puns! \n bun", "🦙🦙x"])
def test_the_steps_lead_to_the_ids(kind: Kind, text: str) -> None:
    size = 0 if kind in ("char", "bytes", "word") else 280
    made = TokenizerTrainer(kind, size)([*HUGS, "pug pun hugs bun\n"])
    lines = list(explain(made, text))
    assert lines[-1].split() == ["ids", *lines[-1].split()[1:]]
    assert [int(word.rpartition("=")[2]) for word in lines[-1].split()[1:]] == made.encode(text)
    assert not any(line.startswith("(the steps") for line in lines)


@pytest.mark.parametrize("name", ["llama2", "llama3", "chinese/chinese_sp.model"])
def test_the_steps_of_real_vocabularies(name: str, shared: Path) -> None:
    made = Tokenizer.load(shared / "tokenizer" / name)
    for text in ("Hello world, it's 2024.", "人工智能是计算机科学", "naïve 🦙"):
        assert not any(line.startswith("(the steps") for line in explain(made, text)), text


def test_an_added_token_is_told(shared: Path) -> None:
    made = TokenizerTrainer("byte-bpe", 261)(HUGS)
    made.backend.add_tokens(["[hug]"])
    assert any("added tokens are split off" in line for line in explain(made, "a [hug] b"))


def test_figures_by_hand() -> None:
    byte, bpe = TokenizerTrainer("bytes")([]), TokenizerTrainer("byte-bpe", 261)(HUGS)
    found = measure(byte, ["hug hug", "中"])
    assert (found.tokens, found.tokens_per_character, found.bytes_per_token) == (10, 10 / 8, 1.0)
    assert found.tokens_per_word == 10 / 3 and found.unknown == 0 and found.coverage == 7 / 8
    assert measure(bpe, ["hug hug"]).tokens_per_word == 1.5  # hug, a blank, hug
    assert measure(bpe, ["中文" * 9]).tokens_per_word is None
    words = TokenizerTrainer("word")(HUGS)
    found = measure(words, ["hug mug"])
    assert (found.unknown, found.coverage) == (0.5, 4 / 7)
    pieces = TokenizerTrainer("bpe", 280)(HUGS)
    assert measure(pieces, ["hug 中"]).coverage == 4 / 5
    with pytest.raises(InputError, match="no text"):
        measure(byte, ["", ""])


def test_real_languages(shared: Path, tmp_path: Path) -> None:
    """Chinese costs Llama 2 more tokens than characters, and the Chinese model hardly more than half as many."""
    table = {}
    for name in ("llama2", "chinese/chinese_sp.model"):
        made = Tokenizer.load(shared / "tokenizer" / name)
        table[name] = {
            language: measure(made, (shared / f"text/flores200/{language}.dev").read_text("utf-8").splitlines()[:200])
            for language in ("eng_Latn", "zho_Hans")
        }
    llama2, chinese = table["llama2"], table["chinese/chinese_sp.model"]
    assert llama2["zho_Hans"].tokens_per_character > 1.3 and chinese["zho_Hans"].tokens_per_character < 0.7
    assert llama2["eng_Latn"].tokens_per_word < 1.6 < 2.5 < chinese["eng_Latn"].tokens_per_word
    assert llama2["zho_Hans"].coverage < 0.85 < 0.99 < chinese["zho_Hans"].coverage
    plot(tmp_path / "p.png", table)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="cannot write the plot"):
        plot(tmp_path / "p.nothing", table)


def test_coverage_knows_what_a_piece_is(shared: Path) -> None:
    """Latin-1 letters are no bytes in a vocabulary of characters, and half-width kana are read as wide ones."""
    text = "über für Mädchen Größe café" * 3
    for kind in ("char", "word", "wordpiece"):
        assert measure(TokenizerTrainer(kind, 0 if kind != "wordpiece" else 60)([text]), [text]).coverage == 1, kind  # type: ignore[arg-type]
    made = TokenizerTrainer("sentencepiece", 290)(["ﾊﾟ fox パ" * 5])
    assert measure(made, ["ﾊﾟ fox"]).coverage == 1
    assert 0 < measure(made, ["中 fox"]).coverage < 1
