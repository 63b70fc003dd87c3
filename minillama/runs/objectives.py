"""Objective settings: the tagged section `[objective]`, whose `name` chooses the class of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from minillama.config.loader import Located, say_renamed, to_dict
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.evaluate.question import Question
from minillama.evaluate.rules import Reward, parse_reward
from minillama.runs.feedback import GRPOConfig, PPOConfig
from minillama.runs.kind import Kind, generate
from minillama.runs.kind import typed as typed
from minillama.tokenizer.blanks import BLANK_TOKENS


@dataclass(frozen=True)
class LMConfig(Kind):
    """Next-token prediction."""

    name: Literal["lm"] = "lm"
    """Next-token prediction."""
    z_loss: float = field(default=0.0, metadata={"min": 0})
    """Times log(Z)^2 is added to a token's loss, Z the sum of e^logits; PaLM has 1e-4."""


@dataclass(frozen=True)
class GLMConfig(Kind):
    """GLM's masked spans: mixture over the sequences of a batch, and lengths."""

    special_tokens: ClassVar[tuple[str, ...]] = BLANK_TOKENS
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
class ClozeConfig(Question, Kind):
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


@dataclass(frozen=True)
class RewardConfig(Kind):
    """Reward model of pairs of answers."""

    reads: ClassVar[str] = "preferences"
    head: ClassVar[Literal["lm", "score"]] = "score"
    texts: ClassVar[int] = 2
    soft_labels: ClassVar[bool] = True
    name: Literal["reward"] = "reward"
    """Reward model of pairs of answers."""
    center: float = field(default=0.0, metadata={"min": 0})
    """Times the square of the sum of both rewards is added to a pair's loss, which keeps rewards around 0."""

    def commands(self, model: str, prompt: str) -> dict[str, list[str]]:
        """What to do with the trained model."""
        return {"inspect": ["minillama", "inspect", model]}


@dataclass(frozen=True)
class DPOConfig(Kind):
    """Direct preference optimization on pairs of answers."""

    reads: ClassVar[str] = "preferences"
    texts: ClassVar[int] = 2
    name: Literal["dpo"] = "dpo"
    """Direct preference optimization on pairs of answers."""
    loss: Literal[
        "sigmoid",
        "robust",
        "hinge",
        "ipo",
        "exo",
        "nca",
        "bco",
        "sppo",
        "apo-zero",
        "apo-down",
        "forward-kl",
        "js",
        "simpo",
        "orpo",
    ] = "sigmoid"
    """Of h, by how much the chosen answer's log-probability rose more than the rejected one's; simpo and orpo of their
    means per token, without a reference; see docs/feedback.md."""
    beta: float = field(default=0.1, metadata={"above": 0})
    """Strength of the pull towards the reference: the implicit reward is beta times the log-ratio to it."""
    label_smoothing: float = field(default=0.0, metadata={"min": 0, "below": 0.5})
    """Share of pairs whose answers were exchanged by mistake; sigmoid: conservative DPO. For robust and exo as well."""
    per_token: bool = False
    """Log-ratios are means over the tokens of an answer, not sums: length-normalized DPO, IPO as TRL has it."""
    sft: float = field(default=0.0, metadata={"min": 0})
    """Times the mean loss per token of the chosen answers is added, so that they do not become unlikely."""
    gamma: float = field(default=1.0, metadata={"min": 0})
    """Margin of simpo, by which the chosen answer's reward should be the higher one."""

    def __post_init__(self) -> None:
        used = self.loss in ("sigmoid", "robust", "exo")
        if (self.label_smoothing > 0 and not used) or (self.loss == "exo" and not self.label_smoothing):
            expected = "more than 0 with loss exo" if used else "0, but with loss sigmoid, robust or exo"
            raise InputError("label smoothing", where="label_smoothing", found=self.label_smoothing, expected=expected)

    @property
    def has_reference(self) -> bool:  # type: ignore[override]
        """Whether the start model is needed all along."""
        return self.loss not in ("simpo", "orpo")

    @property
    def soft_labels(self) -> bool:  # type: ignore[override]
        """Whether it reads the probability of a preference."""
        return self.loss == "sigmoid"


@dataclass(frozen=True)
class KTOConfig(Kind):
    """Kahneman-Tversky optimization on answers that were judged one by one."""

    reads: ClassVar[str] = "preferences"
    has_reference: ClassVar[bool] = True
    texts: ClassVar[int] = 1
    name: Literal["kto"] = "kto"
    """Kahneman-Tversky optimization on answers that were judged one by one."""
    beta: float = field(default=0.1, metadata={"above": 0})
    """As in DPO."""
    desirable_weight: float = field(default=1.0, metadata={"min": 0})
    """Of good answers in the loss; times their number it should be 1 to 4/3 of that of the others."""
    undesirable_weight: float = field(default=1.0, metadata={"min": 0})
    """Of bad answers in the loss."""


ObjectiveConfig: TypeAlias = (
    LMConfig | GLMConfig | ClozeConfig | RewardConfig | DPOConfig | KTOConfig | GRPOConfig | PPOConfig
)
OBJECTIVES = {
    "lm": LMConfig,
    "glm": GLMConfig,
    "cloze": ClozeConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "grpo": GRPOConfig,
    "ppo": PPOConfig,
}


# elements of lists of settings -> a table of one word of the command line
ELEMENTS: Mapping[type, Callable[[str], Any]] = {
    Source: lambda word: to_dict(Source(word)),
    Reward: lambda word: to_dict(parse_reward(word)),
}


def check_data(
    objective: ObjectiveConfig, template: str, packing: str, mixer: str, dropout: float, rows: int, context: int
) -> None:
    """Check that an objective and a model's mixer can be trained on conversations, on preferences or on prompts.

    Raises:
        InputError: conversations with another objective than next-token prediction, or a recurrence over packed ones;
            preferences without a template; dropout beside a reference, whose log-probabilities it would make noisy.
    """
    if isinstance(objective, GRPOConfig | PPOConfig):
        objective.check(rows, context, dropout)
    if objective.has_reference and dropout:
        what, where = "log-probabilities under dropout do not compare with the reference's", "dropout"
        raise InputError(what, where=where, found=dropout, expected=f"0 with objective {objective.name}")
    if objective.reads in ("preferences", "prompts"):
        if not template:
            what, fix = f"{objective.reads} are rendered by a chat template", "add --data.template auto"
            raise InputError(what, where="data.template", found="none", fix=fix)
        return
    if not template:
        return
    if not isinstance(objective, LMConfig):
        what, fix = "conversations train next-token prediction", "leave data.template out"
        raise InputError(what, where="objective.name", found=objective.name, expected="lm", fix=fix)
    if packing == "best-fit" and mixer == "wkv":
        what, fix = "a recurrent model cannot isolate packed conversations", "add --data.packing none"
        raise InputError(what, where="data.packing", found=packing, expected="none or wrap", fix=fix)


# settings that the last release had elsewhere: in the loop's section, and in one per objective
MOVED = {"train.objective": "objective.name", "train.z_loss": "objective.z_loss"}
SECTIONS = {"blanks": "glm", "cloze": "cloze"}


def words_with_new_names(words: Sequence[str]) -> list[str]:
    """Command-line words in which the last release's options have their names of today."""
    changed = []
    for word in words:
        option, equals, value = word.partition("=")
        key = option.removeprefix("--").replace("-", "_")
        section, _, name = key.partition(".")
        new = f"objective.{name}" if section in SECTIONS and name else MOVED.get(key)
        if option.startswith("--") and new is not None:
            say_renamed(option, f"--{new}")
            word = f"--{new}{equals}{value}"
        changed.append(word)
    return changed


def with_new_names(values: Mapping[str, Any], origin: Located, made_for: str) -> dict[str, Any]:
    """A file's tables with the last release's settings in `[objective]`; `auto` was what the model is made for."""
    tables = {name: dict(table) for name, table in values.items() if isinstance(table, Mapping)}
    train, given = tables.get("train", {}), values.get("objective", {})
    old = [key for key in MOVED if key.removeprefix("train.") in train] + [key for key in SECTIONS if key in tables]
    if not old or not isinstance(given, Mapping):  # which the loader refuses
        return dict(values)
    say_renamed(origin.at(old[0]), "[objective]")
    name = train.pop("objective", given.get("name", "auto"))
    name = made_for if name == "auto" else name
    if tables.get("cloze", {}).get("pattern") and name != "cloze":
        where, expected = origin.at("cloze.pattern"), 'objective.name = "cloze", or no pattern'
        raise InputError("a cloze pattern belongs to another objective", where=where, expected=expected)
    own = {"z_loss": train.pop("z_loss")} if "z_loss" in train else {}
    if name == "cloze":
        own = {}  # z_loss had no effect, as a section for another objective
    for section, objective in SECTIONS.items():
        if objective == name:
            own |= tables.get(section, {})
    rest = {key: tables.get(key, value) for key, value in values.items() if key not in SECTIONS}
    return rest | {"objective": {**own, **given, "name": name}}


def name_objective(file: dict[str, Any], command_line: dict[str, Any], made_for: str) -> None:
    """Give both tables the objective's name; of a file's for another one than the command line's nothing counts."""
    settings, changes = file.get("objective", {}), command_line.get("objective", {})
    if not isinstance(settings, Mapping):
        return  # which the loader refuses
    own, other = (made_for if table.get("name", "auto") == "auto" else table["name"] for table in (settings, changes))
    final = other if "name" in changes else own
    file["objective"] = {**settings, "name": own} if own == final else {}
    command_line["objective"] = {**changes, "name": final}
