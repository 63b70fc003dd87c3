"""Formats that are fuzzed: a small file of each, how it is damaged, and how it is read."""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import damage
import numpy as np
import samples
import torch
from samples import STORY
from sentencepiece import SentencePieceProcessor

from minillama import Tokenizer
from minillama.commands import compare, show
from minillama.data.cleaning.classifier import LinearClassifier
from minillama.data.cleaning.ngram_lm import NgramLM
from minillama.data.cleaning.perplexity import PieceLM
from minillama.data.cleaning.warc import read_warc
from minillama.data.conversations import conversations
from minillama.data.preferences import preferences
from minillama.data.prepare import prepare
from minillama.data.shards import Shard
from minillama.data.sources import Source, documents
from minillama.evaluate import files
from minillama.evaluate.results import ResultFolder
from minillama.formats import peft
from minillama.formats.model_file import ModelFile
from minillama.formats.open import contents, open_model
from minillama.runs.checkpoint import newest_checkpoint
from minillama.runs.config import load_run_config, to_table
from minillama.runs.folder import choose_folder
from minillama.runs.record import RecordedRun
from minillama.scaling.points import read_csv
from minillama.tokenizer import byte_tokenizer

Damage = Callable[[random.Random, bytes], bytes]
TEXT = "Wait, 17 días in the bay 中文 \x01\n"


class Target(NamedTuple):
    """Format.

    Attributes:
        folder: with whole files.
        file: within the folder, which is damaged.
        damage: how.
        read: reads everything in a folder, and asserts that what is not refused is what it should be.
    """

    folder: Path
    file: str
    damage: Damage
    read: Callable[[Path], object]


def targets(place: Path) -> dict[str, Target]:
    """Every format, its whole files made in a folder."""
    samples.write(place)
    step, tokens = "checkpoints/step-3", next((place / "cache").glob("*/dataset.json")).parent.name
    shard = next((place / "cache").glob("*/*.bin")).name
    as_json, as_bytes, as_lines = damage.of_json_or_bytes, damage.of_bytes, damage.of_lines
    numbers, types = samples.header_of_gguf(place / "gguf" / "m.gguf")
    normalizer = samples.normalizer(place / "sp" / "tokenizer.model")
    base = open_model(place / "hf")
    weights, gguf = base.tensors, open_model(place / "gguf" / "m.gguf").tensors
    rows: list[tuple[str, str, Damage, Callable[[Path], object]]] = [
        ("hf", "model.safetensors", as_bytes, _model),
        ("hf", "config.json", as_json, _model),
        ("hf", "generation_config.json", as_json, _model),
        ("hf", "tokenizer.json", as_json, _tokenizer),
        ("hf", "tokenizer_config.json", as_json, _chat),
        ("shards", "model.safetensors.index.json", as_json, _model),
        ("hf", "special_tokens_map.json", as_json, _tokenizer),
        ("hf types", "model.safetensors", damage.of_dtypes, lambda folder: _same(folder, weights)),
        ("adapter", "adapter_config.json", as_json, lambda folder: _adapter(folder, base)),
        ("adapter", "adapter_model.safetensors", as_bytes, lambda folder: _adapter(folder, base)),
        ("gguf", "m.gguf", lambda rng, data: damage.of_gguf(rng, data, numbers), _gguf),
        (
            "gguf types",
            "m.gguf",
            lambda rng, data: damage.of_types(rng, data, types),
            lambda folder: _same(folder / "m.gguf", gguf),
        ),
        ("meta", "consolidated.00.pth", as_bytes, _model),
        ("meta pickle", "consolidated.00.pth", damage.of_pickle, _model),
        ("meta tensors", "consolidated.00.pth", damage.of_tensors, _model),
        ("meta", "params.json", as_json, _model),
        ("llama2c", "m.bin", as_bytes, lambda folder: _model(folder / "m.bin")),
        ("llama2c", "tokenizer.bin", as_bytes, lambda folder: _tokenizer(folder / "tokenizer.bin")),
        ("sp", "tokenizer.model", as_bytes, _sentencepiece),
        (
            "sp normalizer",
            "tokenizer.model",
            lambda rng, data: damage.of_numbers(rng, data, normalizer),
            _sentencepiece,
        ),
        ("charsmap", "tokenizer.json", lambda rng, data: damage.of_bytes(rng, data, len(data)), _tokenizer),
        ("ranks", "tokenizer.model", as_lines, _tokenizer),
        ("toml", "c.toml", as_lines, lambda folder: _numbers(to_table(load_run_config(str(folder / "c.toml"))))),
        ("toml", "paths.toml", damage.of_paths, _configured),
        ("chat", "a.jsonl", as_lines, _records),
        ("pairs", "a.jsonl", as_lines, lambda folder: list(preferences(Source(path=str(folder / "a.jsonl"))))),
        *(("text", name, as_bytes, _texts) for name in ("a.jsonl", "b.txt", "c.txt.gz", "d.jsonl.zst")),
        ("run", "metrics.jsonl", as_lines, _show),
        ("run", "provenance.jsonl", as_lines, _show),
        ("run", "config.toml", as_lines, _show),
        ("run", f"{step}/run.json", as_json, _forged),
        ("run", f"{step}/manifest.json", as_json, _checkpoint),
        ("run", f"{step}/optimizer.safetensors", as_bytes, _forged),
        ("cache", f"{tokens}/dataset.json", as_json, _prepared),
        ("cache", f"{tokens}/{shard}", as_bytes, _prepared),
        ("set", "a_test.csv", as_lines, _set),
        ("set", "b_test.txt.bz2", as_bytes, _set),
        *((("set", "c_test.parquet", as_bytes, _set),) if (place / "set" / "c_test.parquet").exists() else ()),
        ("points", "a.csv", as_lines, lambda folder: read_csv(folder / "a.csv")),
        ("classifier", "c.safetensors", as_bytes, _classifier),
        ("lm", "ngram_lm.json", as_json, lambda folder: PieceLM.load(folder).perplexity(TEXT)),
        ("lm", "ngram_lm.safetensors", as_bytes, lambda folder: PieceLM.load(folder).perplexity(TEXT)),
        ("arpa", "a.arpa", as_lines, lambda folder: NgramLM.read_arpa(folder / "a.arpa")),
        ("warc", "a.warc", as_bytes, lambda folder: list(read_warc(folder / "a.warc", 2**20))),
        ("eval", "items.jsonl", as_lines, lambda folder: ResultFolder(folder, {"model": "m"})),
        ("eval", "model.json", as_json, lambda folder: ResultFolder(folder, {"model": "m"})),
    ]
    return {f"{row[0]}/{Path(row[1]).name}": Target(place / row[0].split()[0], *row[1:]) for row in rows}


def _model(path: Path) -> None:
    contents(path)
    opened = open_model(path)
    assert opened.config.num_params() < 10**6
    assert 0 < opened.config.norm_eps < 1 < opened.config.rope_theta < 1e15
    for tensor in opened.tensors.values():
        np.asarray(tensor.float())
    for name in list(opened.int4)[:1]:
        opened.int4[name]


def _same(path: Path, expected: Mapping[str, torch.Tensor]) -> None:
    """A type that lies is refused, or is what the tensor is."""
    found = open_model(path).tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _gguf(folder: Path) -> None:
    _model(folder / "m.gguf")
    _tokenizer(folder / "m.gguf")


def _adapter(folder: Path, base: ModelFile) -> None:
    for tensor in peft.merged(base, peft.read(folder, base.config)).tensors.values():
        np.asarray(tensor.float())


def _sentencepiece(folder: Path) -> None:
    """The ids of the library, where it reads the file."""
    _tokenizer(folder)
    tokenizer, library = Tokenizer.load(folder), SentencePieceProcessor()
    try:
        library.Load(str(folder / "tokenizer.model"))
        ids = library.EncodeAsIds(STORY)
    except RuntimeError:
        return
    assert not tokenizer.is_exact or tokenizer.encode(STORY) == ids


def _numbers(value: object) -> None:
    """Whole numbers that a program can count to."""
    for member in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _numbers(member)
    assert not isinstance(value, int) or abs(value) < 2**63


def _configured(folder: Path) -> None:
    """What a configuration names."""
    config = load_run_config(str(folder / "paths.toml"))
    choose_folder(config.name, None, folder)
    Tokenizer.load(config.tokenizer.path)
    for source in config.data.sources:
        list(documents(source))


def _tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(TEXT, bos=True)
    stream = tokenizer.stream()
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids)
    return tokenizer


def _chat(path: Path) -> None:
    tokenizer = _tokenizer(path)
    if tokenizer.chat_templates:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def _texts(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        list(documents(Source(path=str(file)), on_error="skip"))
        list(documents(Source(path=str(file))))


def _records(folder: Path) -> None:
    source = Source(path=str(folder / "a.jsonl"))
    list(conversations(source, on_error="skip"))
    list(conversations(source))


def _show(folder: Path) -> None:
    assert isinstance(RecordedRun.open(folder).summary(), dict)
    with contextlib.redirect_stdout(io.StringIO()):
        show.run(show.Args(folder))
        compare.run(compare.Args((folder, folder)))


def _forged(folder: Path) -> None:
    """A checkpoint whose manifest has the sizes of what is there."""
    manifest = folder / "checkpoints" / "step-3" / "manifest.json"
    known = json.loads(manifest.read_text())
    for name, entry in known.items():
        entry["bytes"] = (manifest.parent / name).stat().st_size
    manifest.write_text(json.dumps(known))
    _checkpoint(folder)


def _checkpoint(folder: Path) -> None:
    found, _ = newest_checkpoint(folder / "checkpoints", verify=False)
    assert found is not None and found.step >= 0
    found.optimizer_tensors()


def _prepared(folder: Path) -> None:
    prepare([Source(path=str(folder.parent / "text" / "b.txt"))], byte_tokenizer(), cache=folder)
    for path in folder.glob("*/*.bin"):
        Shard.open(path)


def _set(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        list(files.read(path, ()))


def _classifier(folder: Path) -> None:
    LinearClassifier.load(folder / "c.safetensors").score(STORY)
