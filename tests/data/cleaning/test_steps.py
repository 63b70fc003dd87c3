"""Steps on single documents: extraction, language, repair, personal data, Chinese, code, LaTeX, StackExchange."""

from __future__ import annotations

import gzip
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from minillama.data.cleaning.c4 import C4
from minillama.data.cleaning.chinese import Chinese
from minillama.data.cleaning.code import Code, without_header
from minillama.data.cleaning.document import Draft, Removal, Step
from minillama.data.cleaning.extraction import Extract
from minillama.data.cleaning.fineweb import FineWeb
from minillama.data.cleaning.gopher import GopherQuality
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.language import Language, identify
from minillama.data.cleaning.latex import Latex
from minillama.data.cleaning.overlap import Overlap
from minillama.data.cleaning.personal import PersonalData
from minillama.data.cleaning.repair import Repair, SimplifiedChinese
from minillama.data.cleaning.stackexchange import StackExchange
from minillama.data.cleaning.topics import SensitiveWords


def after(step: Step, text: str, **fields: Any) -> str:
    draft = Draft(text, fields=fields)
    assert step(draft) is None
    return draft.text


def figures(step: Step, text: str) -> dict[str, Any]:
    draft = Draft(text)
    step(draft)
    return dict(draft.measured[step.name])


def f1(truth: str, text: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of token 4-grams, the article benchmark's metric."""
    counts = [Counter(zip(*(re.findall(r"\w+", t)[i:] for i in range(4)), strict=False)) for t in (truth, text)]
    hits = (counts[0] & counts[1]).total()
    precision, recall = (hits / counts[1].total() if counts[1] else 1.0), hits / counts[0].total()
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


@pytest.mark.parametrize("pages", [4, pytest.param(30, marks=pytest.mark.slow)])
def test_extraction_on_marked_pages(pages: int, shared: Path) -> None:
    trafilatura = pytest.importorskip("trafilatura")
    folder = shared / "web" / "html" / "article-benchmark"
    truth = json.loads((folder / "ground-truth.json").read_text(encoding="utf-8"))
    source, step, ours, theirs = Input(str(folder)), Extract(), [], []
    for path in sorted(folder.glob("*.html.gz"))[:pages]:
        (page,) = source.documents(path)
        assert isinstance(page, Draft) and step(page) is None and not page.kind
        expected = truth[path.name.removesuffix(".html.gz")]["articleBody"]
        ours.append(f1(expected, page.text)[2])
        theirs.append(f1(expected, trafilatura.extract(gzip.decompress(path.read_bytes())) or "")[2])
    mean = sum(ours) / len(ours)
    assert mean > 0.93 and mean >= sum(theirs) / len(theirs) - 0.02


def test_deep_pages_are_left_out() -> None:
    assert Extract()(Draft("<div>" * 10_000 + "text", kind="html")) == Removal("depth", 10_000, 2000)
    attributes = " ".join(f"a{i}" for i in range(6000))
    assert Extract()(Draft(f"<div {attributes}>", kind="html")) == Removal("tag_words", 6001, 5000)
    assert Extract()(Draft("<p>text<li>" * 5000, kind="html", id="0-0")) != Removal("depth", 10_000, 2000)


def test_languages_of_flores(shared: Path) -> None:
    wanted = {"arb_Arab": "ar", "deu_Latn": "de", "eng_Latn": "en", "fra_Latn": "fr"}
    wanted |= {"jpn_Jpan": "ja", "rus_Cyrl": "ru", "zho_Hans": "zh", "zho_Hant": "zh"}
    for name, code in wanted.items():
        lines = (shared / "text" / "flores200" / f"{name}.dev").read_text(encoding="utf-8").splitlines()[:200]
        share = sum(identify(line)[0] == code for line in lines) / len(lines)
        assert share > (0.98 if code == "zh" else 0.99), (name, share)
        whole = Draft("\n".join(lines))
        assert Language(keep=(code,))(whole) is None and whole.language == code
        assert Language(keep=("xx",))(whole) == Removal("language", code)


def test_classical_verse_is_chinese_beyond_doubt(shared: Path) -> None:
    """The model divides its probability between Chinese, its dialects and Japanese."""
    poems = Input(str(shared / "text/zh/poet.tang.0.json"))
    found = [identify(draft.text) for draft in poems.documents(poems.files()[0]) if isinstance(draft, Draft)]
    assert sum(code == "zh" and score > 0.9 for code, score in found) > 990 and len(found) == 1000


def test_repair_keeps_chinese_punctuation() -> None:
    assert after(Repair(), "Itâ€™s “so”，對嗎？（是）") == "It’s “so”，對嗎？（是）"
    assert Repair()(Draft("a" * 50 + "\ufffd")) == Removal("replacement_characters", pytest.approx(1 / 51, 1e-4), 0.005)


def test_repair_is_the_librarys(real: list[Draft]) -> None:
    """Lines in which there is nothing to repair are not given to it."""
    ftfy = pytest.importorskip("ftfy")
    config = ftfy.TextFixerConfig(
        unescape_html=False, fix_character_width=False, uncurl_quotes=False, normalization=None
    )
    changed = 0
    ends = ["voilÃœœ\nand", "a\xa0œ\r\n\r\n", "voilÃœœ", "é…œ\n", "\ré…œ\r\r\n"]
    for text in [*(draft.text for draft in real), *ends, "cafÃ© ‘so’\r\nline\x1b[0m two\x07\n\nâ€œyesâ€\x9d…\t—"]:
        changed += after(Repair(max_replacement_characters=1), text) != text
        assert after(Repair(max_replacement_characters=1), text) == ftfy.fix_text(text, config)
    assert changed > 3


def test_traditional_and_simplified() -> None:
    assert after(SimplifiedChinese(), "漢字與簡體") == "汉字与简体"
    found = figures(SimplifiedChinese(convert=False), "漢字汉字国")
    assert found == {"traditional": 1, "simplified": 2, "mixed": pytest.approx(1 / 3, 1e-5)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("to joe.b+x@mail.example.org.", "to <email>."),
        ("8.8.8.8 and 10.0.0.1, v1.2.3.4, 999.1.1.1, 1.2.3.4.5", "<ip> and 10.0.0.1, v1.2.3.4, 999.1.1.1, 1.2.3.4.5"),
        ("call (212) 555-0187 or +49 30 901820 or 415-555-2671", "call <phone> or <phone> or <phone>"),
        ("电话13812345678，座机010-62781234", "电话<phone>，座机<phone>"),
        ("11010519491231002X 110105194912310021", "<id> 110105194912310021"),
        ("QQ：12345678 PQQ12345678", "<qq> PQQ12345678"),
        ("in 1998-2004, 3.14159265, 2,000,000, 12345678901234", "in 1998-2004, 3.14159265, 2,000,000, 12345678901234"),
        ("2001:4860:4860:0:0:0:0:8888 12:30:45", "<ip> 12:30:45"),
    ],
)
def test_personal_data(text: str, expected: str) -> None:
    assert after(PersonalData(), text) == expected


def test_kinds_of_personal_data_are_counted() -> None:
    assert figures(PersonalData(kinds=("email",)), "a@b.org c@d.org 8.8.8.8") == {"replaced": 2, "email": 2}


def test_other_kinds_of_personal_data_stay_whole() -> None:
    text = "13812345678@qq.com, 8.8.8.8 QQ：13812345678 13812345678 a@b.org"
    assert after(PersonalData(kinds=("phone",)), text) == text.replace(" 13812345678", " <phone>")
    assert after(PersonalData(kinds=("qq", "ip")), text) == text.replace("QQ：13812345678", "<qq>").replace(
        "8.8.8.8", "<ip>"
    )
    assert after(PersonalData(kinds=()), text) == text


def test_chinese_rules(shared: Path) -> None:
    prose = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"
    assert (
        Chinese()(Draft(prose)) is None
        and after(Chinese(), "学 而　时 习 之，不亦说乎？ok ok 学而") == "学而时习之，不亦说乎？ok ok 学而"
    )
    for text, reason in [
        ("短文。", "han"),
        (prose[:12] + "english " * 8, "han_share"),
        ("学" * 200, "marks"),
        ("学学学，，" * 20, "marks"),
        (prose * 40 + "x" * 201, "foreign_run"),
        ("\n".join([prose] * 4), "duplicate_lines"),
    ]:
        removal = Chinese()(Draft(text))
        assert removal and removal.reason == reason, (text[:20], removal)
    poems = Input(str(shared / "text/zh/poet.tang.0.json"), field="paragraphs")
    drafts = [item for item in poems.documents(poems.files()[0]) if isinstance(item, Draft)]
    assert len(drafts) == 1000 and sum(Chinese()(draft) is None for draft in drafts) > 970


def test_code_rules() -> None:
    code = "def f(x):\n    return x + 1\n"
    for header in ("/* Copyright (c) 1999\n * all rights */\n", "# Copyright me\n# MIT License\n"):
        assert after(Code(), header + code, path="a.py") == code
    assert without_header("/* what it does */\n" + code) == "/* what it does */\n" + code
    assert without_header("#!/bin/sh\n# License: x\necho") == "#!/bin/sh\necho"
    for text, fields, reason in [
        (code, {"path": "a.crt"}, "extension"),
        (code, {"path": "a.py", "license": "GPL-3.0"}, "license"),
        ("x" * 1001, {"path": "a.py"}, "line_length"),
        (("x" * 101 + "\n") * 150, {"path": "a.py"}, "mean_line_length"),
        ("+-*/" * 20, {"path": "a.py"}, "alphanumeric"),
        ("# Copyright\n", {"path": "a.py"}, "alphanumeric"),
    ]:
        removal = Code()(Draft(text, fields=fields))
        assert removal and removal.reason == reason, (text[:20], removal)


def test_latex() -> None:
    paper = r"""\documentclass{article} % class
\newcommand{\R}{\mathbb{R}}
\newcommand\Rn{\R^n}
\newcommand{\two}[2]{#1#2}
\def\eps{\varepsilon}
\begin{document}
Abstract.
\paragraph{First} foo%bar
% a line
100\% of \Rn{} and \eps, \epsilon, \two{a}{b} % x
\bibliography{refs} after"""
    expected = r"""\paragraph{First} foo
100\% of \mathbb{R}^n{} and \varepsilon, \epsilon, \two{a}{b} """
    assert after(Latex(), paper) == expected + "\n"
    bomb = "".join(
        rf"\newcommand{{\a{c}}}{{\a{n}\a{n}\a{n}\a{n}}}" for c, n in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert len(after(Latex(), bomb + r"\section{x} \aa")) < 10**6


def test_real_latex(shared: Path) -> None:
    source, kept = Input(str(shared / "web/markup"), suffixes=("arxiv.jsonl", "arxiv_body.jsonl")), 0
    for path in source.files():
        for draft in source.documents(path):
            assert isinstance(draft, Draft)
            before = draft.text
            kept += Latex()(draft) is None
            assert len(draft.text) <= len(before) * 1.5 and not re.search(r"^%", draft.text, re.M)
    assert kept == 31


def test_stack_exchange(shared: Path) -> None:
    answers = [
        {"text": "<p>low</p>", "score": 1},
        {"body": "a<ul><li>b</li></ul>", "pm_score": 7},
        {"text": "no", "score": -2},
    ]
    text = after(StackExchange(lowest_score=0), "<p>How &lt;b&gt;?</p><pre>x < y</pre>", title="T", answers=answers)
    assert text == "Q: T\nHow <b>?\nx < y\n\nA: a\n*\n*b\n\nA: low"
    (path,) = Input(str(shared / "web/markup/stack_exchange.jsonl")).files()
    composed = next(Input(str(path)).documents(path))
    assert isinstance(composed, Draft)
    before = composed.text
    assert StackExchange()(composed) is None and composed.text.startswith(before[:40])


def test_sensitive_words(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# list\nbad\n坏词\n", encoding="utf-8")
    step = SensitiveWords(path=str(tmp_path / "words.txt"))
    assert step(Draft("badly put")) is None
    assert step(Draft("Bad, 好坏词语")) == Removal("words", 2, 0)


def test_books_that_contain_each_other(clean: Any, shared: Path) -> None:
    alice, botchan = ((shared / "text/en" / f"{name}.txt").read_text(encoding="utf-8") for name in ("alice", "botchan"))
    edition = alice[3000:140_000].replace("Alice", "Alicia", 4)
    kept, removed = clean([edition, botchan[:120_000], alice], Overlap())
    assert [line["id"][-1] for line in kept] == ["1", "2"]
    assert removed[0]["removed"]["reason"] == "overlap" and removed[0]["measured"]["overlap"]["like"].endswith("-2")


@pytest.mark.parametrize(
    "unit", [".", "!)", " ", "\n", "<li ", "%", "\\\\", "1", "a", "-", "学", "@a.", "\u3000", "/* "]
)
def test_no_pattern_takes_quadratic_time(unit: str) -> None:
    text = unit * (200_000 // len(unit)) + "x"
    start = time.process_time()
    for step in (C4(), GopherQuality(), PersonalData(), Chinese(), Code(), Latex(), StackExchange(), FineWeb()):
        step(Draft(text, fields={"path": "a.py"}))
    assert time.process_time() - start < 10  # 2 ** 35 character steps take minutes
