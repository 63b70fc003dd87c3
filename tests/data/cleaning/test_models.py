"""n-gram model: KenLM's arithmetic, a worked Kneser-Ney, ARPA; classifier; model score; buckets; commands."""

from __future__ import annotations

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillama.commands.cli import main
from minillama.data.cleaning.classifier import Classifier, LinearClassifier
from minillama.data.cleaning.document import Draft
from minillama.data.cleaning.model_score import ModelScore
from minillama.data.cleaning.ngram_lm import NgramLM
from minillama.data.cleaning.perplexity import Buckets, Perplexity, PieceLM, piece_names
from minillama.errors import InputError
from minillama.tokenizer import byte_tokenizer

ARPA = """\\data\\
ngram 1=5
ngram 2=4

\\1-grams:
-1.0\t<unk>\t0
0\t<s>\t-0.3
-0.6\t</s>\t0
-0.5\ta\t-0.2
-0.7\tb\t-0.1

\\2-grams:
-0.2\t<s> a
-0.3\ta b
-0.4\tb </s>
-0.9\ta a

\\end\\
"""


def test_kenlms_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "a.arpa").write_text(ARPA)
    lm = NgramLM.read_arpa(tmp_path / "a.arpa")
    known = {name: i for i, name in enumerate(lm.tokens)}
    for text, log10, perplexity in [
        ("a b", -0.9, 1.995262),
        ("b a", -2.4, 6.309574),
        ("a zz b", -2.5, 4.216966),
        ("", -0.9, 7.943283),
    ]:
        words = [known.get(word, 0) for word in text.split()]
        assert lm.score(words) == pytest.approx(log10, abs=1e-6)
        assert 10 ** (-lm.score(words) / (len(words) + 1)) == pytest.approx(perplexity, abs=1e-5)
    rows = [[1, *(known[word] for word in text.split()), 2] for text in ("a b", "b a", "a a b")]
    together = lm.scores(np.array([i for row in rows for i in row])).sum()
    assert together == pytest.approx(sum(lm.score(row[1:-1]) for row in rows), abs=1e-9)


def kneser_ney(
    sentences: list[list[int]], order: int, discounts: dict[int, list[float]], context: tuple[int, ...], word: int
) -> float:
    """Interpolated modified Kneser-Ney by its definition, with dictionaries."""
    padded = [[1, *sentence, 2] for sentence in sentences]
    grams = [Counter(tuple(s[i : i + n]) for s in padded for i in range(len(s) - n + 1)) for n in range(order + 2)]

    def count(gram: tuple[int, ...]) -> float:
        if len(gram) == order or gram[0] == 1:
            return grams[len(gram)][gram] if gram != (1,) else 0
        return len({left[0] for left in grams[len(gram) + 1] if left[1:] == gram})

    def p(context: tuple[int, ...], word: int) -> float:
        n = len(context) + 1
        followers = [(g, count(g)) for g in grams[n] if g[:-1] == context and count(g)]
        lower = p(context[1:], word) if context else 1 / 8  # nine tokens but <s>
        total = sum(c for _, c in followers)
        if not total:
            return lower
        cut = {g: discounts[n][min(int(c), 3)] for g, c in followers}
        own = count((*context, word))
        return (own - cut.get((*context, word), 0)) / total + sum(cut.values()) / total * lower

    return p(context, word)


def test_kneser_ney_by_its_definition() -> None:
    rng = random.Random(0)
    sentences = [[rng.choices(range(3, 8), [8, 4, 2, 1, 1])[0] for _ in range(rng.randrange(1, 8))] for _ in range(60)]
    lm, size = NgramLM.train(sentences, ["<unk>", "<s>", "</s>", *"abcde", "never"], 3), 9
    from minillama.data.cleaning import ngram_lm

    padded = [i for s in sentences for i in (1, *s, 2)]
    discounts = {}
    for n in (1, 2, 3):  # the estimate, from counts taken anew
        plain, grams = (
            Counter(tuple(padded[i : i + m]) for i in range(len(padded) - m + 1) if 1 not in padded[i + 1 : i + m])
            for m in (n, n + 1)
        )
        extensions = Counter(gram[1:] for gram in grams)
        counts = [c if n == 3 or g[0] == 1 else extensions[g] for g, c in plain.items() if g != (1,)]
        k = [counts.count(i) for i in range(5)]
        y = k[1] / (k[1] + 2 * k[2]) if k[1] else 0
        estimate = [i - (i + 1) * y * k[i + 1] / k[i] for i in (1, 2, 3)] if all(k[1:]) else [-1.0]
        fits = all(0 <= d <= i for i, d in enumerate(estimate, 1))
        discounts[n] = [0, *estimate] if fits else ngram_lm._DISCOUNTS.tolist()
    assert discounts[3][1] not in (0.5, 1.0)  # estimated, not the fallback
    for context in [(1,), (1, 3), (3,), (3, 4), (7, 7), (5, 6)]:
        ids = np.array([*context, 3])
        for word in (0, 2, 3, 4, 7, 8):
            ids[-1] = word
            expected = kneser_ney(sentences, 3, discounts, context, word)
            assert lm.scores(ids)[-1] == pytest.approx(math.log10(expected), abs=1e-5), (context, word)
        total = sum(10 ** lm.scores(np.array([*context, word]))[-1] for word in range(size) if word != 1)
        assert total == pytest.approx(1, abs=1e-5)


def test_arpa_and_folder_give_the_same_model(tmp_path: Path) -> None:
    tokenizer, text = byte_tokenizer(), "A rose is a rose is a rose.\nÉté 1234 été\n\n" * 3
    made = PieceLM.train([text, "another line\n"], tokenizer, 4)
    made.save(tmp_path / "lm")
    made.lm.write_arpa(tmp_path / "lm.arpa.gz")
    value = made.perplexity("a rose is ete 5678")
    assert value < 6 and made.perplexity("A ROSE is été 0000") == value
    loaded = [PieceLM.load(tmp_path / "lm"), PieceLM.load(tmp_path / "lm.arpa.gz", str(tmp_path / "lm"))]
    for text in ("a rose is ete 5678", "zebra!\nxyz", "\U0001f600"):
        assert {one.perplexity(text) for one in loaded} == {made.perplexity(text)}
    assert len(set(piece_names(tokenizer))) == tokenizer.vocab_size and made.perplexity(" \n") == 0
    with pytest.raises(InputError, match="needs the tokenizer"):
        PieceLM.load(tmp_path / "lm.arpa.gz")
    (tmp_path / "bad.arpa").write_text(ARPA.replace("-0.7\tb\t-0.1\n", ""))
    with pytest.raises(InputError, match="not an ARPA file"):
        NgramLM.read_arpa(tmp_path / "bad.arpa")


def test_head_middle_and_tail(clean: Any, tmp_path: Path) -> None:
    PieceLM.train(["the cat sat on the mat\n" * 20], byte_tokenizer(), 5).save(tmp_path / "lm")
    texts = ["the cat sat", "the mat sat on", "qxz jvk w", "the cat qq", "on the mat", "zzz zzz kkkk"]
    steps = Perplexity(path=str(tmp_path / "lm")), Buckets(percentiles=(34.0, 67.0), keep=("head", "tail"))
    kept, removed = clean(texts, *steps)
    buckets = {line["text"]: line["measured"]["buckets"]["bucket"] for line in kept + removed}
    assert [text for text in texts if buckets[text] == "tail"] == ["qxz jvk w", "zzz zzz kkkk"]
    assert sorted(buckets.values()) == ["head"] * 2 + ["middle"] * 2 + ["tail"] * 2
    assert {line["removed"]["value"] for line in removed} == {"middle"}
    assert Buckets().value(Draft("x", measured={"perplexity": {"perplexity": 3.5}})) == 3.5


def noisy(rng: random.Random, words: list[str], others: list[str]) -> str:
    return " ".join(rng.choice(words if rng.random() < 0.8 else others) for _ in range(30))


def test_classifier_learns_and_is_calibrated(tmp_path: Path) -> None:
    rng, pair = (
        random.Random(0),
        (["theorem", "proof", "lemma", "see", "cited", "by"], ["buy", "now", "cheap", "click", "offer"]),
    )
    like, unlike = ([noisy(rng, *words) for _ in range(200)] for words in (pair, pair[::-1]))
    made = LinearClassifier.train(like, unlike, bits=14)
    assert dict(made.held_out)["accuracy"] > 0.95 and dict(made.held_out)["calibration_error"] < 0.1
    assert LinearClassifier.train(like, unlike, bits=14).score("theorem") == made.score("theorem")
    made.save(tmp_path / "c.safetensors")
    step = Classifier(path=str(tmp_path / "c.safetensors"), min_score=0.5)
    assert step(Draft("the proof of the lemma")) is None
    removal = step(Draft("click now, cheap"))
    assert removal and removal.reason == "score"
    (tmp_path / "x").write_bytes(b"no")
    for path, what in (("x", "not a classifier"), ("none", "cannot read the classifier")):
        with pytest.raises(InputError, match=what):
            LinearClassifier.load(tmp_path / path)
    with pytest.raises(InputError, match="too few documents"):
        LinearClassifier.train(like[:5], unlike)


def test_model_score_is_the_loss(shared: Path) -> None:
    import torch

    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

    path, text = shared / "models/stories260K/checkpoint_v1.bin", "Once upon a time, there was a little girl."
    pieces = shared / "tokenizer/stories260K/tok512.bin"
    step = ModelScore(path=str(path), tokenizer=str(pieces))
    draft = Draft(text)
    assert step(draft) is None
    model, tokenizer = Decoder.from_pretrained(path), Tokenizer.load(pieces)
    ids = torch.tensor([tokenizer.encode(text, bos=True)])
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item()
    assert draft.measured["model-score"]["nats_per_token"] == pytest.approx(loss, rel=1e-4)
    worse = Draft("time girl upon a Once little was there, a.")
    step(worse)
    assert worse.measured["model-score"]["bits_per_byte"] > draft.measured["model-score"]["bits_per_byte"]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer().save(tmp_path / "tokenizer")
    for name, text in (("a", "good words here"), ("b", "bad things there")):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{text} {i}"}}\n' for i in range(30)))
    lm = ["data", "ngram-lm", "train", "--input", str(tmp_path / "a.jsonl"), "--tokenizer", str(tmp_path / "tokenizer")]
    assert main([*lm, "--output", str(tmp_path / "lm"), "--order", "3", "--arpa", str(tmp_path / "lm.arpa")]) == 0
    assert "3-grams" in capsys.readouterr().out and (tmp_path / "lm.arpa").read_text().startswith("\\data\\\n")
    assert main([*lm, "--output", str(tmp_path / "lm")]) == 1
    words = [
        "--like",
        str(tmp_path / "a.jsonl"),
        "--unlike",
        str(tmp_path / "b.jsonl"),
        "--output",
        str(tmp_path / "c.st"),
    ]
    assert main(["data", "classifier", "train", *words, "--bits", "12"]) == 0
    assert "accuracy" in capsys.readouterr().out
