"""Rows 13 to 21 and 41 of the fault table: folders from strangers, damaged or forged."""

from __future__ import annotations

import json
import pickle
import re
import stat
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minillama import Decoder, InputError, ModelConfig, Tokenizer
from minillama.commands.cli import main
from minillama.formats import meta
from minillama.formats.open import open_model
from minillama.formats.safetensors_header import read_header
from minillama.tokenizer import byte_tokenizer

CONFIG = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=64, vocab_size=257, max_seq_len=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Decoder(CONFIG).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    byte_tokenizer().save(tmp_path / "model")
    return tmp_path / "model"


def header_of(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


# 13: a .pth is the one archive that is read, and nothing of it is unpacked


def pth(folder: Path, name: str, data: bytes = b"x", compress: int = zipfile.ZIP_STORED, link: bool = False) -> None:
    meta.write(folder, CONFIG, Decoder(CONFIG).state_dict())
    entry = zipfile.ZipInfo(name)
    entry.compress_type = compress
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16 if link else 0
    with zipfile.ZipFile(folder / "consolidated.00.pth", "a") as archive:
        archive.writestr(entry, data)


@pytest.mark.parametrize(
    ("name", "options", "what"),
    [
        ("../evil", {}, "leads out"),
        ("/etc/evil", {}, "leads out"),
        ("a/..\\..\\evil", {}, "leads out"),
        ("C:/evil", {}, "leads out"),
        ("evil", {"link": True}, "is a link"),
        ("bomb", {"data": b"\0" * 10**8, "compress": zipfile.ZIP_DEFLATED}, "is compressed"),
    ],
)
def test_13_archives(name: str, options: dict, what: str, tmp_path: Path) -> None:
    pth(tmp_path / "m", name, **options)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"{what}(?s:.*)(evil|bomb)"):
        open_model(tmp_path / "m")
    assert sorted(tmp_path.rglob("*")) == before


# 14 to 16: safetensors


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, 3000, -1])
def test_14_truncated(keep: int, folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError, match=f"cut short(?s:.*){re.escape(shard.name)}"):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (struct.pack("<Q", 2**40) + b"{}", "the file is damaged, or cut short in its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>login</html>", "a web page"),
        (b"PK\x03\x04 and so on", "zip archive"),
        (pickle.dumps({"a": 1}, protocol=2), "a pickle"),
        (with_header(b"[]", b""), "not a JSON object"),
        (with_header(b"{" * 1000, b""), "not JSON"),
        (with_header(b"[" * 500_000, b""), "not JSON"),
    ],
)
def test_15_impostors(data: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=what):
        read_header(tmp_path / "model.safetensors")


def test_15_a_shape_of_many_axes_costs_nothing(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [9] * 200_000, "data_offsets": [0, 4]}
    (tmp_path / "model.safetensors").write_bytes(with_header({"a": entry}, b"1234"))
    began = time.perf_counter()
    with pytest.raises(InputError, match="damaged"):
        read_header(tmp_path / "model.safetensors")
    assert time.perf_counter() - began < 1


def test_16_duplicate_and_overlapping_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    header, body = header_of(path.read_bytes())
    entry = json.dumps(header["a"])
    path.write_bytes(with_header(f'{{"a": {entry}, "a": {entry}}}'.encode(), body))
    with pytest.raises(InputError, match=r"names a tensor twice(?s:.*)a"):
        read_header(path)
    header["b"]["data_offsets"] = header["a"]["data_offsets"]
    path.write_bytes(with_header(header, body))
    with pytest.raises(InputError, match=r"two tensors overlap(?s:.*), b"):
        read_header(path)
    header["b"]["data_offsets"] = [20, 36]
    path.write_bytes(with_header(header, body + b"1234"))
    with pytest.raises(InputError, match="gap"):
        read_header(path)


# 18 and 19: the index


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "a\\b", "..", "", 7, None])
def test_18_an_index_that_leads_out(name: object, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(table))
    monkeypatch.setattr("minillama.formats.hf.read_header", lambda path: pytest.fail(f"opened {path}"))
    with pytest.raises(InputError, match=r"leads out of its folder(?s:.*)model.norm.weight"):
        Decoder.from_pretrained(folder)


def test_19_missing_and_extra(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    moved = shards[0].rename(folder / "elsewhere")
    with pytest.raises(InputError, match=f"missing: {shards[0].name}"):
        Decoder.from_pretrained(folder)
    moved.rename(shards[0])
    extra = folder / "model-00009-of-00009.safetensors"
    extra.write_bytes(b"")
    with pytest.raises(InputError, match=f"extra: {extra.name}"):
        Decoder.from_pretrained(folder)
    extra.unlink()
    tensors = {name: torch.zeros(shape) for name, shape in CONFIG.tensors().items()}
    tensors["model.layers.1.self_attn.q_proj.bias"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    for shard in (*shards, folder / "model.safetensors.index.json"):
        shard.unlink()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing: model.layers.1.self_attn.q_proj.weight; 1 unknown: .*bias"):
        Decoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "shape", "field"),
    [
        ("model.layers.0.self_attn.k_proj.weight", (32, 32), "n_kv_heads x head_dim, dim"),
        ("model.embed_tokens.weight", (256, 32), "vocab_size, dim"),
        ("model.layers.1.mlp.down_proj.weight", (64, 32), "dim, hidden_dim"),
    ],
)
def test_20_wrong_shape(name: str, shape: tuple[int, int], field: str, tmp_path: Path) -> None:
    Decoder(CONFIG).save_pretrained(tmp_path)
    tensors = {key: torch.zeros(size) for key, size in CONFIG.tensors().items()} | {name: torch.zeros(shape)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as caught:
        Decoder.from_pretrained(tmp_path)
    assert all(part in str(caught.value) for part in (name, str(shape), str(CONFIG.tensors()[name]), field))


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_21_pickles_are_refused_unopened(name: str, folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    mark = folder / "mark"
    (folder / name).write_bytes(pickle.dumps(Evil(str(mark))))
    for path in (folder, folder / name):
        with pytest.raises(InputError, match=f"a pickle(?s:.*){name}"):
            open_model(path)
    assert not mark.exists()


def test_21_a_tensor_without_values_is_refused(tmp_path: Path) -> None:
    tensors = Decoder(CONFIG).state_dict()
    meta.write(tmp_path, CONFIG, tensors)
    file = tmp_path / "consolidated.00.pth"
    torch.save(torch.load(file) | {"norm.weight": torch.empty(CONFIG.dim, device="meta")}, file)
    with pytest.raises(InputError, match=r"norm\.weight"):
        meta.read(tmp_path)


def test_21_metas_files_hold_tensors_or_are_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meta.write(tmp_path, CONFIG, Decoder(CONFIG).state_dict())
    file, mark = tmp_path / "consolidated.00.pth", tmp_path / "mark"
    torch.save({"norm.weight": Evil(str(mark))}, file)
    with pytest.raises(InputError, match="more than tensors"):
        open_model(tmp_path)
    file.write_bytes(pickle.dumps(Evil(str(mark))))
    with pytest.raises(InputError, match="zip archive"):
        open_model(tmp_path)
    assert not mark.exists()
    meta.write(tmp_path, CONFIG, Decoder(CONFIG).state_dict())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(InputError, match=r"unsafely(?s:.*)2\.9\.1"):
        open_model(tmp_path)


# 41: a URL


@pytest.mark.parametrize("url", ["https://huggingface.co/a/b", "http://127.0.0.1/m.gguf", "hf://a/b", "s3://a/b"])
@pytest.mark.parametrize("words", [["generate", "--prompt", "a", "--model"], ["inspect"], ["plan"]])
def test_41_a_url_is_refused(url: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, url]) == 1
    assert "URL" in capsys.readouterr().err
    with pytest.raises(InputError, match="URL"):
        Tokenizer.load(url)


def test_41_convert_takes_no_url_in_any_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source, url = str(folder), "s3://bucket/x"
    for words in ([url, "x"], [source, url], [source, "x", "--tokenizer", url]):
        assert main(["convert", *words, "--to", "hf"]) == 1
        assert "URL" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_strangers_name_does_not_reach_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = {"a\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    (tmp_path / "b.safetensors").write_bytes(with_header(header, b"1234"))
    assert main(["inspect", str(tmp_path / "b.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "[2J" in out and "\x1b" not in out


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "Qwen/Qwen2.5-0.5B"),
        ("generate", "--model", "Qwen/Qwen2.5-0.5B", "--prompt", "a"),
        ("train", "--train.init_from", "Qwen/Qwen2.5-0.5B"),
        ("convert", "Qwen/Qwen2.5-0.5B", "a.gguf", "--to", "gguf"),
    ],
)
def test_41_a_name_of_the_hub_says_the_command_that_downloads_it(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 1
    assert "hf download Qwen/Qwen2.5-0.5B --local-dir Qwen2.5-0.5B" in capsys.readouterr().err
    (tmp_path / "Qwen").mkdir()  # a folder of one's own: a path, misspelled
    assert main(list(words)) == 1
    assert "hf download" not in capsys.readouterr().err
