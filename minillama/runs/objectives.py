"""Objective settings: the tagged section `[objective]`, whose `name` chooses the class of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from minillama.config.loader import Located, say_renamed
from minillama.errors import InputError
from minillama.evaluate.question import Question
from minillama.tokenizer.blanks import BLANK_TOKENS


def generate(model: str, prompt: str) -> list[str]:
    """Arguments that continue a prompt."""
    return ["python", "generate.py", "--model", model, "--prompt", prompt]


@dataclass(frozen=True)
class LMConfig:
    """Next-token prediction."""

    special_tokens: ClassVar[tuple[str, ...]] = ()
    """That the tokenizer needs for it."""
    reads: ClassVar[str] = "text"
    """What `load_data` makes of the sources: text or records."""
    trains: ClassVar[str] = "lm"
    """The `objective` of the models that it is for."""
    name: Literal["lm"] = "lm"
    """Next-token prediction."""
    z_loss: float = field(default=0.0, metadata={"min": 0})
    """Times log(Z)^2 is added to a token's loss, Z the sum of e^logits; PaLM has 1e-4."""

    def commands(self, model: str, prompt: str) -> dict[str, list[str]]:
        """What to do with the trained model."""
        return {"generate": generate(model, prompt)}


@dataclass(frozen=True)
class GLMConfig:
    """GLM's masked spans: mixture over the sequences of a batch, and lengths."""

    special_tokens: ClassVar[tuple[str, ...]] = BLANK_TOKENS
    reads: ClassVar[str] = "text"
    trains: ClassVar[str] = "glm"
    name: Literal["glm"] = "glm"
    """Infilling of masked spans."""
    tokens: float = field(default=0.5, metadata={"min": 0})
    """Weight of sequences with short spans, [MASK], relative to the other kinds."""
    sentences: float = field(default=0.3, metadata={"min": 0})
    """Weight of sequences with whole sentences, [sMASK]."""
    document: float = field(default=0.2, metadata={"min": 0})
    """Weight of sequences with one long span, [gMASK]."""
    share: float = field(default=0.15, metadata={"above": 0, "max": 0.5})
    """Share of the tokens masked by short spans and sentences."""
    mean_length: float = field(default=3.0, metadata={"above": 0, "max": 20})
    """Lambda of the Poisson distribution of short-span lengths, in tokens."""
    document_least: float = field(default=0.5, metadata={"min": 0, "max": 1})
    """Minimum length of the long span, as a share of the document."""
    document_suffix: float = field(default=0.5, metadata={"min": 0, "max": 1})
    """Probability that the long span reaches the document's end."""

    z_loss: float = field(default=0.0, metadata={"min": 0})
    """Times log(Z)^2 is added to a token's loss, Z the sum of e^logits; PaLM has 1e-4."""

    def __post_init__(self) -> None:
        if not self.tokens + self.sentences + self.document > 0:
            raise InputError("one kind of masked span needs a weight", where="tokens", found=0, expected="more than 0")

    def commands(self, model: str, prompt: str) -> dict[str, list[str]]:
        """What to do with the trained model."""
        infill = ["minillama", "infill", "--model", model, "--text", f"{prompt} [MASK]."]
        return {"generate": generate(model, prompt), "infill": infill}


@dataclass(frozen=True)
class ClozeConfig(Question):
    """Classification by cloze questions."""

    special_tokens: ClassVar[tuple[str, ...]] = BLANK_TOKENS
    reads: ClassVar[str] = "records"
    trains: ClassVar[str] = "glm"
    name: Literal["cloze"] = "cloze"
    """Classification by cloze questions."""

    def commands(self, model: str, prompt: str) -> dict[str, list[str]]:
        """What to do with the trained model."""
        ask = ["--pattern", self.pattern, "--verbalizers", *self.verbalizers]
        return {"classify": ["minillama", "classify", "--model", model, *ask, "--text", "..."]}


ObjectiveConfig: TypeAlias = LMConfig | GLMConfig | ClozeConfig
OBJECTIVES = {"lm": LMConfig, "glm": GLMConfig, "cloze": ClozeConfig}

# the last release had these in sections of their own
MOVED = {"train.objective": "objective.name", "train.z_loss": "objective.z_loss"}
SECTIONS = {"blanks": "glm", "cloze": "cloze"}


def words_with_new_names(words: list[str]) -> list[str]:
    """Command-line words in which the last release's options have their names of today."""
    changed = []
    for word in words:
        key, equals, value = word.partition("=")
        plain = key.removeprefix("--").replace("-", "_")
        section, _, rest = plain.partition(".")
        new = MOVED.get(plain) or (f"objective.{rest}" if section in SECTIONS and rest else None)
        if key.startswith("--") and new is not None:
            say_renamed(key, f"--{new}")
            word = f"--{new}{equals}{value}"
        changed.append(word)
    return changed


def with_new_names(values: Mapping[str, Any], origin: Located, made_for: str) -> dict[str, Any]:
    """A file's tables in which the last release's settings are in `[objective]`.

    Args:
        values: the file.
        origin: where it stands.
        made_for: the model's own objective, for which `auto` stood.
    """
    if not isinstance(values.get("train", {}), Mapping):
        return dict(values)  # which the loader refuses
    train = dict(values.get("train", {}))
    taken = {new.partition(".")[2]: train.pop(key) for old, new in MOVED.items() if (key := old[6:]) in train}
    sections: dict[str, Mapping[str, Any]] = {
        name: values[name] for name in SECTIONS if isinstance(values.get(name), Mapping)
    }
    if not taken and not sections:
        return dict(values)
    say_renamed(
        origin.at("train.objective" if "name" in taken else next(iter(sections), "train.z_loss")), "[objective]"
    )
    given = values.get("objective", {})
    if not isinstance(given, Mapping):
        return dict(values)  # which the loader refuses
    name = taken.get("name", given.get("name", "auto"))
    name = made_for if name == "auto" else name
    if sections.get("cloze", {}).get("pattern") and name != "cloze":
        where, expected = origin.at("cloze.pattern"), 'objective.name = "cloze", or no pattern'
        raise InputError("a cloze pattern belongs to another objective", where=where, expected=expected)
    # of a section for another objective nothing is taken, as it had no effect
    own: Mapping[str, Any] = next(
        (sections[key] for key, member in SECTIONS.items() if member == name and key in sections), {}
    )
    rest = {key: value for key, value in values.items() if key not in SECTIONS} | {"train": train}
    z_loss = {"z_loss": taken["z_loss"]} if "z_loss" in taken and name != "cloze" else {}
    return rest | {"objective": {**own, **z_loss, **rest.get("objective", {}), "name": name}}
