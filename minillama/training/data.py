"""Training data: tokenized text, conversations, preferences, prompts, or records for classification."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from minillama.data import preference_set
from minillama.data.conversations import conversations
from minillama.data.corpus import Corpus
from minillama.data.examples import is_held_out
from minillama.data.instructions import Example, Instructions
from minillama.data.preference_set import Preferences
from minillama.data.prepare import prepare
from minillama.data.prompts import Prompts, longest_prompt
from minillama.data.reading import Record
from minillama.data.records import Records
from minillama.data.skipped import Skipped
from minillama.data.sources import skipping
from minillama.errors import InputError
from minillama.evaluate.cloze import Cloze
from minillama.evaluate.question import Question
from minillama.files import cache_folder
from minillama.runs.config import RunConfig
from minillama.runs.feedback import FeedbackConfig, PPOConfig
from minillama.runs.objectives import ClozeConfig
from minillama.runs.report import Report
from minillama.tokenizer import Tokenizer, TokenizerTrainer
from minillama.tokenizer.rendering import encode, truncated
from minillama.tokenizer.template import OWN, Template, load_template
from minillama.training.init_model import template_name
from minillama.training.objectives import Data

CUTS = ("prompt", "answer and its end of turn")


def load_stages(config: RunConfig, tokenizer: Tokenizer, report: Report) -> tuple[list[Data | None], Tokenizer]:
    """Data of each stage, None where it is the run's; and the tokenizer, with the template of the last that has one."""
    found: list[Data | None] = [None] * len(config.stages)
    for number, stage in enumerate(config.stages):
        if stage.data is not None:
            found[number], tokenizer = load_data(replace(config, data=stage.data), tokenizer, report)
    return found, tokenizer


def load_data(config: RunConfig, tokenizer: Tokenizer | TokenizerTrainer, report: Report) -> tuple[Data, Tokenizer]:
    """Training data of the objective, and the tokenizer, trained on them if need be.

    Raises:
        InputError: a source that cannot be read, a tokenizer larger than the model's vocabulary, or too
            little text for one batch.
    """
    if isinstance(tokenizer, Tokenizer):
        _check_vocabulary(tokenizer, config)
    if config.objective.reads == "preferences":
        return _load_preferences(config, tokenizer, report)
    if isinstance(config.objective, FeedbackConfig):
        return _load_prompts(config, config.objective, tokenizer, report)
    if config.data.template:
        return _load_conversations(config, tokenizer, report)
    if isinstance(config.objective, ClozeConfig):
        return _load_records(config, config.objective, tokenizer, report)
    return _load_text(config, tokenizer, report)


def _load_records(
    config: RunConfig, question: Question, tokenizer: Tokenizer | TokenizerTrainer, report: Report
) -> tuple[Records, Tokenizer]:
    tokenizer = _require(tokenizer, "records")
    cloze = Cloze(question, tokenizer, config.context)

    def check(record: Record) -> None:
        cloze.label(record)
        cloze.layouts(record)

    data = Records.load(config.data.sources, config.data.val_fraction, config.data.on_error, check)
    _say_size(data, f"{len(data.train):,} records, {len(data.val):,} held out", config, report)
    return data, tokenizer


def _require(tokenizer: Tokenizer | TokenizerTrainer, what: str) -> Tokenizer:
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    fix = "give the model that is fine-tuned as train.init_from"
    raise InputError(f"{what} train no tokenizer", where="tokenizer.path", found="none", fix=fix)


def _load_conversations(
    config: RunConfig, tokenizer: Tokenizer | TokenizerTrainer, report: Report
) -> tuple[Instructions, Tokenizer]:
    """Conversations, rendered by the template."""
    began = time.perf_counter()
    tokenizer, template = _rendering(config, tokenizer, "conversations")
    data = _split(config, tokenizer, template)
    tokens = sum(len(example.ids) for example in data.train)
    trained = sum(int((example.weights > 0).sum()) for example in data.train)
    size = (
        f"{len(data.train):,} conversations, {len(data.val):,} held out; {tokens:,} tokens, {trained:,} of them in "
        f"trained answers; template {template.name} ({time.perf_counter() - began:.1f} s)"
    )
    _say_size(data, size, config, report)
    return data, _with(template, tokenizer)


def _load_preferences(
    config: RunConfig, tokenizer: Tokenizer | TokenizerTrainer, report: Report
) -> tuple[Preferences, Tokenizer]:
    """Preferences, rendered by the template, as conversations are."""
    began, settings, pairs = time.perf_counter(), config.data, config.objective.name != "kto"
    tokenizer, template = _rendering(config, tokenizer, "preferences")
    reading = template, tokenizer, config.context, settings.val_fraction, settings.on_error, pairs
    data = preference_set.load(settings.sources, *reading)
    if not config.objective.soft_labels and any(row.probability != 1 for row in (*data.train, *data.val)):
        report.say(
            "warning: this loss takes every preference as certain, whatever its probability; reward and dpo with "
            "loss sigmoid read it"
        )
    what = "pairs" if pairs else "judged answers"
    size = f"{len(data.train):,} {what}, {len(data.val):,} held out; template {template.name}"
    _say_size(data, f"{size} ({time.perf_counter() - began:.1f} s)", config, report)
    return data, _with(template, tokenizer)


def _load_prompts(
    config: RunConfig, settings: FeedbackConfig, tokenizer: Tokenizer | TokenizerTrainer, report: Report
) -> tuple[Prompts, Tokenizer]:
    """Prompts, rendered by the template, of such a length that an answer fits behind them."""
    began, data = time.perf_counter(), config.data
    tokenizer, template = _rendering(config, tokenizer, "prompts")
    longest = longest_prompt(config.context, settings.max_new_tokens)
    found = Prompts.load(data.sources, template, tokenizer, longest, data.val_fraction, data.format, data.on_error)
    size = f"{len(found.train):,} prompts, {len(found.val):,} held out; template {template.name}"
    _say_size(found, f"{size} ({time.perf_counter() - began:.1f} s)", config, report)
    if isinstance(settings, PPOConfig) and settings.text:
        cache = Path(data.cache) if data.cache else cache_folder()
        corpus, _ = prepare(
            settings.text, tokenizer, cache=cache, val_fraction=data.val_fraction, on_error=data.on_error
        )
        corpus.check(config.context, config.train.batch_size)
        found = replace(found, text=corpus, fingerprint=found.fingerprint + corpus.fingerprint)
    return found, _with(template, tokenizer)


def _rendering(config: RunConfig, tokenizer: Tokenizer | TokenizerTrainer, what: str) -> tuple[Tokenizer, Template]:
    """The tokenizer and the template of sources that are read once."""
    tokenizer = _require(tokenizer, what)
    weights = {source.weight for source in config.data.sources}
    if len(weights) > 1:
        text = f"{what} are read once per epoch, whatever the weight of their source"
        raise InputError(text, where="data.sources", found=sorted(weights), fix="leave weights out")
    return tokenizer, load_template(template_name(config.data, tokenizer), tokenizer)


def _with(template: Template, tokenizer: Tokenizer) -> Tokenizer:
    """Tokenizer that has taken over the template, for those who talk to the model."""
    return tokenizer if template.name == OWN else tokenizer.with_chat_template(template.source)


def _split(config: RunConfig, tokenizer: Tokenizer, template: Template) -> Instructions:
    """A conversation is held out when a hash of its first question falls below the fraction."""
    settings, skipped = config.data, Skipped()
    split: dict[bool, list[Example]] = {True: [], False: []}
    ends: set[int] = set()
    for source in settings.sources:
        for conversation in conversations(source, settings.format, settings.on_error, skipped):
            with skipping(settings.on_error, skipped, conversation.where):
                whole = encode(conversation, template, tokenizer, settings.train_on)
                rendered = truncated(whole, config.context + 1, tokenizer.bos_id)
                if not rendered.trained:
                    what, found = "no trained token is within the context", f"{len(whole.ids)} tokens"
                    raise InputError(what, where=conversation.where, found=found, fix="raise train.context")
                ends.add(whole.end_id)
                for cut, part in zip(rendered.cut, CUTS, strict=True):
                    if cut:
                        skipped.note(f"conversations whose {part} is truncated to the context")
                example = Example.of(rendered.ids, rendered.weights, conversation.where)
                split[is_held_out(conversation.question, settings.val_fraction)].append(example)
    stop_ids = frozenset(ends & tokenizer.special_ids)
    return Instructions.of(split[False], split[True], config.context, settings.packing, skipped, stop_ids)


def _load_text(config: RunConfig, tokenizer: Tokenizer | TokenizerTrainer, report: Report) -> tuple[Corpus, Tokenizer]:
    """Tokenized corpus, new or from the cache, checked to fit the model."""
    began = time.perf_counter()
    sources = [replace(source, field=source.field or config.data.field) for source in config.data.sources]
    corpus, trained = prepare(
        sources,
        tokenizer,
        cache=Path(config.data.cache) if config.data.cache else cache_folder(),
        val_fraction=config.data.val_fraction,
        on_error=config.data.on_error,
        progress=lambda what, share: report.say(f"{what} ...") if share == 0 else None,
    )
    _check_vocabulary(trained, config)
    corpus.check(config.context, config.train.batch_size)
    if not config.train.init_from:  # a model goes on as it was
        trained.add_bos = corpus.separator is not None
    tokens, held_out = (sum(split.tokens for split in splits) for splits in (corpus.train, corpus.val))
    seconds = time.perf_counter() - began
    held = f"{held_out:,} held out, {corpus.held_out_part}"
    size = f"{tokens:,} tokens ({held}), vocabulary {trained.vocab_size} ({seconds:.1f} s)"
    _say_size(corpus, size, config, report)
    return corpus, trained


def _check_vocabulary(tokenizer: Tokenizer, config: RunConfig) -> None:
    fix = f"add --model.vocab_size {tokenizer.vocab_size}"
    tokenizer.check_fits(config.model.vocab_size, "model.vocab_size", fix)


def _say_size(data: Data, size: str, config: RunConfig, report: Report) -> None:
    if left_out := str(data.skipped):
        report.say(left_out)
    report.say(f"data: {', '.join(source.label for source in config.data.sources)}: {size}")
