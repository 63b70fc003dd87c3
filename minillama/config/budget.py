"""GPU memory budget: setting of a training, its memory per GPU, and the nearest settings that fit. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from minillama.config.cost import TrainingMemory, training_memory
from minillama.config.lora import LoRAConfig
from minillama.config.model import ModelConfig

Train = Literal["full", "lora", "qlora"]
Split = Literal["data parallel", "FSDP", "tensor parallel"]
TRAINS: tuple[Train, ...] = ("full", "lora", "qlora")
SPLITS: tuple[Split, ...] = ("data parallel", "FSDP", "tensor parallel")
SIZES = (8, 16, 24, 80)
USABLE = 0.9  # of a GPU's memory; the rest is the driver's context and the allocator's fragmentation
MACHINE = 8  # tensor parallelism stays within one
MOST = 4096  # GPUs that are suggested


@dataclass(frozen=True)
class Setting:
    """Setting of a training.

    Attributes:
        train: all weights; adapters; adapters on int4 weights.
        batch: sequences in memory at once, per GPU, of tensor parallelism per group.
        context: tokens per sequence.
        gpus: number of GPUs.
        split: the division of the work: copies of the model; FSDP; tensor parallelism, with FSDP beyond 8 GPUs or a
            divisor of the heads.
        checkpointing: activation checkpointing.
        rank: of the adapters.
        activation_bytes: per value of a matrix product.
    """

    train: Train
    batch: int
    context: int
    gpus: int = 1
    split: Split = "data parallel"
    checkpointing: bool = False
    rank: int = 8
    activation_bytes: int = 2

    def ranks(self, config: ModelConfig) -> int:
        """Tensor-parallel ranks: they divide all heads, and a recurrence has none."""
        if self.split != "tensor parallel" or config.mixer != "attention":
            return 1
        return math.gcd(self.gpus, MACHINE, config.n_heads, config.n_kv_heads)

    def label(self, config: ModelConfig) -> str:
        """Name of the split, with the ranks of a mixed one."""
        ranks = self.ranks(config)
        return self.split if ranks in (1, self.gpus) else f"TP {ranks} x FSDP {self.gpus // ranks}"

    def splits(self, config: ModelConfig) -> list[Setting]:
        """The same with every split that its GPUs and `training/parallel.py` allow: int4 weights are not divided."""
        is_divided = self.gpus > 1 and self.train != "qlora"
        found = [replace(self, split=split) for split in (SPLITS if is_divided else SPLITS[:1])]
        return [one for one in found if one.split != "tensor parallel" or one.ranks(config) > 1]

    def memory(self, config: ModelConfig) -> TrainingMemory:
        """Memory per GPU."""
        tensor = self.ranks(config)
        return self.divided(config, 1 if self.split == "data parallel" else self.gpus // tensor, tensor)

    def divided(self, config: ModelConfig, shard: int, tensor: int) -> TrainingMemory:
        """Memory per GPU with the model over so many."""
        return training_memory(
            config,
            self.batch,
            self.context,
            activation_bytes=self.activation_bytes,
            checkpointing=self.checkpointing,
            lora=None if self.train == "full" else LoRAConfig(self.rank),
            quantize="int4" if self.train == "qlora" else "none",
            fused_norm=True,
            shard=shard,
            tensor=tensor,
        )

    def options(self, than: Setting) -> str:
        """Options of `minillama plan` in which it differs, and the split."""
        changed = {"train": self.train, "batch": self.batch, "gpus": self.gpus}
        words = [f"--{name} {value}" for name, value in changed.items() if value != getattr(than, name)]
        words += ["--checkpointing"] if self.checkpointing > than.checkpointing else []
        return " ".join(words) + (f" ({self.split})" if self.gpus > 1 else "")


def fits(config: ModelConfig, setting: Setting, gigabytes: float) -> bool:
    """Whether a training fits GPUs of so many GB, as they are sold: of 2^30 bytes."""
    return setting.memory(config).total <= usable(gigabytes)


def usable(gigabytes: float) -> float:
    """Bytes that a training can take of a GPU's memory."""
    return USABLE * gigabytes * 2**30


def remedies(config: ModelConfig, setting: Setting, gigabytes: float) -> list[Setting]:
    """Settings that fit where this one does not: the nearest on as many GPUs, and the same training on more."""
    searches = (_lighter(config, setting), _more(setting))
    found = (next((one for one in search if fits(config, one, gigabytes)), None) for search in searches)
    return [one for one in found if one is not None]


def _lighter(config: ModelConfig, setting: Setting) -> Iterator[Setting]:
    """With checkpointing, one sequence at a time, fewer trained weights; nearest first."""
    for train in TRAINS[TRAINS.index(setting.train) :]:
        for other in _smaller(replace(setting, train=train)):
            yield from other.splits(config)


def _more(setting: Setting) -> Iterator[Setting]:
    """On twice as many GPUs, and so on, by FSDP."""
    gpus = 2 ** math.ceil(math.log2(setting.gpus + 1))
    while gpus <= MOST and setting.train != "qlora":
        yield from _smaller(replace(setting, gpus=gpus, split="FSDP"))
        gpus *= 2


def _smaller(setting: Setting) -> Iterable[Setting]:
    return dict.fromkeys(
        replace(setting, checkpointing=checkpointing, batch=batch)
        for batch in (setting.batch, 1)
        for checkpointing in (setting.checkpointing, True)
    )
