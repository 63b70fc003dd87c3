"""Rules of Gopher, C4, FineWeb and mC4: datatrove's verdicts on all real documents, and worked examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minillama.data.cleaning.c4 import C4, MC4
from minillama.data.cleaning.document import Draft, Step
from minillama.data.cleaning.extraction import Extract
from minillama.data.cleaning.fineweb import FineWeb
from minillama.data.cleaning.gopher import GopherQuality, GopherRepetition
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.words import sentences, words

PAIRS = {
    "gopher_quality_filter.GopherQualityFilter": GopherQuality,
    "gopher_repetition_filter.GopherRepetitionFilter": GopherRepetition,
    "c4_filters.C4QualityFilter": C4,
    "c4_filters.C4ParagraphFilter": MC4,
    "fineweb_quality_filter.FineWebQualityFilter": FineWeb,
}


class Ours:
    """Our words and sentences behind datatrove's interface: the rules are compared, not the splitters."""

    def word_tokenize(self, text: str) -> list[str]:
        return list(words(text))

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends, at = [], 0
        for sentence in sentences(text):
            at = text.index(sentence, at) + len(sentence)
            ends.append((0, at))
        return ends


@pytest.fixture
def filters(monkeypatch: pytest.MonkeyPatch) -> Any:
    datatrove = pytest.importorskip("datatrove.utils.word_tokenizers")
    monkeypatch.setattr(datatrove, "load_word_tokenizer", lambda language: Ours())
    from importlib import import_module

    def load(name: str, **settings: Any) -> Any:
        module, _, cls = name.partition(".")
        return getattr(import_module(f"datatrove.pipeline.filters.{module}"), cls)(**settings)

    return load


def verdict(step: Step, text: str) -> tuple[bool, str, str]:
    draft = Draft(text)
    removal = step(draft)
    return removal is None, draft.text, removal.reason if removal else ""


@pytest.fixture
def everything(shared: Path, real: list[Draft]) -> list[Draft]:
    """All texts, crawls and pages there are."""
    found = list(real)
    for source in (Input(str(shared / name)) for name in ("text", "text/flores200/*.dev", "web")):
        drafts = (draft for path in source.files() for draft in source.documents(path) if isinstance(draft, Draft))
        found += [draft for draft in drafts if Extract()(draft) is None]
    return found


def differences(name: str, filters: Any, drafts: list[Draft]) -> int:
    """Number of verdicts that differ from datatrove's, for a reason that is meant; no other does."""
    from datatrove.data import Document

    theirs, ours = filters(name), PAIRS[name]()
    removed, other = 0, 0
    for draft in drafts:
        document = Document(text=draft.text, id="")
        result = theirs.filter(document)
        kept, text, reason = verdict(ours, draft.text)
        removed += not kept
        if kept != (result is True) and is_meant(draft.text, result, reason):
            other += 1
            continue
        assert kept == (result is True), (draft.text[:200], result, reason)
        assert not kept or text == document.text
    assert 0 < removed < len(drafts)
    return other


@pytest.mark.parametrize("name", PAIRS)
def test_verdicts_are_datatroves(name: str, filters: Any, real: list[Draft]) -> None:
    assert differences(name, filters, real) <= 11


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_verdicts_are_datatroves_on_everything(name: str, filters: Any, everything: list[Draft]) -> None:
    assert len(everything) > 3500
    differences(name, filters, everything)


def test_blank_lines_are_no_duplicates() -> None:
    draft = Draft("one\n \ntwo\n \nthree\n \nfour\n \n")
    assert GopherRepetition()(draft) is None
    assert not any(draft.measured["gopher-repetition"].values())
    assert all(
        step(Draft(text)) is None for step in (GopherRepetition(), MC4(min_long_lines=0)) for text in ("", " \n")
    )


def test_blank_lines_do_not_thin_out_duplicates() -> None:
    for blank, unit in ((" \n", "line"), (" \n\n", "paragraph")):
        draft = Draft(blank.join(f"{word}{blank[1:]}" for word in ("one", "two", "one", "two")))
        GopherRepetition()(draft)
        assert draft.measured["gopher-repetition"][f"duplicate_{unit}s"] == 0.5


def is_meant(text: str, result: Any, reason: str) -> bool:
    """Differences: an n-gram that occurs once and a line of blanks are no repetition; marks it lacks are no words."""
    if (result is not True and result[1].startswith("dup_")) or reason.startswith("duplicate_"):
        return any(line.isspace() for line in text.split("\n"))
    if result is not True and result[1].startswith("top_"):
        n = int(result[1][4])
        grams = list(zip(*(words(text)[i:] for i in range(n)), strict=False))
        return len(set(grams)) == len(grams)
    return reason == "words" and "・" in text
