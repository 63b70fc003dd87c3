"""Start of a run: device, dtype, tokenizer and initial weights, each found once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minillama.device import choose_device, choose_dtype
from minillama.errors import InputError
from minillama.formats.model_file import ModelFile
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.tokenizer import Tokenizer, TokenizerTrainer


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Args:
        config: the run, with as many embedding rows as the tokenizer has tokens if it starts from a model.
        device: of the model.
        dtype: of the forward and backward passes.
        tokenizer: that of tokenizer.path, or its trainer; with the objective's special tokens.
        initial: the model to initialize from; None for random weights, or those of a checkpoint.
    """

    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer | TokenizerTrainer
    initial: ModelFile | None

    def build_model(self) -> Decoder:
        """Decoder on the device, in float32: drawn from the run's seed, or the initial one's, its vocabulary grown."""
        train, generator = self.config.train, torch.Generator().manual_seed(self.config.seed)
        if self.initial is None:
            model = Decoder(self.config.model, train.dropout)
            model.init_weights(generator, self.config.mup)
            return model.to(self.device)
        model = Decoder(self.initial.config, train.dropout)
        model.load_state_dict({name: tensor.float() for name, tensor in self.initial.tensors.items()})
        if self.config.model.vocab_size > self.initial.config.vocab_size:
            model.resize_embeddings(self.config.model.vocab_size, train.init_embeddings, generator)
        return model.to(self.device)


def resolve(config: RunConfig, is_resumed: bool = False) -> Start:
    """Find what a run starts from.

    Args:
        config: the run.
        is_resumed: a checkpoint's weights will be loaded, so that the model to start from is not needed.

    Raises:
        InputError: a device that is not there, a file that cannot be read, or a tokenizer that gives an id of the
            initial model's own another meaning.
    """
    device = choose_device(config.train.device)
    tokenizer = _choose_tokenizer(config)
    initial = open_model(config.train.init_from) if config.train.init_from and not is_resumed else None
    if initial is not None and isinstance(tokenizer, Tokenizer):
        if initial.tokenizer is not None and Path(initial.tokenizer) != Path(config.tokenizer.path):
            _check_ids(Tokenizer.load(initial.tokenizer), tokenizer, config.tokenizer.path)
        rows = max(config.model.vocab_size, tokenizer.vocab_size)
        config = replace(config, model=replace(config.model, vocab_size=rows))
    return Start(config, device, choose_dtype(config.train.dtype, device), tokenizer, initial)


def _choose_tokenizer(config: RunConfig) -> Tokenizer | TokenizerTrainer:
    kind, special = config.tokenizer.kind, config.objective.special_tokens
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path).with_special(special)
    return TokenizerTrainer(kind, 0 if kind in ("char", "bytes") else config.model.vocab_size, special=special)


def _check_ids(own: Tokenizer, new: Tokenizer, where: str) -> None:
    for i in range(own.vocab_size):
        before, after = own.backend.id_to_token(i), new.backend.id_to_token(i)
        if before != after:
            raise InputError(
                "this tokenizer gives the model's tokens other ids",
                where=where,
                found=f"{after!r} at id {i}",
                expected=f"{before!r}, and all other old tokens at their ids",
                fix="extend the model's own vocabulary with `minillama tokenizer merge`",
            )
