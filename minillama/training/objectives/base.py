"""Training objective, and the batch it works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from minillama.data.corpus import Corpus
from minillama.data.instructions import Instructions
from minillama.data.preference_set import Preferences
from minillama.data.prompts import Prompts
from minillama.data.records import Records
from minillama.evaluate.perplexity import Score
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.training.model_folder import ModelFolder
from minillama.training.ranks import Ranks

MODEL = "model"  # the name under which an objective has the model that becomes a model folder
PROMPT = 12  # tokens of a prompt from held-out text
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Batch:
    """The examples of one optimizer step, over all micro-batches.

    Args:
        tokens: (B, T) ids that the model reads.
        targets: (B, T) ids that it should predict.
        weights: (B, T) float weights of the targets; 0 leaves one out. (B,) where a row is judged as a whole.
        mask: attention mask.
        positions: (B, T) position ids, where they are not 0..T-1.
        extras: further (B, ...) tensors that an objective needs.
        totals: divisor of each named term of the loss, over the whole batch of all micro-batches and processes; of
            `loss` the sum of the weights, unless given.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    mask: Mask = field(default_factory=Mask)
    positions: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.totals:
            object.__setattr__(self, "totals", {"loss": self.weights.sum().item()})

    def total(self, name: str) -> float:
        """The divisor of a term, or of a metric: where there is none of its name the first term's; 1 instead of 0."""
        return self.totals.get(name, next(iter(self.totals.values()))) or 1.0

    @property
    def sequences(self) -> Tensor:
        """(..., T) ids of the rows' documents, each row's its own."""
        shape = self.tokens.shape[:-1]
        rows = torch.arange(math.prod(shape), device=self.tokens.device).view(*shape, 1)
        documents = self.mask.documents
        return rows.expand_as(self.tokens) if documents is None else documents + rows * (documents.max() + 1)

    @property
    def kept(self) -> Tensor:
        """(..., T) flags of the tokens that a causal model must read: those up to a sequence's last trained one."""
        if self.weights.shape != self.tokens.shape:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        ids, trained = self.sequences.flatten(), self.weights.flatten() != 0
        at = torch.arange(len(ids), device=ids.device)
        following = torch.where(trained, at, len(ids)).flip(0).cummin(0).values.flip(0)
        kept = (following < len(ids)) & (ids[following.clamp(max=len(ids) - 1)] == ids)
        return kept.view_as(self.tokens)

    def share(self, rank: int, world: int) -> Batch:
        """The examples of one process among several; the totals stay those of all, so that gradients are summed.

        Raises:
            ValueError: processes that do not divide the examples.
        """
        own = rows_of(len(self.tokens), rank, world)
        return self.rows(own.start, own.stop)

    def rows(self, start: int, stop: int) -> Batch:
        """The examples start..stop-1."""
        return self._map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Any) -> Batch:
        mask = {f.name: getattr(self.mask, f.name) for f in fields(self.mask)}
        moved = {name: change(value) for name, value in mask.items() if isinstance(value, Tensor)}
        return Batch(
            change(self.tokens),
            change(self.targets),
            change(self.weights),
            replace(self.mask, **moved),
            None if self.positions is None else change(self.positions),
            {name: change(value) for name, value in self.extras.items()},
            self.totals,
        )


def rows_of(batch_size: int, rank: int, world: int) -> range:
    """The rows of one process among several.

    Raises:
        ValueError: processes that do not divide the rows.
    """
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} examples has no equal parts for {world} processes")
    size = batch_size // world
    return range(rank * size, (rank + 1) * size)


class Objective(Protocol):
    """A loss with its data and its models. One file per objective; `objectives.make` chooses.

    A loss is named sums, not a mean: the trainer divides each by its total of the whole batch, so that neither
    accumulation nor the number of processes changes anything.
    """

    models: Mapping[str, nn.Module]
    """Trained: `MODEL`, the one that is written as a model folder, and others. Each is clipped alone, and has its place
    in precision, optimizer and checkpoint under its name. The trainer puts working copies, on which the passes run, in
    the place of the float32 models."""
    rates: Mapping[str, float] = {}
    """Factors of the learning rate, by the names of trained models; 1 of those that are absent."""
    companions: Mapping[str, nn.Module]
    """Frozen: a reference, a reward model. Cast once, in eval mode, never saved; checkpoints have their SHA-256."""
    fingerprint: str
    """Of the data."""
    best: tuple[str, Literal["min", "max"]] = ("val_loss", "min")
    """The measure by which the best checkpoint is kept, and its direction."""
    writes_text: bool = True
    """Whether a sample of the model's text shows what it learns."""
    compiles: bool = True
    """Whether compiled blocks may be faster than what it does with eager ones."""
    prompts: Sequence[Sequence[int]] = ()
    """Token ids of prompts from held-out data, which a sample continues where the settings have none."""

    sample: Mapping[str, Any] = {}
    """What a validation shows beside its measures, such as a question, its answer and reward."""

    def prepare(self, step: int) -> Metrics:
        """Rollouts, reference log-probabilities: called before a batch is made. Gives what there is to record."""
        return {}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The batch of a step, or a process's part of it: a pure function of (seed, step)."""

    def where(self, step: int, rows: Sequence[int]) -> list[str]:
        """Where these rows of a step's batch stand in the data, for a message."""

    def loss(self, batch: Batch) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Sums of the loss's terms by name, whose weighted mean is minimized, and summed metrics."""

    def validate(self, rows: int, limit: int) -> Metrics:
        """Measures on held-out data, `best` among them, of about `limit` tokens (0: all), `rows` at a time."""

    def warnings(self, measures: Metrics) -> list[str]:
        """What is wrong with the measures of a validation, for the log."""
        return []

    def folders(self, masters: Mapping[str, nn.Module], saved: ModelFolder) -> Mapping[str, Callable[[Path], object]]:
        """Further model folders at the end of a run: names, and what writes each into a path, in the first process.

        Args:
            masters: the float32 models.
            saved: how the model is written.
        """
        return {}

    def updated(self, masters: Mapping[str, nn.Module]) -> None:
        """Called after each update of the float32 models."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """What must come back on resume, such as a buffer of rollouts; empty for most."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        return None


D = TypeVar("D", bound=Corpus | Instructions | Preferences | Prompts | Records)


@dataclass(eq=False)
class DataObjective(Objective, Generic[D]):
    """An objective of one model, whose batches follow from (seed, step) alone.

    Args:
        data: what is read.
        seed: of the order of the data.
        batch_size: rows per step.
    """

    decoder: InitVar[Decoder]
    data: D
    seed: int
    batch_size: int

    def __post_init__(self, decoder: Decoder) -> None:
        self.models, self.companions = {MODEL: decoder}, {}
        self.fingerprint = self.data.fingerprint

    @property
    def model(self) -> Decoder:
        """What the passes run on."""
        return cast(Decoder, self.models[MODEL])

    def where(self, step: int, rows: Sequence[int]) -> list[str]:
        assert not isinstance(self.data, Corpus | Prompts)  # theirs follow from more than that
        return self.data.where(self.seed, step, self.batch_size, rows)


@dataclass(eq=False)
class TextObjective(DataObjective[Corpus]):
    """An objective over windows of packed text.

    Args:
        context: T, tokens per row.
    """

    context: int

    def __post_init__(self, decoder: Decoder) -> None:
        super().__post_init__(decoder)
        self.prompts = [prompt] if (prompt := self.data.prompt(PROMPT)) else []

    @property
    def window(self) -> int:
        """Tokens of text per row."""
        return self.context

    def measures(self, own: Score) -> Metrics:
        """Measures of all held-out text, of which each process has scored its own."""
        found = Ranks.current().sum({"nats": own.nats, "tokens": own.tokens, "bytes": own.bytes})
        return Score(found["nats"], int(found["tokens"]), found["bytes"]).measures()

    def where(self, step: int, rows: Sequence[int]) -> list[str]:
        return self.data.where(self.seed, step, self.batch_size, self.window, rows)
