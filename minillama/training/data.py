"""Training data: tokenized text, or records for fine-tuning."""

from __future__ import annotations

import time
from pathlib import Path

from minillama.data.corpus import Corpus
from minillama.data.prepare import prepare
from minillama.data.reading import Record
from minillama.data.records import Records
from minillama.errors import InputError
from minillama.evaluate.cloze import Cloze
from minillama.evaluate.question import Question
from minillama.files import cache_folder
from minillama.runs.config import RunConfig
from minillama.runs.objectives import ClozeConfig
from minillama.runs.report import Report
from minillama.tokenizer import Tokenizer, TokenizerTrainer


def load_data(
    config: RunConfig, tokenizer: Tokenizer | TokenizerTrainer, report: Report
) -> tuple[Corpus | Records, Tokenizer]:
    """Training data of the objective, and the tokenizer, trained on them if need be.

    Raises:
        InputError: a source that cannot be read, a tokenizer larger than the model's vocabulary, or too
            little text for one batch.
    """
    if isinstance(tokenizer, Tokenizer):
        _check_vocabulary(tokenizer, config)
    if isinstance(config.objective, ClozeConfig):
        return _load_records(config, config.objective, tokenizer, report)
    return _load_text(config, tokenizer, report)


def _load_records(
    config: RunConfig, question: Question, tokenizer: Tokenizer | TokenizerTrainer, report: Report
) -> tuple[Records, Tokenizer]:
    if not isinstance(tokenizer, Tokenizer):
        fix = "give the model that is fine-tuned as train.init_from"
        raise InputError("records train no tokenizer", where="tokenizer.path", found="none", fix=fix)
    cloze = Cloze(question, tokenizer, config.context)

    def check(record: Record) -> None:
        cloze.label(record)
        cloze.layouts(record)

    data = Records.load(config.data.sources, config.data.val_fraction, config.data.on_error, check)
    _say_size(data, f"{len(data.train):,} records, {len(data.val):,} held out", config, report)
    return data, tokenizer


def _load_text(config: RunConfig, tokenizer: Tokenizer | TokenizerTrainer, report: Report) -> tuple[Corpus, Tokenizer]:
    """Tokenized corpus, new or from the cache, checked to fit the model."""
    began = time.perf_counter()
    corpus, trained = prepare(
        config.data.sources,
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
    size = f"{tokens:,} tokens, {held_out:,} held out, vocabulary {trained.vocab_size} ({seconds:.1f} s)"
    _say_size(corpus, size, config, report)
    return corpus, trained


def _check_vocabulary(tokenizer: Tokenizer, config: RunConfig) -> None:
    fix = f"add --model.vocab_size {tokenizer.vocab_size}"
    tokenizer.check_fits(config.model.vocab_size, "model.vocab_size", fix)


def _say_size(data: Corpus | Records, size: str, config: RunConfig, report: Report) -> None:
    if data.skipped.total:
        report.say(str(data.skipped))
    report.say(f"data: {', '.join(source.label for source in config.data.sources)}: {size}")
