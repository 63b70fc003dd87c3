"""Corpus preparation: train the tokenizer if necessary, tokenize each source once, cache both.

A source's tokens are in CACHE/KEY: train-*.bin, val-*.bin and dataset.json, complete or absent. KEY hashes
all that they depend on, so that a second start reads only these.
"""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4

from minillama.config.arguments import Fraction, checked
from minillama.data.corpus import Corpus, Split
from minillama.data.shards import Shard, ShardWriter, damaged, token_dtype
from minillama.data.skipped import Skipped
from minillama.data.sources import OnError, Source, identity
from minillama.data.split import Part, SplitName, SplitSource
from minillama.errors import InputError
from minillama.files import digest, parsing, read_json
from minillama.tokenizer import Tokenizer, TokenizerTrainer

VERSION = 2  # of the cache format; a change invalidates the cache
MEMORY = 256 * 2**20  # bytes of text kept in memory instead of being read again
SAMPLE = 20_000_000  # characters of tokenizer training
CHUNK = 2**20  # characters to encode at once
VERIFIED = 2**30  # bytes of shards whose checksums are verified on every start

Progress = Callable[[str, float], None]
"""Progress callback: the task, and the fraction of it that is done, 0 to 1."""

# A boundary between two words with one space in between: pre-tokenizers split there regardless of context.
_BREAK = re.compile(r"[^\W_](?=\s[^\W_])")
_WORD = 80  # characters in which a word ends


@checked
def prepare(
    sources: Sequence[Source],
    tokenizer: Tokenizer | TokenizerTrainer,
    *,
    cache: str | Path,
    val_fraction: Fraction = 0.05,
    on_error: OnError = "stop",
    progress: Progress | None = None,
) -> tuple[Corpus, Tokenizer]:
    """Tokenize sources, or load them from the cache.

    Every document gets the tokenizer's BOS in front, and its EOS behind where that is another token. A source
    that is a single document gets neither.

    Args:
        sources: at least one.
        tokenizer: a Tokenizer, or a trainer, for at most 20 million characters of the training
            documents, per source by its weight.
        cache: folder, created if missing. Processes may share it.
        val_fraction: held-out fraction: see `SplitSource`.
        on_error: stop at bad text or skip it; `Corpus.skipped` has the skipped documents.

    Raises:
        InputError: bad text, an empty source, a damaged or unwritable cache.
    """
    cache = Path(cache)
    known = [identity(source) for source in sources]
    report = progress or (lambda what, share: None)
    readers = [SplitSource(source, val_fraction, on_error, MEMORY // len(sources)) for source in sources]
    settings: dict[str, Any] = {"version": VERSION, "val_fraction": val_fraction, "on_error": on_error}
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = _trained(tokenizer, readers, known, settings, cache, report)
    settings |= {"tokenizer": tokenizer.fingerprint, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    folders = []
    for reader, source in zip(readers, known, strict=True):
        table = settings | {"identity": source}
        folders.append(_cached(cache / _key(table), partial(_tokenize, reader, tokenizer, table, report)))
    return load_corpus(folders, [source.weight for source in sources]), tokenizer


def load_corpus(folders: Sequence[Path], weights: Sequence[float] | None = None) -> Corpus:
    """Corpus of cache folders that `prepare` wrote, one per source.

    Checksums are verified if all shards together are no larger than 1 GiB, sizes always.

    Raises:
        InputError: a file is missing, of the wrong size, or not what dataset.json says.
    """
    verify = sum(path.stat().st_size for folder in folders for path in folder.glob("*.bin")) <= VERIFIED
    splits: dict[SplitName, list[Split]] = {"train": [], "val": []}
    skipped, content, separators, held = Skipped(), list[dict[str, Any]](), list[int | None](), list[str]()
    for folder in folders:
        with _reading_table(folder / "dataset.json") as table:
            counts, places, notes = (table["skipped"][name] for name in ("counts", "places", "notes"))
            skipped.merge(Skipped(counts, places, notes, table["skipped"].get("files", {})))
            str(skipped)  # as it is printed later
            for side, made in splits.items():
                entry, size = table["splits"][side], operator.index(table["vocab_size"])
                opened = [_open_shard(folder, shard, verify) for shard in entry["shards"]]
                name = f"{table['identity']['source']} ({side})"
                opening = operator.index(table.get(f"{side}_opening", 0))
                made.append(Split(opened, size, operator.index(entry["bytes"]), name, opening))
            # not the identities: a copy of the data on another machine has other times, and the same tokens
            content.append({key: table[key] for key in ("splits", "vocab_size", "separator", "tokenizer")})
            separators.append(None if table["separator"] is None else operator.index(table["separator"]))
            held.append(str(table["held_out"]))
    fingerprint = sha256(json.dumps([content, list(weights or [])], sort_keys=True).encode()).hexdigest()
    separator = next((one for one in separators if one is not None), None)
    train, val = splits["train"], splits["val"]
    return Corpus(train, val, weights, separator, fingerprint, skipped, " and ".join(dict.fromkeys(held)))


def _trained(
    trainer: TokenizerTrainer,
    readers: Sequence[SplitSource],
    known: list[dict[str, Any]],
    settings: dict[str, Any],
    cache: Path,
    report: Progress,
) -> Tokenizer:
    """The trained tokenizer, cached."""
    weights = [reader.source.weight for reader in readers]

    def train(folder: Path) -> None:
        report("training the tokenizer", 0.0)
        shares = [int(SAMPLE * weight / sum(weights)) for weight in weights]
        pairs = zip(readers, shares, strict=True)
        texts = (Part("train", text) for reader, share in pairs for text in reader.sample(share))
        trainer(part.text for part in _chunks(texts)).save(folder)
        report("training the tokenizer", 1.0)

    key = _key(settings | {"from": known, "weights": weights, "by": trainer.description})
    return Tokenizer.load(_cached(cache / f"tokenizer-{key}", train))


def _tokenize(
    reader: SplitSource, tokenizer: Tokenizer, settings: dict[str, Any], report: Progress, folder: Path
) -> None:
    """Write a source's shards and its dataset.json."""
    reader.scan()
    single = reader.count == 1
    before = [] if single else [tokenizer.bos_id]
    after = [] if single or tokenizer.eos_id == tokenizer.bos_id else [tokenizer.eos_id]
    writers = {side: ShardWriter(folder, side, tokenizer.vocab_size) for side in get_args(SplitName)}
    counts = {side: {"documents": 0, "bytes": 0} for side in writers}
    opening = 0
    done, total = 0, sum(reader.chars.values())
    for parts in _batches(_chunks(reader.parts())):
        report(f"tokenizing {reader.source.label}", done / total)
        encoded = tokenizer.encode_batch([part.text for part in parts], [not part.starts for part in parts])
        for part, ids in zip(parts, encoded, strict=True):
            if part.within_word and not writers["val"].tokens:
                opening = _opening(part.text, tokenizer)
            writers[part.split].write(before * part.starts + ids + after * part.ends)
            counts[part.split]["documents"] += part.starts
            counts[part.split]["bytes"] += len(part.text.encode())
            done += len(part.text)
    for writer in writers.values():
        writer.close()
    table = settings | {
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "separator": None if single else tokenizer.bos_id,
        "skipped": {
            "counts": reader.skipped.counts,
            "places": reader.skipped.locations,
            "notes": reader.skipped.notes,
            "files": reader.skipped.files,
        },
        "held_out": reader.held_out,
        "val_opening": opening,  # no part of the splits, on which batches depend
        "splits": {
            side: counts[side] | {"tokens": writer.tokens, "shards": [_listed(path) for path in writer.paths]}
            for side, writer in writers.items()
        },
    }
    (folder / "dataset.json").write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    report(f"tokenizing {reader.source.label}", 1.0)


def _opening(text: str, tokenizer: Tokenizer) -> int:
    """Tokens in front of the first whole word of a text that begins within one."""
    found = _BREAK.search(text, 0, _WORD)
    return len(tokenizer.encode_batch([text[: found.end()]], [True])[0]) if found else 0


def _chunks(parts: Iterable[Part]) -> Iterator[Part]:
    """Chunks of long documents, split between words, to bound the memory of encoding."""
    for part in parts:
        start = 0
        while start < len(part.text):
            found = _BREAK.search(part.text, start + CHUNK - 1, start + 2 * CHUNK)
            stop = found.end() if found else min(start + 2 * CHUNK, len(part.text))
            ends = part.ends and stop == len(part.text)
            within_word = part.within_word and not start
            yield Part(part.split, part.text[start:stop], part.starts and not start, ends, within_word)
            start = stop


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Batches of parts, large enough for all cores."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.text)
        if size >= 4 * CHUNK:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cached(folder: Path, write: Callable[[Path], object]) -> Path:
    """A folder of the cache, written where it is absent: complete or not at all. Another process may be first."""
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f"{folder.name}.{uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        try:
            os.replace(temporary, folder)
        except OSError:
            if not folder.is_dir():
                raise
    except OSError as error:
        fix = "make room there, or set data.cache to another folder"
        raise InputError(f"cannot write the cache: {error.strerror}", where=folder.parent, fix=fix) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _key(parts: dict[str, Any]) -> str:
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _listed(path: Path) -> dict[str, Any]:
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest(path)}


def _open_shard(folder: Path, listed: dict[str, Any], verify: bool) -> Shard:
    path, expected = folder / listed["file"], listed["sha256"]
    shard = Shard.open(path)
    if verify and (found := digest(path)) != expected:
        what = "the checksum of a data shard does not match: it was damaged or replaced"
        raise damaged(path, what, f"SHA-256 {found}", expected)
    return shard


@contextmanager
def _reading_table(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with parsing(path):
            table = read_json(path)
            if table["version"] != VERSION:
                raise ValueError(f"version {table['version']}")
            yield table
    except InputError as error:
        if error.where != path:
            raise
        raise damaged(path, "this is not the table of a tokenized source", error.found or error.what) from None
