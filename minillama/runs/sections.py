"""Sections of a run's configuration: frozen dataclasses, whose docstrings are the help of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

from minillama.data.sources import Source
from minillama.tokenizer.train import Kind


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
    """Held-out share of the documents, of each one's end where there are few of them; of conversations, preferences and
    prompts by their first question."""
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
    minutes: float = field(default=0.0, metadata={"min": 0})
    """Minutes that the run takes, in place of steps: these follow from the speed of the first ones, and stand in the
    run's config.toml. 0: as many as train.steps."""
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
    """Dtype of matrix products; auto: bfloat16 where the processor multiplies it faster than float32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    compile: Literal["auto", "true", "false"] = "auto"
    """torch.compile the blocks; auto: once measured to pay back within the run. Unless this is false, attention on
    a CPU is C++, compiled once per machine."""
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
    """Skip a step whose loss is more than so many standard deviations above the mean of the last ones; 0: never.
    Not with grpo and ppo, whose loss is around 0."""
    window: int = field(default=100, metadata={"min": 10})
    """Number of losses in that mean."""


@dataclass(frozen=True)
class MetricsConfig:
    """Additional metrics in metrics.jsonl."""

    every: int = field(default=0, metadata={"min": 0})
    """Steps between records of update_ratio and attention_logit_max, which cost about a step; 0: none."""


@dataclass(frozen=True)
class LogConfig:
    """Where the metrics go besides metrics.jsonl."""

    to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """tensorboard: OUT/tensorboard, for `tensorboard --logdir runs`; wandb: Weights & Biases, over the network unless
    WANDB_MODE=offline. Extra `log`."""
    project: str = "minillama"
    """Project of Weights & Biases."""


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
