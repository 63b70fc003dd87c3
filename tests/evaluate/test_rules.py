"""Rewards by rule: what each gives, what cannot be scored, functions of one's own, settings."""

from __future__ import annotations

import colorsys
import sys
from pathlib import Path
from typing import Any

import pytest

from minillama.config.loader import build
from minillama.errors import InputError
from minillama.evaluate.rules import Answer, Reward, distinct, parse_reward, rule


def earned(reward: Reward, text: str, ids: list[int] | None = None, ended: bool = True, **record: Any) -> float | None:
    return rule(reward)(Answer("Q", [1, 2, 3, 4] if ids is None else ids, text, record, ended=ended))


@pytest.mark.parametrize(
    ("reward", "text", "expected"),
    [
        (Reward("verified"), " 42 ", 1),
        (Reward("verified"), "42.", 0),
        (Reward("verified", pattern=r"#### (\d+)"), "So 6 * 7:\n#### 42", 1),
        (Reward("verified", pattern=r"\d+"), "it is 42, I think", 1),
        (Reward("verified", pattern=r"#### (\d+)"), "42", 0),
        (Reward("format", pattern=r"<think>.*</think>\s*\S+"), "<think>\nhm\n</think> 42", 1),
        (Reward("format", pattern=r"\d+"), "42 it is", 0),
        (Reward("forbidden", words=("ass", "废话")), "A classic passage.", 1),
        (Reward("forbidden", words=("ass", "废话")), "An Ass, it says", 0),
        (Reward("forbidden", words=("ass", "废话")), "这是废话。", 0),
        (Reward("forbidden", words=("c++",)), "in C++ code", 0),
        (Reward("forbidden", words=("кот",)), "Который час?", 1),
        (Reward("forbidden", words=("кот",)), "Это Кот.", 0),
        (Reward("forbidden", words=("क",)), "कि", 1),
        (Reward("forbidden", words=("ass",)), "这ass", 0),
        (Reward("forbidden", words=("ข่าว",)), "อ่านข่าวนี้", 0),
        (Reward("forbidden", words=("바보",)), "바보는", 0),
        (Reward("language", language="zh"), "你好, ok 12", 0.5),
        (Reward("language"), "Résumé 12", 1),
        (Reward("language"), "12", 0),
        (Reward("length", minimum=8), "", 0.5),
        (Reward("length", maximum=2), "", 0.5),
        (Reward("length", minimum=4, maximum=4), "", 1),
    ],
)
def test_rules(reward: Reward, text: str, expected: float) -> None:
    assert earned(reward, text, answer="42") == expected


def test_repetition_and_the_end() -> None:
    assert distinct([5, 6, 5, 6, 5]) == 0.5 and distinct([7]) == 1 and distinct([1, 2, 1, 2, 1, 2], 3) == 0.5
    assert earned(Reward("repetition"), "", [9] * 11) == 0.1 and earned(Reward("repetition", n=5), "", [9] * 4) == 1
    assert earned(Reward("ended"), "") == 1 and earned(Reward("ended"), "", ended=False) == 0
    assert earned(Reward("length", minimum=2), "", []) == 0 and earned(Reward("length", maximum=2), "", []) == 1


def test_without_a_reference_there_is_nothing_to_verify() -> None:
    assert earned(Reward("verified"), "42") is None and earned(Reward("verified"), "42", answer=42) is None


def test_functions_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_rules.py").write_text(
        "def count(prompt, ids, text, record):\n"
        "    return None if 'skip' in record else len(prompt + text) + len(ids)\n"
        "value = 3\n"
    )
    assert earned(Reward(f"{tmp_path}/mine_for_rules.py:count"), "abc") == 8
    assert earned(Reward(f"{tmp_path}/mine_for_rules.py:count"), "abc", skip=1) is None
    monkeypatch.chdir(tmp_path)
    assert earned(Reward("mine_for_rules:count"), "abc") == 8
    text = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Words:\n"
        "    text: str\n"
        "def length(prompt, ids, text, record):\n"
        "    return len(Words(text).text)\n"
    )
    for file in ("mine_with_words.py", "colorsys.py"):  # which no import finds under the name of another module
        (tmp_path / file).write_text(text)
        assert earned(Reward(f"{file}:length"), "abc") == 3
    assert sys.modules["colorsys"] is colorsys and "mine_with_words" not in sys.modules
    for name, message in (
        ("mine_for_rules:value", "no such function"),
        ("no_such_module:f", "cannot be loaded"),
        (f"{tmp_path}/none.py:f", "cannot be loaded"),
        ("verifed", "unknown reward"),
    ):
        with pytest.raises(InputError, match=message):
            rule(Reward(name))


def test_settings() -> None:
    assert [Reward(n).title for n in ("verified", "a.b:score", "runs/reward/model", "x/y.py:f")] == [
        "verified",
        "score",
        "model",
        "f",
    ]
    assert parse_reward("0.5*repetition") == Reward("repetition", 0.5) and parse_reward("a.b:c") == Reward("a.b:c")
    with pytest.raises(InputError, match="not a weight"):
        parse_reward("half*ended")
    for fields, message in (
        ({"name": "format"}, "needs pattern"),
        ({"name": "forbidden"}, "needs words"),
        ({"name": "llama-2", "safety": "x"}, "needs path"),
        ({"name": "format", "pattern": "("}, "not a regular expression"),
        ({"name": "length", "minimum": -1}, "out of range"),
        ({"name": "language", "language": "tlh"}, "wrong type"),
        ({"nome": "length"}, "unknown key"),
    ):
        with pytest.raises(InputError, match=message):
            build(Reward, fields)


def test_a_function_that_gives_no_reward_is_named_with_the_record(tmp_path: Path) -> None:
    file, answer = tmp_path / "mine.py", Answer("P", [1], "c", where="file:7")
    for body, message in (
        ("1 / 0", "ZeroDivisionError"),
        ("'1.0'", "gives no reward"),
        ("float('inf')", "gives no reward"),
        ("float('nan')", "gives no reward"),
        ("[1]", "TypeError"),
    ):
        file.write_text(f"def f(prompt, ids, text, record):\n    return {body}\n")
        with pytest.raises(InputError, match=message) as found:
            rule(Reward(f"{file}:f"))(answer)
        assert "mine.py:f, file:7" in str(found.value)
    file.write_text("nothing\n")
    with pytest.raises(InputError, match="NameError"):
        rule(Reward(f"{file}:f"))
