"""Run configuration: TOML on disk, frozen dataclasses here, the same names on the command line.

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
from minillama.config.loader import Located, build, check, config_path, read_toml, to_dict
from minillama.config.lora import LoRAConfig
from minillama.config.mup import Mup, check_mup
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.files import model_folder
from minillama.formats.shape import model_config
from minillama.runs.folder import check_name
from minillama.runs.log import LogConfig
from minillama.runs.objectives import (
    ELEMENTS,
    OBJECTIVES,
    LMConfig,
    ObjectiveConfig,
    check_data,
    name_objective,
    with_new_names,
    words_with_new_names,
)
from minillama.runs.validation import ValidateConfig
from minillama.tokenizer.train import Kind

CONVERSATION = 1024  # few are longer, and the memory of a row is that of its length


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer settings."""

    kind: Kind = "byte-bpe"
    """byte-bpe, bpe, unigram, sentencepiece, wordpiece, word: trained on the data, of model.vocab_size tokens;
    char: those of the data; bytes."""
    path: str = ""
    """A tokenizer.json, or a folder with one, to use instead of training one."""


@dataclass(frozen=True)
class DataConfig:
    """Data settings."""

    sources: tuple[Source, ...] = (Source("python-docs"),)
    """Built-in name (python-docs, python-code), file, folder, glob, or hf:NAME; several are mixed by weight."""
    val_fraction: float = field(default=0.05, metadata={"above": 0, "below": 1})
    """Held-out share of the documents; of each one's end where there are few of them."""
    mask_documents: bool = False
    """Attention mask per document: tokens attend within their own document, and positions restart in each."""
    on_error: Literal["stop", "skip"] = "stop"
    """On text of unknown encoding, a line that is not JSON, or no conversation: stop, or count it and continue."""
    template: str = ""
    """Chat template; with one the sources are conversations and the answers are trained. auto: the model's own, or
    chatml; alpaca, chatglm, chatglm2, chatml, llama-2, llama-3, plain, vicuna, ziya; or a Jinja file."""
    format: Literal["auto", "alpaca", "dolly", "sharegpt", "messages", "pairs", "seed-tasks"] = "auto"
    """Format of the conversations; auto: each record's fields say it."""
    train_on: Literal["all", "last"] = "all"
    """Trained answers of a conversation."""
    packing: Literal["best-fit", "wrap", "none"] = "best-fit"
    """Conversations per sequence. best-fit: as many whole ones as fit, isolated; wrap: all joined and cut (LLaMA 2);
    none: one, padded."""
    cache: str = ""
    """Cache folder of the tokenized data; ~/.cache/minillama unless given."""
    field: str = ""
    """Text field of the records in .json and .jsonl files; found unless given."""


@dataclass(frozen=True)
class TrainConfig:
    """Training loop settings."""

    steps: int = field(default=1000, metadata={"min": 1})
    """Optimizer steps."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Sequences per step."""
    micro_batch_size: int = field(default=0, metadata={"min": 0})
    """Sequences in memory at once; gradients are accumulated over the batch. 0: the whole batch."""
    context: int = field(default=0, metadata={"min": 0})
    """Tokens per sequence; 0: the model's max_seq_len, of conversations at most 1024."""
    init_from: str = ""
    """Model to initialize from: its shape replaces [model], its tokenizer is used unless tokenizer.path is given."""
    init_embeddings: Literal["normal", "mean"] = "normal"
    """Initialization of embedding rows that it lacks for the tokenizer: normal, 0.02, or the mean of the old ones."""
    quantize: Literal["none", "int8", "int4"] = "none"
    """Quantization of the frozen weights under [lora]."""
    dropout: float = field(default=0.0, metadata={"min": 0, "below": 1})
    """Dropout of the embedding and both residual branches."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products; auto: bfloat16 where the processor multiplies it in hardware."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile the blocks; auto: once measured to pay back within the run. Unless this is false, attention in
    bfloat16 on a CPU is C++, compiled once per machine."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms, and no compilation whose moment depends on the clock (--deterministic)."""
    checkpointing: bool = False
    """Activation checkpointing: recomputed in the backward pass; less memory, about a third more time."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule."""

    lr: float = field(default=3e-3, metadata={"above": 0})
    """Peak learning rate."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """adafactor: PaLM's, with learning rates relative to the parameter scale and a weight decay of lr^2."""
    muon_lr: float = field(default=0.0, metadata={"min": 0})
    """Peak learning rate of Muon for the blocks' matrices; 0: AdamW for them too."""
    schedule: Literal["cosine", "wsd", "constant", "rsqrt"] = "cosine"
    """After the warm-up: cosine decay to final_fraction; wsd: constant, then linear decay; constant. rsqrt: PaLM's
    min(lr, 1 / sqrt(step)), without warm-up."""
    warmup_steps: int = field(default=50, metadata={"min": 0})
    """Steps of linear warm-up; at most the run's length."""
    decay_fraction: float = field(default=0.2, metadata={"above": 0, "max": 1})
    """Decay phase of wsd, as a share of the run."""
    final_fraction: float = field(default=0.1, metadata={"min": 0, "max": 1})
    """Final learning rate, as a share of lr."""
    beta1: float = field(default=0.9, metadata={"min": 0, "below": 1})
    """Decay rate of the first moment, the mean of gradients."""
    beta2: float = field(default=0.95, metadata={"min": 0, "below": 1})
    """Decay rate of the second moment, the mean of their squares."""
    eps: float = field(default=1e-8, metadata={"above": 0})
    """Added to the square root of the second moment."""
    weight_decay: float = field(default=0.1, metadata={"min": 0})
    """Weight decay of matrices; norms have none."""
    decay_embeddings: bool = False
    """Weight decay of the embedding too."""
    grad_clip: float = field(default=1.0, metadata={"min": 0})
    """Maximum global gradient norm; 0: no clipping."""
    mup_base_dim: int = field(default=0, metadata={"min": 0})
    """Maximal update parametrization: width of the model whose learning rate all widths take; 0: the standard one."""
    mup_base_head_dim: int = field(default=0, metadata={"min": 0})
    """Width of that model's heads; 0: the model's own."""


@dataclass(frozen=True)
class SampleConfig:
    """Samples printed at each validation."""

    prompts: tuple[str, ...] = ()
    """Prompts to continue; none: the beginning of held-out text, or a held-out question."""
    max_new_tokens: int = field(default=48, metadata={"min": 0})
    """Maximum number of new tokens per sample; 0 prints none."""
    temperature: float = field(default=0.8, metadata={"min": 0})
    """Sampling temperature; 0 is greedy."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint interval and retention."""

    every: int = field(default=500, metadata={"min": 1})
    """Steps between checkpoints; there is one before every validation and at the end as well."""
    keep: int = field(default=2, metadata={"min": 1})
    """Number of newest checkpoints kept, beside the best one."""


@dataclass(frozen=True)
class GuardConfig:
    """Skipped steps: NaN or infinite loss, loss spikes."""

    max_in_a_row: int = field(default=10, metadata={"min": 1})
    """Number of skipped steps in a row that ends the run."""
    spike_sigma: float = field(default=0.0, metadata={"min": 0})
    """Skip a step whose loss is more than so many standard deviations above the mean of the last ones; 0: never."""
    window: int = field(default=100, metadata={"min": 10})
    """Number of losses in that mean."""


@dataclass(frozen=True)
class MetricsConfig:
    """Additional metrics in metrics.jsonl."""

    every: int = field(default=0, metadata={"min": 0})
    """Steps between records of update_ratio and attention_logit_max, which cost about a step; 0: none."""


@dataclass(frozen=True)
class Stage:
    """Training stage with other data, other optimizer settings or frozen parameters."""

    until_step: int = field(metadata={"min": 1})
    """The stage ends before this step; the last one lasts to the end."""
    optim: OptimConfig | None = None
    """Overrides of [optim], as a table `optim = {lr = 1e-4}`."""
    data: DataConfig | None = None
    """Overrides of [data], as a table `data = {sources = [...]}`, read from the beginning. val_loss is over the data of
    [data], stage_val_loss over the stage's."""
    trainable: tuple[str, ...] = ("*",)
    """Globs of trained parameter names; the rest is frozen."""

    def trains(self, name: str) -> bool:
        """Whether a parameter is trained in this stage."""
        return any(fnmatchcase(name, pattern) for pattern in self.trainable)


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run."""

    name: str = "tiny"
    """The run's folder is runs/NAME unless --out says otherwise."""
    seed: int = field(default=1, metadata={"min": 0, "max": 2**32 - 1})
    """Random seed of initialization, data order and dropout."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig.load("llama-tiny"))
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    objective: ObjectiveConfig = field(default_factory=LMConfig)
    """By `name`, each with its own settings: lm, glm, cloze, reward, dpo, kto, grpo, ppo; the model's unless given."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    lora: LoRAConfig | None = None
    """Low-rank adapter on frozen weights, those of train.init_from; none unless the section is there."""
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        check(self)
        if self.train.context > self.model.max_seq_len:
            expected = f"at most model.max_seq_len = {self.model.max_seq_len}"
            what = "the training context is longer than the model's"
            raise InputError(what, where="train.context", found=self.train.context, expected=expected)
        check_name(self.name)
        self._check_objective()
        if self.optim.optimizer == "adafactor" and self.optim.muon_lr:
            what = "Adafactor updates all parameters, and none is left to Muon"
            raise InputError(what, where="optim.muon_lr", found=self.optim.muon_lr, expected=0)
        if self.lora is None and self.train.quantize != "none":
            what, fix = "quantized weights are not trained", "add [lora], or leave train.quantize out"
            raise InputError(what, where="train.quantize", found=self.train.quantize, fix=fix)
        if self.lora is not None and not self.train.init_from:
            what, fix = "an adapter needs a model", "give one as train.init_from"
            raise InputError(what, where="lora", found="random weights", fix=fix)
        dropout = max(self.train.dropout, 0.0 if self.lora is None else self.lora.dropout)
        for data in self.datas:
            read, rows = (data.template, data.packing), self.train.batch_size
            check_data(self.objective, *read, self.model.mixer, dropout, rows, self.context)
        check_mup(self.optim.mup_base_dim, self.optim.optimizer, self.model)
        bounds = [stage.until_step for stage in self.stages]
        if bounds != sorted(set(bounds)):
            raise InputError("stages must end one after the other", where="stages.until_step", found=bounds)

    def _check_objective(self) -> None:
        wanted = self.objective
        if self.model.head == "score" != wanted.head:
            what, expected = "a reward model predicts no tokens", "a language model"
            raise InputError(what, where="train.init_from", found=self.train.init_from, expected=expected)
        if wanted.trains != self.model.objective:
            fix = "start from an infilling model with train.init_from" if wanted.reads == "records" else "leave it out"
            raise InputError(
                "the model is made for another objective",
                where="objective.name",
                found=wanted.name,
                expected=f"auto or {self.model.objective}, by its {self.model.position} positions",
                fix=fix,
            )
        if wanted.reads == "text" and wanted.special_tokens and self.context < 8:
            raise InputError("no masked span fits", where="train.context", found=self.context, expected="at least 8")
        if self.data.mask_documents and (wanted.special_tokens or self.model.mixer == "wkv"):
            what = "infilling and recurrences read the whole sequence"
            expected = f"false with objective {wanted.name} and mixer {self.model.mixer}"
            raise InputError(what, where="data.mask_documents", found="true", expected=expected)

    @property
    def mup(self) -> Mup:
        """Maximal update parametrization; its factors are 1 in the standard one."""
        optim, model = self.optim, self.model
        if not optim.mup_base_dim:
            return Mup()
        return Mup(model.dim / optim.mup_base_dim, model.head_dim / (optim.mup_base_head_dim or model.head_dim))

    @property
    def context(self) -> int:
        """T, tokens per training sequence."""
        longest = min(self.model.max_seq_len, CONVERSATION) if self.data.template else self.model.max_seq_len
        return self.train.context or longest

    @property
    def micro_batch_size(self) -> int:
        """Sequences in memory at once."""
        return min(self.train.micro_batch_size or self.train.batch_size, self.train.batch_size)

    @property
    def datas(self) -> list[DataConfig]:
        """Data settings of the run, and of the stages that have their own."""
        return [self.data, *(stage.data for stage in self.stages if stage.data is not None)]

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to; one that changes nothing when there are none."""
        last = self.stages[-1] if self.stages else Stage(self.train.steps)
        return next((stage for stage in self.stages if step < stage.until_step), last)

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
    table = overrides(words_with_new_names(words), RunConfig, ELEMENTS)
    command_line, changes = CommandLine(), table.pop("model", {})
    sections = [section for section in (table.get("train"), values.get("train")) if isinstance(section, Mapping)]
    given = next((s["init_from"] for s in sections if isinstance(s.get("init_from"), str)), "")
    start = str(model_folder(Path(given))) if given else ""
    if start and (preset or changes):
        raise InputError(
            "the model's shape is that of train.init_from",
            where="command line",
            found="--model.preset" if preset else ", ".join(f"--model.{key}" for key in changes),
            fix="leave it out",
        )
    if start and (Path(start).exists() or "dim" not in shape):  # a run's config.toml has the whole shape itself
        model = model_config(start, "train.init_from")
    else:
        model = ModelConfig.load(preset) if preset else ModelConfig.from_table(shape, origin, "model")
    model = model.changed(changes, command_line, "model")
    if "sources" in table.get("data", {}) and "sources" in values.get("data", {}):
        values.get("sample", {}).pop("prompts", None)  # which belong to the file's sources
    values = with_new_names(values, origin, model.objective)
    name_objective(values, table, model.objective)
    config = build(RunConfig, values, origin, RunConfig(model=model, objective=OBJECTIVES[model.objective]()))
    config = build(RunConfig, table, command_line, config)
    config = replace(config, stages=_stages(config, values.get("stages", ()), origin))
    own = str(Path(start).with_name("tokenizer.bin")) if start.endswith(".bin") else start  # llama2.c's lies beside
    tokenizer = replace(config.tokenizer, path=config.tokenizer.path or own)
    return replace(config, train=replace(config.train, init_from=start), tokenizer=tokenizer)


def _stages(config: RunConfig, tables: Sequence[Mapping[str, Any]], origin: Located) -> tuple[Stage, ...]:
    """Stages whose `optim` and `data` start from the run's, whatever their origin."""
    made = []
    for i, (stage, table) in enumerate(zip(config.stages, tables, strict=True)):
        if "optim" in table:
            where = f"stages.{i}.optim"
            optim = build(OptimConfig, table["optim"], origin, config.optim, where)
            _check_stage(optim, config.optim, where)
            stage = replace(stage, optim=optim)
        if "data" in table:
            stage = replace(stage, data=build(DataConfig, table["data"], origin, config.data, f"stages.{i}.data"))
        made.append(stage)
    return tuple(made)


def _check_stage(optim: OptimConfig, base: OptimConfig, where: str) -> None:
    """Refuse a stage that moves parameters from one optimizer or group to another."""
    for name in ("optimizer", "decay_embeddings", "muon_lr", "mup_base_dim", "mup_base_head_dim"):
        found, expected = getattr(optim, name), getattr(base, name)
        is_same = (found > 0) == (expected > 0) if name == "muon_lr" else found == expected
        if not is_same:
            what = "a stage cannot move parameters from one optimizer or group to another"
            raise InputError(what, where=f"{where}.{name}", found=found, expected=f"as in [optim], {expected}")


def to_table(config: RunConfig) -> dict[str, Any]:
    """Table of config.toml: every setting; of a stage's `optim` and `data` the values that differ from the run's."""
    table = to_dict(config)
    for stage in table.get("stages", ()):
        for name in ("optim", "data"):
            own = {key: value for key, value in stage.pop(name, {}).items() if value != table[name][key]}
            stage |= {name: own} if own else {}
    return table
