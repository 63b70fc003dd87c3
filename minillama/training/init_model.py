"""Start of a run: device, dtype, tokenizer and initial weights, each found once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minillama.config.lora import SCORE, LoRAConfig
from minillama.device import choose_device, choose_dtype
from minillama.errors import InputError
from minillama.formats import peft
from minillama.formats.model_file import LazyTensors, ModelFile
from minillama.formats.open import open_model
from minillama.formats.peft import AdapterFile
from minillama.formats.peft_config import CONFIG, read_config
from minillama.inference.quantize import quantize_head, quantized
from minillama.layers.lora import Adapter, FullWeight
from minillama.model import Decoder
from minillama.model.heads import with_score
from minillama.model.init import initialize
from minillama.model.lora import DEFAULT, add_lora, attach
from minillama.runs.config import RunConfig
from minillama.runs.sections import DataConfig
from minillama.tokenizer import Tokenizer, TokenizerTrainer
from minillama.tokenizer.template import OWN, special_tokens
from minillama.tokenizer.train import byte_tokenizer
from minillama.training.parallel import Parallel
from minillama.training.sharded import Streamed, load


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Args:
        config: the run, with as many embedding rows as the tokenizer has tokens if it starts from a model.
        tokenizer: that of tokenizer.path, or its trainer; with the objective's special tokens.
        initial: the model to initialize from, or under an adapter; None for random weights, or those of a checkpoint.
        adapter: of that model, which the run goes on from; None for a fresh one.
    """

    config: RunConfig
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer | TokenizerTrainer
    initial: ModelFile | None
    adapter: AdapterFile | None = None

    def build_model(self, parallel: Parallel | None = None) -> Decoder:
        """Decoder on the device: drawn from the run's seed, or the initial one's, its vocabulary grown.

        In float32; under an adapter the weights are frozen, and as the passes read them. Of processes that divide it
        each keeps its part of every tensor as it is read or drawn, unless the whole is needed first: by an adapter, a
        reference, or where the shape changes.
        """
        if parallel is not None and parallel.divides and self._is_unchanged:
            return self._in_parts(parallel)
        train, lora, rows = self.config.train, self.config.lora, self.config.model.vocab_size
        generator = torch.Generator().manual_seed(self.config.seed)
        if self.initial is None:
            model = Decoder(self.config.model, train.dropout)
            model.init_weights(generator, self.config.mup)
            return model.to(self.device)
        start, shape = self.initial, self.config.model
        if train.quantize == "none":
            with torch.device("meta"):
                model = Decoder(start.config, train.dropout)
            model.fill(start, torch.float32 if lora is None else self.dtype, self.device)
        else:  # a tied head stays the embedding: a copy in int8 would be neither exact nor small
            model = quantized(start, train.quantize, self.dtype, self.device, False, train.dropout, head=False)
        if rows > start.config.vocab_size:
            model.resize_embeddings(rows, train.init_embeddings, generator)
        if shape.head != start.config.head:
            model = with_score(model, generator, shape.pad_id)
        elif train.quantize != "none" and model.lm_head is not None:
            quantize_head(model)
        if lora is None:
            return model
        return add_lora(model, lora, generator=generator) if self.adapter is None else self._go_on(model, lora)

    @property
    def _is_unchanged(self) -> bool:
        """Whether the model is the initial one's or a fresh one."""
        start, wanted = self.initial, self.config
        is_same = start is None or start.config.tensors() == wanted.model.tensors()
        return is_same and wanted.lora is None and not wanted.objective.has_reference

    def _in_parts(self, parallel: Parallel) -> Decoder:
        """Decoder of which the peak is this process's part and one tensor."""
        config, start = self.config, self.initial
        with torch.device("meta"):
            model = Decoder(config.model, config.train.dropout)
        model.model.reset_position_tables(config.model)  # which are no parameters, and would stay without values
        parallel.divide(model, self.dtype)
        model._apply(lambda t: torch.empty_like(t, device=self.device) if t.is_meta else t.to(self.device))
        parameters = dict(model.named_parameters())
        if start is None:
            drawn = Streamed(parameters)
            initialize(config.model, drawn, torch.Generator().manual_seed(config.seed), config.mup)
            drawn.keep()
        else:
            load(model, LazyTensors(parameters, lambda name: start.tensors[name].float()))
            model.stop_ids, model.sampling = start.stop_ids, start.sampling
        parallel.gather_once(model)
        return model

    def _go_on(self, model: Decoder, lora: LoRAConfig) -> Decoder:
        """The model with the adapter that the run goes on from, which has to be what the settings say."""
        assert self.adapter is not None
        parts = dict(self.adapter.adapters)
        if model.score is not None:
            parts.setdefault(SCORE, FullWeight(model.score.weight))
        updates = {name: part for name, part in parts.items() if isinstance(part, Adapter)}
        found = {_settings(p.rank, p.alpha, p.use_rslora, p.magnitude is not None) for p in updates.values()}
        expected = _settings(lora.rank, lora.alpha, lora.use_rslora, lora.use_dora)
        asked = set(lora.sites(model.config)), set(lora.whole(model.config))
        if found != {expected} or asked != (set(updates), parts.keys() - updates):
            layers = f"; low-rank updates of {len(updates)} layers, {len(asked[0])} in the settings"
            what, fix = "the adapter in train.init_from has other settings", "give [lora] the adapter's"
            raise InputError(what, where="lora", found=" and ".join(sorted(found)) + layers, expected=expected, fix=fix)
        for part in updates.values():
            part.dropout = lora.dropout
        return attach(model, parts, DEFAULT)


def resolve(config: RunConfig, is_resumed: bool = False) -> Start:
    """Find what a run starts from.

    Args:
        is_resumed: a checkpoint's weights will be loaded, so that the model to start from is not needed, unless it is
            under an adapter or a reference.

    Raises:
        InputError: a device that is not there, a file that cannot be read, or a tokenizer that gives an id of the
            initial model's own another meaning.
    """
    device = choose_device(config.train.device)
    tokenizer = _choose_tokenizer(config)
    is_needed = config.lora is not None or config.objective.has_reference or not is_resumed
    initial, adapter = _open(config) if config.train.init_from and is_needed else (None, None)
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
    if config.objective.head == "score" and isinstance(tokenizer, Tokenizer):
        config = replace(config, model=replace(config.model, head="score", pad_id=_pad_id(tokenizer)))
    return Start(config, device, choose_dtype(config.train.dtype, device), tokenizer, initial, adapter)


def _open(config: RunConfig) -> tuple[ModelFile, AdapterFile | None]:
    """The model to start from; where that is an adapter, its base, with the adapter merged or, under [lora], beside."""
    path = Path(config.train.init_from)
    if not (path / CONFIG).exists():
        return open_model(path), None
    base = open_model(read_config(path / CONFIG).base_model_name_or_path)
    adapter = peft.read(path, base.config)
    if config.lora is None:
        return peft.merged(base, adapter), None
    adapter.check_base(base.tensors)
    return peft.with_files(base, path), adapter


def _settings(rank: int, alpha: float, use_rslora: bool, use_dora: bool) -> str:
    return f"rank {rank}, alpha {alpha:g}{', rsLoRA' * use_rslora}{', DoRA' * use_dora}"


def _pad_id(tokenizer: Tokenizer) -> int:
    """Padding of a reward model: a token with which no answer ends."""
    named = [tokenizer.backend.token_to_id(name) for name in ("<pad>", "<|pad|>", "[PAD]")]
    known = [i for i in (*named, tokenizer.unknown_id, tokenizer.bos_id) if i is not None]
    others = (i for i in range(tokenizer.vocab_size) if i not in tokenizer.special_ids)
    return next(i for i in (*known, *others) if i not in tokenizer.stop_ids)


def _choose_tokenizer(config: RunConfig) -> Tokenizer | TokenizerTrainer:
    kind, special = config.tokenizer.kind, config.objective.special_tokens
    if config.tokenizer.path or (kind == "bytes" and config.data.template):  # which needs no text
        tokenizer = Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else byte_tokenizer()
        names = [template_name(data, tokenizer) for data in config.datas]
        return tokenizer.with_special((*special, *(token for name in names for token in special_tokens(name))))
    return TokenizerTrainer(kind, 0 if kind in ("char", "bytes") else config.model.vocab_size, special=special)


def template_name(data: DataConfig, tokenizer: Tokenizer) -> str:
    """Name of the chat template: that of the settings, where they leave it open the tokenizer's own, or chatml."""
    if data.template != "auto":
        return data.template
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
