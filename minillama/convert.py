"""Checkpoint conversion between formats."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar, cast, get_args

from minillama.errors import InputError
from minillama.files import refuse_url, replace_file, replace_folder
from minillama.formats import generation_config, gguf, hf, meta, model_file, peft
from minillama.formats.model_file import LazyTensors, ModelFile
from minillama.formats.open import open_model
from minillama.layers.int4 import Int4
from minillama.tokenizer import Tokenizer, sentencepiece, tiktoken
from minillama.tokenizer.gguf_export import vocabulary

Target = Literal["hf", "meta", "gguf"]
FLOATS = {name.lower(): dtype for name, dtype in model_file.FLOATS.items()}
T = TypeVar("T")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    to: Target,
    dtype: gguf.DType | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[str, int], None] = lambda name, total: None,
    calibrate: Callable[[ModelFile, Tokenizer], Mapping[str, Int4]] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Path:
    """Convert a model to another format, atomically: the output is complete or absent.

    Args:
        source: anything that `open_model` opens.
        destination: a folder (hf, meta) or a file (gguf) that does not exist yet.
        dtype: of the tensors (norms in GGUF stay f32); q8_0, q4_0 and q4_1 in GGUF only. Default: as the matrices are
            stored; quantized ones become f32.
        tokenizer: its file or folder, if it is not beside the model.
        max_shard_size: per file of a Hugging Face folder.
        progress: called with each tensor's name and their number.
        calibrate: for q4_1, quantization by importance matrix (`inference.calibrate.by_text`); default: rounding only.
        adapter: PEFT's folder of an adapter, merged into the weights in float32 before they are cast once.

    Raises:
        InputError: the destination exists; the format cannot express the shape, the dtype or the
            tokenizer; calibration for another dtype; an adapter of another model.
    """
    _check(to, dtype, calibrate)
    for path in (source, destination, tokenizer or "", adapter or ""):
        refuse_url(path)
    target = Path(destination)
    if target.exists():
        raise InputError("the destination exists", where=target, fix="choose another, or remove it")
    opened = open_model(source)
    if adapter is not None:
        opened = peft.merged(opened, peft.read(adapter, opened.config))
    config, total = opened.config, len(opened.config.tensors())
    tokenizer_path = Path(tokenizer) if tokenizer is not None else opened.tokenizer
    vocab = Tokenizer.load(tokenizer_path) if tokenizer_path is not None else None
    if vocab is not None:
        vocab.check_fits(config.vocab_size, tokenizer_path, spares_special=to == "hf")
    stored = next((name for name, kind in FLOATS.items() if kind == opened.default_dtype("meta")), "f32")

    tensors = _reported(opened.tensors, progress, total)
    if to == "gguf":
        if vocab is None:
            what = "a GGUF file includes a tokenizer, and none was found beside the model"
            raise InputError(what, where=opened.path, fix="name one with --tokenizer FILE")
        kind, name = dtype or cast(gguf.DType, stored), opened.path.name
        keys = vocabulary(vocab, config.vocab_size, opened.stop_ids) | generation_config.gguf_keys(opened.sampling)
        int4 = _reported(opened.int4 if calibrate is None else calibrate(opened, vocab), progress, total)
        return replace_file(target, lambda path: gguf.write(path, config, tensors, keys, kind, name, int4))

    def write(folder: Path) -> None:
        floats = FLOATS[dtype or stored]
        if to == "hf":
            hf.write(folder, config, tensors, floats, hf.parse_size(max_shard_size))
            if vocab is not None:
                vocab.save(folder, config.max_seq_len)
        else:
            _write_meta_tokenizer(folder / "tokenizer.model", vocab, tokenizer_path)
            if vocab is not None:  # not Meta's, and read by `Tokenizer.load`, as generation_config.json by `open_model`
                vocab.save_settings(folder, config.max_seq_len)
            meta.write(folder, config, tensors, floats)
        _write_generation(folder, opened, vocab)

    return replace_folder(target, write)


def _reported(values: Mapping[str, T], progress: Callable[[str, int], None], total: int) -> Mapping[str, T]:
    """The same values, each reported when it is read."""

    def read(name: str) -> T:
        progress(name, total)
        return values[name]

    return LazyTensors(values, read)


def _check(to: str, dtype: str | None, calibrate: object) -> None:
    if to not in get_args(Target):
        raise InputError("unknown format", where="--to", found=to, expected=", ".join(get_args(Target)))
    dtypes = gguf.DTYPES if to == "gguf" else FLOATS
    if dtype is not None and dtype not in dtypes:
        raise InputError("dtype unsupported by this format", where="--dtype", found=dtype, expected=", ".join(dtypes))
    if calibrate is not None and dtype != "q4_1":
        what, fix = "calibration applies to q4_1 only", "add --dtype q4_1, or leave out --calibrate"
        raise InputError(what, where="--dtype", found=dtype, expected="q4_1", fix=fix)


def _write_generation(folder: Path, opened: ModelFile, vocab: Tokenizer | None) -> None:
    """Write the tokens that end a text, the tokenizer's own first, and the sampling defaults."""
    own = [vocab.eos_id, *sorted(vocab.stop_ids)] if vocab is not None else []
    bos = vocab.bos_id if vocab is not None and vocab.add_bos else None
    stops = [*own, *sorted(opened.stop_ids)]
    if stops or opened.sampling:
        generation_config.write(folder, bos_id=bos, eos_ids=stops, sampling=opened.sampling)


def _write_meta_tokenizer(file: Path, vocab: Tokenizer | None, tokenizer_path: Path | None) -> None:
    if vocab is None or tokenizer_path is None:
        return
    original = tokenizer_path / file.name if tokenizer_path.is_dir() else tokenizer_path
    is_there = original.name == file.name and original.is_file()
    if is_there and Tokenizer.load(original).fingerprint == vocab.fingerprint:
        shutil.copyfile(original, file)
        return
    pieces = vocab.pieces
    if pieces is not None:
        file.write_bytes(sentencepiece.serialize(pieces, vocab.bos_id, vocab.eos_id))
    else:
        tiktoken.write(file, vocab.backend)
