"""Weight initialization: random from the run's seed, or from a model whose vocabulary may grow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from minillama.device import choose_device
from minillama.errors import InputError
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.tokenizer import Tokenizer, TokenizerTrainer


def choose_tokenizer(config: RunConfig) -> Tokenizer | TokenizerTrainer:
    """Tokenizer of tokenizer.path, or its trainer; with the objective's special tokens."""
    if config.tokenizer.path:
        return _load_tokenizer(config)
    kind = config.tokenizer.kind
    size = 0 if kind in ("char", "bytes") else config.model.vocab_size
    return TokenizerTrainer(kind, size, special=config.objective.special_tokens)


def _load_tokenizer(config: RunConfig) -> Tokenizer:
    return Tokenizer.load(config.tokenizer.path).with_special(config.objective.special_tokens)


def build_model(config: RunConfig, is_resumed: bool = False) -> Decoder:
    """Decoder on the run's device, in float32.

    Args:
        config: the run.
        is_resumed: a checkpoint's weights will be loaded, so that the model to start from is not needed.
    """
    generator, device = torch.Generator().manual_seed(config.seed), choose_device(config.train.device)
    if is_resumed or not config.train.init_from:
        model = Decoder(config.model, config.train.dropout)
        model.init_weights(generator)
        return model.to(device)
    opened = open_model(config.train.init_from)
    model = Decoder(opened.config, config.train.dropout)
    model.load_state_dict({name: tensor.float() for name, tensor in opened.tensors.items()})
    if config.model.vocab_size > opened.config.vocab_size:
        model.resize_embeddings(config.model.vocab_size, config.train.init_embeddings, generator)
    return model.to(device)


def with_grown_vocabulary(config: RunConfig) -> RunConfig:
    """Vocabulary extension: as many embedding rows as the tokenizer has tokens, if the run starts from a model.

    Raises:
        InputError: the tokenizer gives an id of the model's own another meaning.
    """
    if not config.train.init_from:
        return config
    tokenizer = _load_tokenizer(config)
    own = open_model(config.train.init_from).tokenizer
    if own is not None and Path(own) != Path(config.tokenizer.path):
        _check_ids(Tokenizer.load(own), tokenizer, config.tokenizer.path)
    rows = max(config.model.vocab_size, tokenizer.vocab_size)
    return replace(config, model=replace(config.model, vocab_size=rows))


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
