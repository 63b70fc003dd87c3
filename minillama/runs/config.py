"""The configuration of a run: TOML on disk, frozen dataclasses here, the same names on the command line.

A value comes from the defaults below, then the model preset, then the file, then the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from minillama.config import ModelConfig
from minillama.config.command_line import CommandLine, overrides
from minillama.config.loader import Located, build, config_path, read_toml, to_dict
from minillama.data.sources import Source, parse_source
from minillama.errors import InputError
from minillama.evaluate.question import Question
from minillama.tokenizer.kinds import Kind

__all__ = [
    "BlankConfig",
    "CheckpointConfig",
    "DataConfig",
    "GuardConfig",
    "MetricsConfig",
    "OptimConfig",
    "Question",
    "RunConfig",
    "SampleConfig",
    "Stage",
    "TokenizerConfig",
    "TrainConfig",
    "ValidateConfig",
    "load_run_config",
    "to_table",
]


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens."""

    kind: Kind = "byte-bpe"
    """byte-bpe, bpe, unigram, sentencepiece, wordpiece, word: trained on the data, of model.vocab_size tokens;
    char: those of the data; bytes."""
    path: str = ""
    """A tokenizer.json, or a folder with one, to use instead of training one."""


@dataclass(frozen=True)
class DataConfig:
    """What is read."""

    sources: tuple[Source, ...] = (Source("python-docs"),)
    """Built-in name (python-docs, python-code), file, folder, glob, or hf:NAME; several are mixed by weight."""
    val_fraction: float = field(default=0.05, metadata={"above": 0, "below": 1})
    """Share of the documents (or of the text, where it is one document) that is held out."""
    mask_documents: bool = False
    """Tokens see only their own document, and positions start anew in each."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do about text that is not UTF-8 or a line that is not JSON: stop, or count it and go on."""
    cache: str = ""
    """Folder of the tokenized data; ~/.cache/minillama unless given."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = field(default=1000, metadata={"min": 1})
    """Optimizer steps."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Sequences a step."""
    micro_batch_size: int = field(default=0, metadata={"min": 0})
    """Sequences in memory at once; the batch is accumulated from as many as it takes. 0: the whole batch."""
    context: int = field(default=0, metadata={"min": 0})
    """Tokens a sequence; 0: the model's max_seq_len."""
    init_from: str = ""
    """A model to start from: its shape replaces [model], its tokenizer is taken unless tokenizer.path is given."""
    init_embeddings: Literal["normal", "mean"] = "normal"
    """Rows that its embedding lacks for the tokenizer: normal, 0.02, or the mean of the old ones."""
    objective: Literal["auto", "lm", "glm", "cloze"] = "auto"
    """What is minimized; auto: what the model was made for, lm or GLM's blank infilling. cloze: see [cloze]."""
    z_loss: float = field(default=0.0, metadata={"min": 0})
    """Times log(Z)^2 is added to a token's loss, Z the sum of e^logits; PaLM has 1e-4."""
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    """Of the embedding and both residual branches."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; auto: bfloat16 where the processor multiplies it in hardware."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile the blocks; auto: once it has been seen that this pays back within the run. Unless this is false,
    attention in bfloat16 on a CPU is C++, compiled once for a machine."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms, and no compilation whose moment depends on the clock (--deterministic)."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and the learning rate."""

    lr: float = field(default=3e-3, metadata={"above": 0})
    """Peak learning rate."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor: PaLM's, with rates relative to the size of the weights and a decay of lr^2."""
    muon_lr: float = field(default=0.0, metadata={"min": 0})
    """Peak rate of Muon for the blocks' matrices; 0: AdamW for them too."""
    schedule: Literal["cosine", "wsd", "constant", "rsqrt"] = "cosine"
    """After the warm-up: cosine to the floor; wsd: constant, then linear to the floor; constant. rsqrt: PaLM's
    min(lr, 1 / sqrt(step)), without warm-up."""
    warmup_steps: int = field(default=50, metadata={"min": 0})
    """Linear warm-up; cut to the run's length."""
    decay_fraction: float = field(default=0.2, metadata={"above": 0, "max": 1})
    """Share of the run that wsd spends on its descent."""
    final_fraction: float = field(default=0.1, metadata={"min": 0, "max": 1})
    """The floor, as a share of lr."""
    beta1: float = field(default=0.9, metadata={"min": 0, "below": 1})
    """Of the mean of gradients."""
    beta2: float = field(default=0.95, metadata={"min": 0, "below": 1})
    """Of the mean of their squares."""
    eps: float = field(default=1e-8, metadata={"above": 0})
    """Added to the root of the second."""
    weight_decay: float = field(default=0.1, metadata={"min": 0})
    """Of matrices; norms have none."""
    decay_embeddings: bool = False
    """Decay the embedding too."""
    grad_clip: float = field(default=1.0, metadata={"min": 0})
    """Largest norm of the whole gradient; 0: no clipping."""


@dataclass(frozen=True)
class BlankConfig:
    """GLM's blanks: what kinds there are in the rows of a batch, and how large."""

    tokens: float = field(default=0.5, metadata={"min": 0})
    """Share of the rows with short spans, [MASK], relative to the other kinds."""
    sentences: float = field(default=0.3, metadata={"min": 0})
    """Of those with whole sentences, [sMASK]."""
    document: float = field(default=0.2, metadata={"min": 0})
    """Of those with one long stretch, [gMASK]."""
    share: float = field(default=0.15, metadata={"above": 0, "max": 0.5})
    """Share of the text that short spans and sentences cover."""
    mean_length: float = field(default=3.0, metadata={"above": 0, "max": 20})
    """Lambda of the Poisson distribution of the lengths of short spans, in tokens."""
    document_least: float = field(default=0.5, metadata={"min": 0, "max": 1})
    """The shortest long stretch, as a share of the document."""
    document_suffix: float = field(default=0.5, metadata={"min": 0, "max": 1})
    """Probability that it reaches to the document's end."""

    def __post_init__(self) -> None:
        if not self.tokens + self.sentences + self.document > 0:
            raise InputError("one kind of blank needs a share", where="tokens", found=0, expected="more than 0")


@dataclass(frozen=True)
class ValidateConfig:
    """Loss on held-out text."""

    every: int = field(default=100, metadata={"min": 1})
    """Steps between validations; there is one at step 0 and one at the end as well."""
    tokens: int = field(default=0, metadata={"min": 0})
    """Held-out tokens that are scored; 0: all."""


@dataclass(frozen=True)
class SampleConfig:
    """The text that is printed at each validation."""

    prompts: tuple[str, ...] = ("The",)
    """Each is continued."""
    max_new_tokens: int = field(default=48, metadata={"min": 0})
    """0 prints none."""
    temperature: float = field(default=0.8, metadata={"min": 0})
    """0 is greedy."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept to go on from."""

    every: int = field(default=500, metadata={"min": 1})
    """Steps between checkpoints; there is one before every validation and at the end as well."""
    keep: int = field(default=2, metadata={"min": 1})
    """How many of the newest stay, beside the one with the least val_loss."""


@dataclass(frozen=True)
class GuardConfig:
    """Steps that are skipped instead of taken."""

    max_in_a_row: int = field(default=10, metadata={"min": 1})
    """So many skipped steps in a row end the run."""
    spike_sigma: float = field(default=0.0, metadata={"min": 0})
    """Skip a step whose loss is more than so many standard deviations above the mean of the last ones; 0: never."""
    window: int = field(default=100, metadata={"min": 10})
    """How many losses that mean is of."""


@dataclass(frozen=True)
class MetricsConfig:
    """What else metrics.jsonl records."""

    every: int = field(default=0, metadata={"min": 0})
    """Steps between records of update_ratio and attention_logit_max, which cost about a step; 0: none."""


@dataclass(frozen=True)
class Stage:
    """A part of the run with other optimizer settings or some parameters frozen."""

    until_step: int = field(metadata={"min": 1})
    """The stage ends before this step; the last one lasts to the end."""
    optim: OptimConfig | None = None
    """Overrides of [optim], as a table `optim = {lr = 1e-4}`."""
    trainable: tuple[str, ...] = ("*",)
    """Globs of the parameter names that are trained; the rest is frozen."""

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained in this stage."""
        return any(fnmatchcase(name, pattern) for pattern in self.trainable)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on."""

    name: str = "tiny"
    """The run's folder is runs/NAME unless --out says otherwise."""
    seed: int = field(default=1, metadata={"min": 0})
    """Of initialization, data order and dropout."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig.load("llama-tiny"))
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    blanks: BlankConfig = field(default_factory=BlankConfig)
    cloze: Question = field(default_factory=Question)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        if self.train.context > self.model.max_seq_len:
            raise InputError(
                "the training context is longer than the model's",
                where="train.context",
                found=self.train.context,
                expected=f"at most model.max_seq_len = {self.model.max_seq_len}",
            )
        self._check_objective()
        if self.optim.optimizer == "adafactor" and self.optim.muon_lr:
            what = "Adafactor moves all parameters, and Muon has none to move"
            raise InputError(what, where="optim.muon_lr", found=self.optim.muon_lr, expected=0)
        bounds = [stage.until_step for stage in self.stages]
        if bounds != sorted(set(bounds)):
            raise InputError("stages must end one after the other", where="stages.until_step", found=bounds)

    def _check_objective(self) -> None:
        cloze = self.train.objective == "cloze"
        needed = "glm" if cloze else self.train.objective
        if needed not in ("auto", self.model.objective):
            raise InputError(
                "the model is made for another objective",
                where="train.objective",
                found=self.train.objective,
                expected=f"auto or {self.model.objective}, by its {self.model.position} positions",
                fix="start from a model that fills blanks with train.init_from" if cloze else "leave it out",
            )
        if self.cloze.pattern and not cloze:
            what, expected = "a question is asked by another objective", "train.objective = cloze, or no cloze.pattern"
            raise InputError(what, where="cloze.pattern", found=f"objective {self.objective}", expected=expected)
        if self.objective == "glm" and self.context < 8:
            raise InputError("no blank fits", where="train.context", found=self.context, expected="at least 8 slots")
        if self.objective != "lm" and self.data.mask_documents:
            what = "a text with blanks is read as a whole"
            expected = f"false with objective {self.objective}"
            raise InputError(what, where="data.mask_documents", found="true", expected=expected)

    @property
    def objective(self) -> str:
        """What is minimized: lm, glm or cloze."""
        return self.model.objective if self.train.objective == "auto" else self.train.objective

    @property
    def context(self) -> int:
        """T, tokens a training sequence."""
        return self.train.context or self.model.max_seq_len

    @property
    def micro_batch_size(self) -> int:
        """Sequences in memory at once."""
        return min(self.train.micro_batch_size or self.train.batch_size, self.train.batch_size)

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to; one that changes nothing when there are none."""
        ends = next((stage for stage in self.stages if step < stage.until_step), None)
        return ends or (self.stages[-1] if self.stages else Stage(self.train.steps))

    def optim_at(self, step: int) -> OptimConfig:
        """The `[optim]` section with the stage's overrides."""
        return self.stage(step).optim or self.optim


def load_run_config(name: str, words: Sequence[str] = (), preset: str | None = None) -> RunConfig:
    """Read a configuration file and apply the command line.

    Args:
        name: the name of a file in configs/train, or a path.
        words: `--section.field VALUE` words that override the file.
        preset: a model preset that replaces the file's [model] section.

    Raises:
        InputError: an unknown key, a wrong type, a value out of range; with file and line.
    """
    path = config_path("train", name)
    values, origin = read_toml(path)
    shape = values.pop("model", {"preset": "llama-tiny"})
    values.setdefault("name", path.stem)
    stages = values.pop("stages", None)
    staged: Located = origin
    table = overrides(words, RunConfig, {Source: lambda word: to_dict(parse_source(word))})
    command_line, changes = CommandLine(), table.pop("model", {})
    sections = [section for section in (values.get("train"), table.get("train")) if isinstance(section, Mapping)]
    start = next((s["init_from"] for s in reversed(sections) if isinstance(s.get("init_from"), str)), "")
    if start and (preset or changes):
        raise InputError(
            "the model's shape is that of train.init_from",
            where="command line",
            found="--model.preset" if preset else ", ".join(f"--model.{key}" for key in changes),
            fix="leave it out",
        )
    if start and (Path(start).exists() or "dim" not in shape):  # a run's config.toml has the whole shape itself
        model = ModelConfig.load(start)
    else:
        model = ModelConfig.load(preset) if preset else ModelConfig.from_table(shape, origin, "model")
    config = build(RunConfig, values, origin, RunConfig(model=model))
    if "stages" in table:
        stages, staged = table.pop("stages"), command_line
    config = replace(config, model=config.model.changed(changes, command_line, "model"))
    config = build(RunConfig, table, command_line, config)
    if stages is not None:
        config = replace(config, stages=_stages(stages, staged, config.optim))
    if start and not config.tokenizer.path:
        config = replace(config, tokenizer=replace(config.tokenizer, path=start))
    return config


def _stages(tables: Sequence[Mapping[str, Any]], origin: Located, base: OptimConfig) -> tuple[Stage, ...]:
    """Stages whose `optim` starts from the run's, wherever that came from."""
    made = []
    for i, table in enumerate(tables):
        stage = build(
            Stage, {key: value for key, value in table.items() if key != "optim"}, origin, None, f"stages.{i}"
        )
        if "optim" in table:
            stage = replace(stage, optim=build(OptimConfig, table["optim"], origin, base, f"stages.{i}.optim"))
            _check_stage(stage.optim, base, f"stages.{i}.optim")
        made.append(stage)
    return tuple(made)


def _check_stage(optim: OptimConfig | None, base: OptimConfig, where: str) -> None:
    """Which parameters belong to which optimizer is settled for the whole run."""
    if optim is None:
        return
    for name, change in (
        ("optimizer", optim.optimizer != base.optimizer),
        ("decay_embeddings", optim.decay_embeddings != base.decay_embeddings),
        ("muon_lr", (optim.muon_lr > 0) != (base.muon_lr > 0)),
    ):
        if change:
            what, found = "a stage cannot move parameters from one optimizer to another", getattr(optim, name)
            raise InputError(
                what, where=f"{where}.{name}", found=found, expected=f"as in [optim], {getattr(base, name)}"
            )


def to_table(config: RunConfig) -> dict[str, Any]:
    """What config.toml holds: every setting, and of a stage's `optim` what is other than the run's."""
    table = to_dict(config)
    for stage in table.get("stages", ()):
        own = {key: value for key, value in stage.pop("optim", {}).items() if value != table["optim"][key]}
        stage |= {"optim": own} if own else {}
    return table
