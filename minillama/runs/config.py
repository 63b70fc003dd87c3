"""Run configuration: TOML on disk, frozen dataclasses here, the same names on the command line.

A value comes from the defaults below, then the model preset, then the file, then the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minillama.config import ModelConfig
from minillama.config.arguments import checked
from minillama.config.command_line import CommandLine, overrides
from minillama.config.loader import Located, build, check, config_path, read_toml, to_dict
from minillama.config.lora import LoRAConfig
from minillama.config.mup import Mup, check_mup
from minillama.errors import InputError
from minillama.files import model_folder
from minillama.formats.shape import model_config
from minillama.runs.folder import check_name
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
from minillama.runs.parallel import ParallelConfig
from minillama.runs.sections import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    LogConfig,
    MetricsConfig,
    OptimConfig,
    SampleConfig,
    Stage,
    TokenizerConfig,
    TrainConfig,
)
from minillama.runs.validation import ValidateConfig

CONVERSATION = 1024  # few are longer, and the memory of a row is that of its length


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
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
        own = [f"stages.{i}.data" for i, stage in enumerate(self.stages) if stage.data is not None]
        if own and self.objective.reads == "prompts":
            what, fix = "rollouts have one set of prompts", "run one after the other with train.init_from"
            raise InputError(what, where=own[0], found=f"objective {self.objective.name}", fix=fix)
        bounds = [stage.until_step for stage in self.stages]
        if bounds != sorted(set(bounds)):
            raise InputError("stages must end one after the other", where="stages.until_step", found=bounds)

    def _check_objective(self) -> None:
        wanted = self.objective
        if self.guard.spike_sigma and wanted.reads == "prompts":
            what, expected = "a policy's loss is around 0, of either sign, and has no spikes to be told", "0"
            fix = "watch approx_kl and clipped, or lower optim.grad_clip; NaN and infinity are skipped anyway"
            where, found = "guard.spike_sigma", self.guard.spike_sigma
            raise InputError(what, where=where, found=found, expected=f"{expected} with {wanted.name}", fix=fix)
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


@checked
def load_run_config(name: str | Path, words: Sequence[str] = (), preset: str | None = None) -> RunConfig:
    """Read a configuration file and apply the command line.

    Args:
        name: the name of a file in configs/train, or a path.
        words: `--section.field VALUE` words that override the file.
        preset: a model preset that replaces the file's [model] section.

    Raises:
        InputError: an unknown key, a wrong type, a value out of range; with file and line.
    """
    path = config_path("train", str(name))
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
    if "steps" in table.get("train", {}):
        if "minutes" in table["train"]:
            raise InputError("the length of the run is given twice", where="train.minutes", fix="leave train.steps out")
        values.get("train", {}).pop("minutes", None)
    values = with_new_names(values, origin, model.objective)
    name_objective(values, table, model.objective)
    config = build(
        RunConfig, _without_data(values), origin, RunConfig(model=model, objective=OBJECTIVES[model.objective]())
    )
    config = build(RunConfig, table, command_line, config)
    config = replace(config, stages=_stages(config, values.get("stages", ()), origin))
    own = str(Path(start).with_name("tokenizer.bin")) if start.endswith(".bin") else start  # llama2.c's lies beside
    tokenizer = replace(config.tokenizer, path=config.tokenizer.path or own)
    return replace(config, train=replace(config.train, init_from=start), tokenizer=tokenizer)


def _without_data(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values without the stages' `data`, which are incomplete and say nothing before they start from the run's."""
    stages = values.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        return dict(values)
    own = [{k: v for k, v in stage.items() if k != "data" or not isinstance(v, Mapping)} for stage in stages]
    return {**values, "stages": own}


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
