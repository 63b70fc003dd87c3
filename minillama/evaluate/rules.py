"""Rewards by rule: settings of `[[objective.rewards]]`, and what a text earns by each; no torch."""

from __future__ import annotations

import math
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, util
from pathlib import Path
from typing import Any, Literal

from minillama.config.loader import build, read_toml
from minillama.data.tasks import is_right
from minillama.errors import InputError

Function = Callable[[str, Sequence[int], str, Mapping[str, Any]], float | None]

SCRIPTS = {"en": ("LATIN",), "zh": ("CJK",), "ja": ("CJK", "HIRAGANA", "KATAKANA"), "ru": ("CYRILLIC",)}


# scripts whose words have no spaces around them; Korean has, but particles adjoin its words
UNSPACED = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH", "BOPOMOFO", "HANGUL", "THAI", "LAO", "KHMER"),
    *("MYANMAR", "TIBETAN", "JAVANESE", "BALINESE", "TAI ", "NEW TAI "),
)


@dataclass(frozen=True)
class Answer:
    """Answer to a prompt.

    Args:
        prompt: as the model read it, a text.
        ids: of the answer, with the token that ended it.
        record: where the prompt comes from; `answer` is the reference, if it has one.
        prompt_ids: of the prompt.
        ended: whether the model ended it.
        where: file and line of the prompt's record, for a message.
    """

    prompt: str
    ids: Sequence[int]
    text: str
    record: Mapping[str, Any] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    ended: bool = True
    where: str = ""


@dataclass(frozen=True)
class Reward:
    """Reward: a rule, a model, or a Python function; the sum of all with their weights is what is maximized."""

    name: str = "verified"
    """verified: the record's answer; format: `pattern` matches; ended; length: `minimum` to `maximum` tokens; language;
    repetition: share of distinct n-grams; forbidden: none of `words`; llama-2: `safety` and `path`; a reward model's
    folder; a Python function, MODULE:NAME or FILE.py:NAME."""
    weight: float = 1.0
    """Factor in the sum."""
    label: str = ""
    """Name in the metrics, reward_LABEL; the rule's, or the last part of the path, unless given."""
    pattern: str = ""
    """Regular expression: of format, for the whole answer; of verified, whose first group is what is compared."""
    minimum: int = field(default=0, metadata={"min": 0})
    """Tokens of length, below which it falls to 0."""
    maximum: int = field(default=0, metadata={"min": 0})
    """Tokens of length, above which it falls as maximum / n; 0: any number."""
    language: Literal["en", "zh", "ja", "ru"] = "en"
    """Whose script the letters should have."""
    n: int = field(default=2, metadata={"min": 1})
    """Tokens of an n-gram of repetition."""
    words: tuple[str, ...] = ()
    """Of forbidden, in any case."""
    path: str = ""
    """Helpfulness reward model of llama-2."""
    safety: str = ""
    """Safety reward model of llama-2, whose score counts for records with `safety: true`, or where it is low."""
    threshold: float = field(default=0.15, metadata={"min": 0, "max": 1})
    """Probability of being safe below which the safety score of llama-2 counts."""

    def __post_init__(self) -> None:
        needed = {"format": "pattern", "forbidden": "words", "llama-2": "safety"}
        field = needed.get(self.name)
        if field is not None and not getattr(self, field):
            raise InputError(f"the reward {self.name} needs {field}", where=field, found="none")
        if self.name == "llama-2" and not self.path:
            raise InputError("the reward llama-2 needs path", where="path", found="none")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError("not a regular expression", where="pattern", found=f"{self.pattern}: {error}") from None

    @property
    def title(self) -> str:
        """Name in the metrics."""
        return self.label or re.sub(r"\W+", "_", Path(self.name.rpartition(":")[2]).name)


def parse_reward(word: str) -> Reward:
    """Reward of a command-line argument: NAME, or WEIGHT*NAME.

    Raises:
        InputError: a weight that is not a number.
    """
    weight, star, name = word.partition("*")
    try:
        return Reward(name, float(weight)) if star else Reward(word)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError("not a weight", where="objective.rewards", found=word, expected="WEIGHT*NAME") from None


def read_rewards(words: Sequence[str]) -> list[Reward]:
    """Rewards of the command line, and those of files: of FILE.toml the tables `[[objective.rewards]]`.

    Raises:
        InputError: as `parse_reward`; a file without such tables, or with wrong ones.
    """
    found: list[Reward] = []
    for word in words:
        if not word.endswith(".toml"):
            found.append(parse_reward(word))
            continue
        values, origin = read_toml(Path(word))
        objective = values.get("objective")
        tables = objective.get("rewards") if isinstance(objective, Mapping) else None
        if not isinstance(tables, list) or not all(isinstance(table, Mapping) for table in tables) or not tables:
            raise InputError("no rewards in this file", where=word, expected="[[objective.rewards]] with name = ...")
        found += [build(Reward, table, origin, prefix=f"objective.rewards.{i}") for i, table in enumerate(tables)]
    return found


def rule(settings: Reward) -> Callable[[Answer], float | None]:
    """What an answer earns by a rule or a Python function, None where it cannot be scored.

    Raises:
        InputError: no rule of that name, or no such function.
    """
    if settings.name in RULES:
        return lambda answer: RULES[settings.name](settings, answer)
    if ":" not in settings.name:
        expected = f"{', '.join(RULES)}, llama-2, a reward model's folder, or MODULE:NAME"
        raise InputError("unknown reward", where="objective.rewards", found=settings.name, expected=expected)
    function = load_function(settings.name)
    return lambda answer: _called(function, settings.name, answer)


def _called(function: Function, name: str, answer: Answer) -> float | None:
    """What a user's function gives, checked.

    Raises:
        InputError: it fails, or gives something else than a finite number or None.
    """
    where = f"reward {name}, {answer.where or ascii(answer.prompt[:80])}"
    try:
        found: Any = function(answer.prompt, answer.ids, answer.text, answer.record)
        value = None if found is None else math.nan if isinstance(found, str) else float(found)
    except Exception as error:
        raise InputError("this function failed", where=where, found=f"{type(error).__name__}: {error}") from error
    if value is not None and not math.isfinite(value):
        expected = "a finite number, or None for what it cannot score"
        raise InputError("this function gives no reward", where=where, found=repr(found)[:80], expected=expected)
    return value


def load_function(name: str) -> Function:
    """Function of a module that can be imported, `MODULE:NAME`, or of a file, `FILE.py:NAME`.

    It is called as f(prompt, answer ids, text, record) and gives a number, or None for what it cannot score.

    Raises:
        InputError: neither, or no function of that name in it.
    """
    module, _, attribute = name.rpartition(":")
    where = "objective.rewards"
    try:
        if module.endswith(".py"):
            # under its path, as a name that no import has; dataclasses look their module up
            spec = util.spec_from_file_location(str(Path(module).resolve()), module)
            assert spec is not None and spec.loader is not None
            loaded = sys.modules[spec.name] = util.module_from_spec(spec)
            spec.loader.exec_module(loaded)
        else:
            sys.path.insert(0, "")  # the current folder, where a command does not look by itself
            try:
                loaded = import_module(module)
            finally:
                sys.path.remove("")
    except Exception as error:  # whatever the user's module does
        found = f"{module}: {type(error).__name__}: {error}"
        raise InputError("this module cannot be loaded", where=where, found=found) from error
    function: Function | None = getattr(loaded, attribute, None)
    if not callable(function):
        raise InputError("no such function", where=where, found=name, expected=f"a function in {module}")
    return function


def verified(settings: Reward, answer: Answer) -> float | None:
    """1 for the record's answer, 0 for another, None where it has none."""
    expected, text = answer.record.get("answer"), answer.text
    if not isinstance(expected, str):
        return None
    if settings.pattern:
        found = re.search(settings.pattern, text, re.S)
        if found is None:
            return 0.0
        text = found[1] if found.re.groups else found[0]
    return float(is_right(text, expected))


def has_format(settings: Reward, answer: Answer) -> float:
    """1 where the pattern matches the whole answer."""
    return float(re.fullmatch(settings.pattern, answer.text.strip(), re.S) is not None)


def has_ended(settings: Reward, answer: Answer) -> float:
    """1 for an answer that the model ended, 0 for one that was cut off."""
    return float(answer.ended)


def length(settings: Reward, answer: Answer) -> float:
    """1 for as many tokens as wanted, n / minimum for fewer, maximum / n for more."""
    count = len(answer.ids)
    if count < settings.minimum:
        return count / settings.minimum
    return settings.maximum / count if 0 < settings.maximum < count else 1.0


def language(settings: Reward, answer: Answer) -> float:
    """Share of the letters that have the language's script; 0 without a letter."""
    scripts = [unicodedata.name(char, "").split(" ")[0] for char in answer.text if char.isalpha()]
    return sum(script in SCRIPTS[settings.language] for script in scripts) / max(1, len(scripts))


def repetition(settings: Reward, answer: Answer) -> float:
    """Share of the answer's n-grams of tokens that are distinct, distinct-n: 1 where none comes twice."""
    return distinct(answer.ids, settings.n)


def distinct(ids: Sequence[int], n: int = 2) -> float:
    """Distinct n-grams over all n-grams; 1 where there is none."""
    grams = list(zip(*(ids[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0


def forbidden(settings: Reward, answer: Answer) -> float:
    """0 where one of the words is in the answer, else 1; a word is not found within another, but for `UNSPACED`."""
    return 1.0 - any(_has_word(answer.text.casefold(), word.casefold()) for word in settings.words)


def _has_word(text: str, word: str) -> bool:
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        edges = (text[start - 1 : start], word[:1]), (word[-1:], text[end : end + 1])
        if not any(all(map(_in_word, edge)) for edge in edges):
            return True
        start = text.find(word, start + 1)
    return False


def _in_word(character: str) -> bool:
    """Whether it is a letter, a digit or what combines with them, of a script whose words have spaces around them."""
    if not character or not (character == "_" or unicodedata.category(character)[0] in "LMN"):
        return False
    return not unicodedata.name(character, "").startswith(UNSPACED)


RULES: dict[str, Callable[[Reward, Answer], float | None]] = {
    "verified": verified,
    "format": has_format,
    "ended": has_ended,
    "length": length,
    "language": language,
    "repetition": repetition,
    "forbidden": forbidden,
}
