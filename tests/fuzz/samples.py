"""Small whole files of every format."""

from __future__ import annotations

import bz2
import gzip
import json
import struct
from importlib.util import find_spec
from pathlib import Path

import tomli_w
import torch
import zstandard
from gguf import GGUFReader
from sentencepiece import SentencePieceTrainer
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from minillama import Decoder, ModelConfig, Tokenizer
from minillama.config.lora import LoRAConfig
from minillama.convert import convert
from minillama.data.cleaning.classifier import LinearClassifier
from minillama.data.cleaning.perplexity import PieceLM
from minillama.data.prepare import prepare
from minillama.data.sources import Source
from minillama.evaluate.multiple_choice import Outcome
from minillama.evaluate.results import ResultFolder
from minillama.formats import meta
from minillama.formats.open import open_model
from minillama.model.lora import add_lora, save_adapter
from minillama.runs.checkpoint import CheckpointCopy, save_checkpoint
from minillama.runs.config import load_run_config, to_table
from minillama.tokenizer import byte_tokenizer, train_byte_bpe

CONFIG = ModelConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=300, max_seq_len=32)
STORY = "The heron stood in the shallow bay for 17 days. 'Wait,' it said, 'and the tide brings é, ü and 中文.'\n"


def write(place: Path) -> None:
    """Write them, a folder per format."""
    torch.manual_seed(0)
    hf, model = place / "hf", Decoder(CONFIG)
    model.stop_ids, model.sampling = frozenset({1}), {"temperature": 0.6, "top_p": 0.9}
    model.save_pretrained(hf)
    train_byte_bpe([STORY * 9], 300).with_chat_template("{{ bos_token }}{{ messages[0].content }}").save(hf)
    model.save_pretrained(place / "shards", max_shard_size="20KB")
    convert(hf, place / "gguf" / "m.gguf", "gguf", "q8_0")
    meta.write(place / "meta", CONFIG, model.state_dict())
    _vocabulary(place / "sp")
    Tokenizer.load(place / "sp").save(place / "charsmap")
    base = open_model(hf)
    save_adapter(add_lora(Decoder.from_pretrained(hf), LoRAConfig(rank=2)), place / "adapter", base=base)
    (hf / "special_tokens_map.json").write_text(
        '{"eos_token": "<|endoftext|>", "pad_token": {"content": "<|endoftext|>"}}'
    )
    ResultFolder(place / "eval", {"model": "m"}).add(Outcome("t", "1", "p", "s", 0, [-1.0, -2.0], [1, 2], [1, 2], []))
    files = {
        "ranks/tokenizer.model": b"".join(_rank(i, bytes([i])) for i in range(256)) + _rank(256, b"he"),
        "llama2c/m.bin": _llama2c(),
        "llama2c/tokenizer.bin": _tokenizer_bin(),
        "toml/c.toml": (Path(__file__).parents[2] / "configs/train/tiny.toml").read_bytes(),
        "toml/paths.toml": _paths(place).encode(),
        "chat/a.jsonl": _conversations(),
        "pairs/a.jsonl": b'{"prompt": "Q", "chosen": "A", "rejected": "B"}\n' * 3,
        "text/a.jsonl": b"".join(json.dumps({"text": STORY * i}).encode() + b"\n" for i in range(5)),
        "text/b.txt": STORY.encode() * 5,
        "text/c.txt.gz": gzip.compress(STORY.encode() * 50),
        "set/a_test.csv": b"question,A,B,answer\n" + b'"What, now?",one,two,A\n' * 3,
        "set/b_test.txt.bz2": bz2.compress(b"A bay\n1\none\ntwo\nthree\nfour\n" * 3),
        "points/a.csv": b"loss,params,tokens,name\n3.1,1e6,2e7,a\n2.9,2e6,4e7,b\n",
        "text/d.jsonl.zst": zstandard.compress(json.dumps({"text": STORY * 50}).encode()),
    }
    for name, data in files.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    _run(place / "run", model)
    prepare([Source(path=str(place / "text/b.txt"))], byte_tokenizer(), cache=place / "cache")
    _cleaning(place)


def header_of_gguf(path: Path) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(offset, bytes) of the numbers in the header, and of the tensors' types among them."""
    reader = GGUFReader(path)
    numbers, types = [], []
    for field in [*reader.fields.values(), *(tensor.field for tensor in reader.tensors)]:
        at = field.offset
        for part in field.parts[:64]:
            if part.itemsize > 1 and part.size <= 4:
                numbers += [(at + i * part.itemsize, part.itemsize) for i in range(part.size)]
            at += part.nbytes
    for tensor in reader.tensors:
        types.append((tensor.field.offset + sum(part.nbytes for part in tensor.field.parts[:4]), 4))
    return numbers, types


def normalizer(path: Path) -> list[tuple[int, int]]:
    """(offset, bytes) of numbers in the normalization of a .model; the first is a length."""
    data = path.read_bytes()
    start = data.index(ModelProto.FromString(data).normalizer_spec.precompiled_charsmap)
    return [(start, 4)] * 8 + [(start + 4 * i, 4) for i in range(1, 1000)]


def _rank(rank: int, token: bytes) -> bytes:
    from base64 import b64encode

    return b64encode(token) + b" %d\n" % rank


def _vocabulary(folder: Path) -> None:
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


def _paths(place: Path) -> str:
    """A configuration of paths."""
    data, model = {"sources": [{"path": f"{place}/text/b.txt"}]}, f"{place}/hf"
    return tomli_w.dumps({"name": "a", "data": data, "train": {"init_from": model}, "tokenizer": {"path": model}})


def _run(folder: Path, model: Decoder) -> None:
    folder.mkdir()
    config = to_table(load_run_config("tiny", ["--train.steps", "3"]))
    (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    lines = [{"step": i, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens": 16 * i, "seconds": i} for i in range(1, 4)]
    lines += [{"step": 3, "tokens": 48, "val_loss": 3.0, "val_bits_per_byte": 2.0, "seconds": 4.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = {
        "started": "2026-01-01T00:00:00+00:00",
        "step": 0,
        "seed": 1,
        "command": ["train"],
        "versions": {"torch": "2"},
    }
    start |= {"machine": {"device": "cpu", "threads": 2}, "git": {"commit": "a" * 40, "changed": ["x"]}, "data": "a"}
    (folder / "provenance.jsonl").write_text(json.dumps(start) + "\n")
    state = {"step": 3, "tokens": 48, "seconds": 0.3, "data": "a", "tokenizer": "b", "guard": {}, "record": {}}
    copy = CheckpointCopy(model.state_dict(), {"a/m": torch.zeros(3)}, state)

    def write(path: Path, tensors: object) -> None:
        model.save_pretrained(path)

    save_checkpoint(folder / "checkpoints", copy, write)


def _cleaning(place: Path) -> None:
    """Models of cleaning steps, a crawl and a table."""
    like, unlike = ([f"{word} {i} {word}s and {STORY}" for i in range(12)] for word in ("heron", "price"))
    (place / "classifier").mkdir()
    LinearClassifier.train(like, unlike, bits=8, epochs=1).save(place / "classifier" / "c.safetensors")
    PieceLM.train([STORY], byte_tokenizer(), 3).save(place / "lm")
    (place / "arpa").mkdir()
    PieceLM.train([STORY], byte_tokenizer(), 2).lm.write_arpa(place / "arpa" / "a.arpa")
    if find_spec("pyarrow"):
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.table({"question": ["What?"] * 3, "choices": [["one", "two"]] * 3, "answer": [0, 1, 0]})
        parquet.write_table(table, place / "set" / "c_test.parquet")
    body = f"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n<html><p>{STORY}</p></html>".encode()
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://a.b/\r\nContent-Length: {len(body)}\r\n\r\n"
    (place / "warc").mkdir()
    (place / "warc" / "a.warc").write_bytes((head.encode() + body + b"\r\n\r\n") * 3)
