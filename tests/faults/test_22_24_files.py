"""Rows 22 to 24 of the fault table."""

from __future__ import annotations

import re
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minillama import Decoder, InputError, ModelConfig, Tokenizer
from minillama.commands.cli import main
from minillama.convert import convert
from minillama.formats.gguf_header import read_header as read_gguf
from minillama.formats.open import open_model
from minillama.tokenizer import byte_tokenizer
from minillama.tokenizer.chat import ChatTemplate

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=257, max_seq_len=32)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A GGUF file."""
    place = tmp_path_factory.mktemp("whole")
    Decoder(CONFIG).save_pretrained(place / "hf")
    byte_tokenizer().save(place / "hf")
    convert(place / "hf", place / "a.gguf", "gguf", "f32")
    return (place / "a.gguf").read_bytes()


# 22: GGUF


def gguf(kv: bytes = b"", tensors: bytes = b"", counts: tuple[int, int] = (0, 0), rest: bytes = b"\0" * 64) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + kv + tensors + rest


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


@pytest.mark.parametrize(
    "data",
    [
        gguf(counts=(2**60, 0)),
        gguf(counts=(0, 2**60)),
        gguf(text("a") + struct.pack("<IIQ", 9, 8, 2**40), counts=(0, 1)),
        gguf(text("a") + struct.pack("<IIQ", 9, 4, 2**40), counts=(0, 1)),
        gguf(text("a") + struct.pack("<IIQ", 9, 99, 1), counts=(0, 1)),
        gguf(text("a") + struct.pack("<IIQ", 9, 9, 1) * 50, counts=(0, 1)),
        gguf(text("a") + struct.pack("<I", 77), counts=(0, 1)),
        gguf(struct.pack("<Q", 2**63), counts=(0, 1)),
        gguf(tensors=text("t") + struct.pack("<IQQIQ", 2, 2**33, 2**33, 0, 0), counts=(1, 0)),
        gguf(tensors=text("t") + struct.pack("<IQQIQ", 2, 2**63, 2, 0, 0), counts=(1, 0)),
        gguf(tensors=text("t") + struct.pack("<IQQIQ", 2, 0, 4, 0, 0), counts=(1, 0)),
        gguf(tensors=text("t") + struct.pack("<I", 2**31), counts=(1, 0)),
        gguf(tensors=text("t") + struct.pack("<IQIQ", 1, 4, 99, 0), counts=(1, 0)),
        gguf(tensors=text("t") + struct.pack("<IQIQ", 1, 33, 2, 0), counts=(1, 0)),
        gguf(tensors=(text("t") + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2, counts=(2, 0)),
        gguf(
            tensors=text("t") + struct.pack("<IQIQ", 1, 4, 0, 0) + text("u") + struct.pack("<IQIQ", 1, 4, 0, 0),
            counts=(2, 0),
        ),
        gguf(text("general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)),
        b"GGUF\3\0",
        b"GGUF" + struct.pack("<I", 1),
    ],
)
def test_22_forged_gguf(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(InputError, match=re.escape(str(path))):
        read_gguf(path)
    assert time.perf_counter() - began < 1 and tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize("key", [
    "general.architecture", "llama.attention.layer_norm_rms_epsilon", "llama.embedding_length", "split.count",
    "llama.rope.scaling.type", "tokenizer.ggml.merges", "tokenizer.ggml.pre", "tokenizer.ggml.model",
    "tokenizer.ggml.token_type", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.tokens", "tokenizer.chat_template",
    "tokenizer.ggml.eos_token_id", "llama.rope.freq_base",
])  # fmt: skip
@pytest.mark.parametrize("value", ["abc", 3, [1, 2], 1.5], ids=str)
def test_22_wrong_types_of_values(key: str, value: object, whole: bytes, tmp_path: Path) -> None:
    import gguf as package

    (tmp_path / "a.gguf").write_bytes(whole)
    header = read_gguf(tmp_path / "a.gguf")
    writer = package.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.kv_data[0].clear()
    for name, old in (header.metadata | {key: value}).items():
        new = old.tolist() if isinstance(old, np.ndarray) else old
        writer.add_key_value(name, new, package.GGUFValueType.get_type(new))
    for name, info in header.tensors.items():
        writer.add_tensor(name, np.memmap(tmp_path / "a.gguf", np.float32, "r", info.start, info.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for load in (open_model, Tokenizer.load):
        try:
            load(tmp_path / "b.gguf")
        except InputError as error:
            assert "b.gguf" in str(error)


# 23: chat templates

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "{{ 'A' * 10**9 }}",
        "{{ 'A' * 10**7 * 3 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 2 ** (2 ** 40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
        "{{ unclosed",
    ],
)
def test_23_chat_templates_that_break_out_or_do_not_end(template: str) -> None:
    began = time.perf_counter()
    with pytest.raises(InputError, match="chat template"):
        ChatTemplate(template, seconds=1.0)(MESSAGES)
    assert time.perf_counter() - began < 20
    chat = ChatTemplate("{{ messages[0].content }}")
    assert chat(MESSAGES) == "hi"
    chat.close()


def test_23_the_next_conversation_is_rendered_after_a_stop() -> None:
    chat = ChatTemplate(
        "{% if go %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok",
        seconds=1.0,
    )
    with pytest.raises(InputError, match="does not end"):
        chat(MESSAGES, go=True)
    assert chat(MESSAGES, go=False) == "ok"


# 24: tokenizer.json


@pytest.mark.parametrize("data", [b"{}", b"", b'{"version": "1.0", "mod', b"[]", b"\xff\xfe", b"null"])
def test_24_damaged_tokenizers(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.bin"])
@pytest.mark.parametrize(
    "data", [b"", b"\x0a", b"garbage", b"IQ== 1\n", b"IQ== 0\nIg== 7\n", b"\x07\0\0\0\1\0\0\0\xff\0\0\0"]
)
def test_24_damaged_vocabularies(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=name):
        Tokenizer.load(tmp_path)


def test_a_strangers_text_does_not_reach_the_terminal_raw(
    whole: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = struct.pack("<Q", 2) + b"hf"  # general.name, now an escape that resets the terminal
    assert name in whole
    (tmp_path / "a.gguf").write_bytes(whole.replace(name, struct.pack("<Q", 2) + b"\x1bc"))
    assert main(["inspect", str(tmp_path / "a.gguf")]) == 0
    out = capsys.readouterr().out
    assert r"\x1bc" in out and "\x1b" not in out
