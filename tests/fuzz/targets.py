"""Formats that are fuzzed: a small file of each, how it is damaged, and how it is read."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import damage
import numpy as np
import torch
import zstandard
from sentencepiece import SentencePieceTrainer

from minillama import Decoder, ModelConfig, Tokenizer
from minillama.commands import compare, show
from minillama.convert import convert
from minillama.data.conversations import conversations
from minillama.data.preferences import preferences
from minillama.data.prepare import prepare
from minillama.data.sources import Source, documents
from minillama.formats import meta
from minillama.formats.open import contents, open_model
from minillama.runs.checkpoint import CheckpointCopy, newest_checkpoint, save_checkpoint
from minillama.runs.config import load_run_config
from minillama.runs.record import RecordedRun
from minillama.tokenizer import train_byte_bpe

Damage = Callable[[random.Random, bytes], bytes]
CONFIG = ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=300, max_seq_len=32)
STORY = "The heron stood in the shallow bay for 17 days. 'Wait,' it said, 'and the tide brings é, ü and 中文.'\n"
TEXT = "Wait, 17 días in the bay 中文 \x01\n"


class Target(NamedTuple):
    """Format.

    Attributes:
        folder: with whole files.
        file: within the folder, which is damaged.
        damage: how.
        read: reads everything in a folder.
    """

    folder: Path
    file: str
    damage: Damage
    read: Callable[[Path], object]


def targets(place: Path) -> dict[str, Target]:
    """Every format, its whole files made in a folder."""
    torch.manual_seed(0)
    hf, model = place / "hf", Decoder(CONFIG)
    model.stop_ids, model.sampling = frozenset({1}), {"temperature": 0.6, "top_p": 0.9}
    model.save_pretrained(hf)
    train_byte_bpe([STORY * 9], 300).save(hf)
    model.save_pretrained(place / "shards", max_shard_size="20KB")
    convert(hf, place / "gguf" / "m.gguf", "gguf", "q8_0")
    meta.write(place / "meta", CONFIG, model.state_dict())
    _sentencepiece(place / "sp")
    Tokenizer.load(place / "sp").save(place / "charsmap")
    files = {
        "ranks/tokenizer.model": b"".join(_rank(i, bytes([i])) for i in range(256)) + _rank(256, b"he"),
        "llama2c/m.bin": _llama2c(),
        "llama2c/tokenizer.bin": _tokenizer_bin(),
        "toml/c.toml": (Path(__file__).parents[2] / "configs/train/tiny.toml").read_bytes(),
        "chat/a.jsonl": _conversations(),
        "pairs/a.jsonl": b'{"prompt": "Q", "chosen": "A", "rejected": "B"}\n' * 3,
        "text/a.jsonl": b"".join(json.dumps({"text": STORY * i}).encode() + b"\n" for i in range(5)),
        "text/b.txt": STORY.encode() * 5,
        "text/c.txt.gz": gzip.compress(STORY.encode() * 50),
        "text/d.jsonl.zst": zstandard.compress(json.dumps({"text": STORY * 50}).encode()),
    }
    for name, data in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    _run(place / "run", model)
    _cache(place / "cache")
    step, tokens = "checkpoints/step-3", next((place / "cache").glob("*/dataset.json")).parent.name
    as_json, as_bytes, as_lines = damage.of_json_or_bytes, damage.of_bytes, damage.of_lines
    rows: list[tuple[str, str, Damage, Callable[[Path], object]]] = [
        ("hf", "model.safetensors", as_bytes, _model),
        ("hf", "config.json", as_json, _model),
        ("hf", "generation_config.json", as_json, _model),
        ("hf", "tokenizer.json", as_json, _tokenizer),
        ("hf", "tokenizer_config.json", as_json, _tokenizer),
        ("shards", "model.safetensors.index.json", as_json, _model),
        ("gguf", "m.gguf", as_bytes, lambda folder: (_model(folder / "m.gguf"), _tokenizer(folder / "m.gguf"))),
        ("meta", "consolidated.00.pth", as_bytes, _model),
        ("meta", "params.json", as_json, _model),
        ("llama2c", "m.bin", as_bytes, lambda folder: _model(folder / "m.bin")),
        ("llama2c", "tokenizer.bin", as_bytes, lambda folder: _tokenizer(folder / "tokenizer.bin")),
        ("sp", "tokenizer.model", as_bytes, _tokenizer),
        ("charsmap", "tokenizer.json", lambda rng, data: damage.of_bytes(rng, data, len(data)), _tokenizer),
        ("ranks", "tokenizer.model", as_lines, _tokenizer),
        ("toml", "c.toml", as_lines, lambda folder: load_run_config(str(folder / "c.toml"))),
        ("chat", "a.jsonl", as_lines, _records),
        ("pairs", "a.jsonl", as_lines, lambda folder: list(preferences(Source(path=str(folder / "a.jsonl"))))),
        *(("text", name, as_bytes, _texts) for name in ("a.jsonl", "b.txt", "c.txt.gz", "d.jsonl.zst")),
        ("run", "metrics.jsonl", as_lines, _show),
        ("run", "provenance.jsonl", as_lines, _show),
        ("run", "config.toml", as_lines, _show),
        ("run", f"{step}/run.json", as_json, _checkpoint),
        ("run", f"{step}/manifest.json", as_json, _checkpoint),
        ("run", f"{step}/optimizer.safetensors", as_bytes, _checkpoint),
        ("cache", f"{tokens}/dataset.json", as_json, _prepared),
    ]
    return {f"{name}/{Path(file).name}": Target(place / name, file, how, read) for name, file, how, read in rows}


def _model(path: Path) -> None:
    contents(path)
    opened = open_model(path)
    assert opened.config.num_params() < 10**6
    for tensor in opened.tensors.values():
        np.asarray(tensor.float())
    for name in list(opened.int4)[:1]:
        opened.int4[name]


def _tokenizer(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.encode(TEXT, bos=True)
    stream = tokenizer.stream()
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids)
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


def _checkpoint(folder: Path) -> None:
    found, _ = newest_checkpoint(folder / "checkpoints", verify=False)
    assert found is not None and found.step >= 0
    found.optimizer_tensors()


def _prepared(folder: Path) -> None:
    text = folder.parent / "a.txt"
    text.write_text(STORY * 40, encoding="utf-8")
    prepare([Source(path=str(text))], _bytes(), cache=folder)


def _bytes() -> Tokenizer:
    from minillama.tokenizer import byte_tokenizer

    return byte_tokenizer()


def _rank(rank: int, token: bytes) -> bytes:
    from base64 import b64encode

    return b64encode(token) + b" %d\n" % rank


def _sentencepiece(folder: Path) -> None:
    folder.mkdir()
    SentencePieceTrainer.train(
        sentence_iterator=iter([STORY.strip()] * 40),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()


def _llama2c() -> bytes:
    """Version 1 (karpathy/llama2.c, export.py): a header of 256 bytes and float32 tensors."""
    values = (32, 64, 1, 4, 2, 300, 32)
    head = b"24ka" + struct.pack("<8i?", 1, *values, True)
    return head.ljust(256, b"\0") + b"\0" * 4 * CONFIG.changed({"tie_embeddings": True}).num_params()


def _tokenizer_bin() -> bytes:
    names = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), " ", "h", "e", "he"]
    rows = (struct.pack("<fi", -float(i), len(name.encode())) + name.encode() for i, name in enumerate(names))
    return struct.pack("<i", 7) + b"".join(rows)


def _conversations() -> bytes:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    call = {"function": {"name": "clock", "arguments": {"zone": "UTC"}}, "type": "function"}
    messages += [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "12"}]
    rows = [
        {"messages": [*messages, {"role": "assistant", "content": "A"}], "tools": [{"type": "function", **call}]},
        {"instruction": "I", "input": "", "output": "O", "history": [["Q", "A"]]},
        {"instruction": "I", "context": "C", "response": "R", "category": "open_qa"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"prompt": "P", "completion": "C"},
        {"instruction": "I", "instances": [{"input": "x", "output": "y"}], "id": "seed_task_0"},
    ]
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _run(folder: Path, model: Decoder) -> None:
    folder.mkdir()
    (folder / "config.toml").write_bytes((Path(__file__).parents[2] / "configs/train/tiny.toml").read_bytes())
    lines = [{"step": i, "loss": 2.0, "val_loss": 3.0, "tokens": 16 * i, "seconds": 0.1 * i} for i in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "provenance.jsonl").write_text(json.dumps({"time": "2026-01-01", "seed": 1, "versions": {}}) + "\n")
    state = {"step": 3, "tokens": 48, "seconds": 0.3, "data": "a", "tokenizer": "b", "guard": {}, "record": {}}
    copy = CheckpointCopy(model.state_dict(), {"a/m": torch.zeros(3)}, state)

    def write(path: Path, tensors: object) -> None:
        model.save_pretrained(path)

    save_checkpoint(folder / "checkpoints", copy, write)


def _cache(folder: Path) -> None:
    folder.mkdir()
    _prepared(folder)
