"""Start of a run: device, dtype, tokenizer and initial weights, each found once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minillama.config.lora import LoRAConfig
from minillama.device import choose_device, choose_dtype
from minillama.errors import InputError
from minillama.formats.model_file import ModelFile
from minillama.formats.open import open_model
from minillama.inference.quantize import quantize_head, quantized
from minillama.model import Decoder
from minillama.model.lora import add_lora
from minillama.runs.config import RunConfig
from minillama.tokenizer import Tokenizer, TokenizerTrainer
from minillama.tokenizer.template import OWN, special_tokens


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Args:
        config: the run, with as many embedding rows as the tokenizer has tokens if it starts from a model.
        tokenizer: that of tokenizer.path, or its trainer; with the objective's special tokens.
        initial: the model to initialize from, or under an adapter; None for random weights, or those of a checkpoint.
    """

    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer | TokenizerTrainer
    initial: ModelFile | None

    def build_model(self) -> Decoder:
        """Decoder on the device: drawn from the run's seed, or the initial one's, its vocabulary grown.

        In float32; under an adapter the weights are frozen, and as the passes read them.
        """
        train, lora, rows = self.config.train, self.config.lora, self.config.model.vocab_size
        generator = torch.Generator().manual_seed(self.config.seed)
        if self.initial is None:
            model = Decoder(self.config.model, train.dropout)
            model.init_weights(generator, self.config.mup)
            return model.to(self.device)
        if train.quantize == "none":
            with torch.device("meta"):
                model = Decoder(self.initial.config, train.dropout)
            model.fill(self.initial, torch.float32 if lora is None else self.dtype, self.device)
        else:  # a tied head stays the embedding: a copy in int8 would be neither exact nor small
            model = quantized(self.initial, train.quantize, self.dtype, self.device, False, train.dropout, head=False)
        if rows > self.initial.config.vocab_size:
            model.resize_embeddings(rows, train.init_embeddings, generator)
        if train.quantize != "none" and model.lm_head is not None:
            quantize_head(model)
        return model if lora is None else add_lora(model, lora, generator=generator)


def resolve(config: RunConfig, is_resumed: bool = False) -> Start:
    """Find what a run starts from.

    Args:
        is_resumed: a checkpoint's weights will be loaded, so that the model to start from is not needed, unless it is
            under an adapter.

    Raises:
        InputError: a device that is not there, a file that cannot be read, or a tokenizer that gives an id of the
            initial model's own another meaning.
    """
    device = choose_device(config.train.device)
    tokenizer = _choose_tokenizer(config)
    initial = open_model(config.train.init_from) if config.train.init_from and (config.lora or not is_resumed) else None
    if initial is not None and isinstance(tokenizer, Tokenizer):
        is_other = initial.tokenizer is not None and Path(initial.tokenizer) != Path(config.tokenizer.path)
        own = Tokenizer.load(initial.tokenizer) if initial.tokenizer and (is_other or config.lora) else None
        if own is not None and is_other:
            _check_ids(own, tokenizer, config.tokenizer.path)
        if config.lora is not None:
            known = initial.config.vocab_size if own is None else own.vocab_size
            _check_new_tokens(config.lora, tokenizer, known, initial.config.tie_embeddings)
        rows = max(config.model.vocab_size, tokenizer.vocab_size)
        config = replace(config, model=replace(config.model, vocab_size=rows))
    return Start(config, device, choose_dtype(config.train.dtype, device), tokenizer, initial)


def _choose_tokenizer(config: RunConfig) -> Tokenizer | TokenizerTrainer:
    kind, special = config.tokenizer.kind, config.objective.special_tokens
    if config.tokenizer.path:
        tokenizer = Tokenizer.load(config.tokenizer.path)
        return tokenizer.with_special((*special, *special_tokens(template_name(config, tokenizer))))
    return TokenizerTrainer(kind, 0 if kind in ("char", "bytes") else config.model.vocab_size, special=special)


def template_name(config: RunConfig, tokenizer: Tokenizer) -> str:
    """Name of the chat template: that of the settings, where they leave it open the tokenizer's own, or chatml."""
    if config.data.template != "auto":
        return config.data.template
    return "chatml" if tokenizer.chat_template is None else OWN


def _check_new_tokens(lora: LoRAConfig, tokenizer: Tokenizer, known: int, is_tied: bool) -> None:
    """Refuse tokens from id `known` on that no one trains: the embedding's rows are frozen under an adapter."""
    whole = {name.rpartition(".")[2] for name in lora.modules_to_save}
    if tokenizer.vocab_size <= known or whole >= {"embed_tokens", "lm_head"}:
        return
    fix = "take a template of plain text, --data.template vicuna"
    if not is_tied:
        fix += ", or add --lora.modules_to_save embed_tokens lm_head"
    raise InputError(
        "the template's special tokens are new to the model, and an adapter does not train them",
        where="data.template",
        found=", ".join(str(tokenizer.backend.id_to_token(i)) for i in range(known, tokenizer.vocab_size)[:4]),
        fix=fix,
    )


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
