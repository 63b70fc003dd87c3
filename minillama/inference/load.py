"""Model loading for inference, shared by the commands, and the reading of their input texts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minillama.errors import InputError

if TYPE_CHECKING:
    from minillama.formats.model_file import ModelFile
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

DType = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["auto", "none", "int8", "int4"]


@dataclass(frozen=True)
class ModelArgs:
    """Command-line arguments of a model that decodes."""

    model: str
    """A Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    tokenizer: str | None = None
    """A tokenizer.json, .model or .bin, or its folder, if it is not in the model folder."""
    dtype: DType = "auto"
    """Weight dtype; auto: as stored, but float32 for quantized ones and for a type that the CPU does not multiply."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def load(self, quantize: Quantize = "none", compiles: bool = False) -> tuple[Decoder, Tokenizer]:
        """Model, as by `load_model`, and its tokenizer."""
        from minillama.device import keep_freed_pages
        from minillama.formats.open import open_model
        from minillama.tokenizer import Tokenizer

        keep_freed_pages()
        opened = open_model(self.model)
        model = load_model(opened, self.dtype, self.device, quantize, compiles)
        return model, Tokenizer.load(self.tokenizer or opened.tokenizer_path())


def load_model(
    opened: ModelFile, dtype: DType, device: str, quantize: Quantize = "none", compiles: bool = False
) -> Decoder:
    """Model ready to decode, its linear layers fused.

    Args:
        opened: the model's file or folder.
        dtype: of the weights; auto: as `decoding_dtype` chooses.
        device: as `choose_device` takes it.
        quantize: int8 or int4 weights of the linear layers, see `quantized`; auto: as they are stored, if
            `stored_kind` says so.
        compiles: use the C++ step where it supports the model and a compiler is there, compiled once; on a
            CUDA device the CUDA graph.
    """
    import torch

    from minillama.device import choose_device, decoding_dtype
    from minillama.inference.quantize import quantized, stored_kind
    from minillama.model import Decoder

    on = choose_device(device, "--device")
    kind = decoding_dtype(opened.default_dtype(on), on) if dtype == "auto" else getattr(torch, dtype)
    weights = stored_kind(opened, on) if quantize == "auto" else quantize
    if weights == "none":
        model = Decoder.from_pretrained(opened, kind, on).fuse()
    else:
        model = quantized(opened, weights, kind, on)
    if compiles:
        attach_fast_step(model)
    return model


def attach_fast_step(model: Decoder) -> None:
    """Fastest decode step of this machine for a fused model: CUDA graph, C++, or none."""
    from minillama.inference import cuda_graph
    from minillama.native.build import CannotBuild, can_build
    from minillama.native.decode import NativeStep, unsupported

    if cuda_graph.unsupported(model) is None:
        model.step = cuda_graph.GraphStep(model, say=partial(print, file=sys.stderr))
        return
    if unsupported(model) or not can_build():
        return
    try:
        model.step = NativeStep(model, say=partial(print, file=sys.stderr))
    except CannotBuild as error:
        print(f"the decode step was not compiled, decoding goes on without it: {error}", file=sys.stderr)


def read_texts(given: Sequence[str], file: Path | None, field: str) -> Sequence[str]:
    """Input texts of the command line, or of a file.

    Args:
        given: of the option --FIELD.
        file: of the option --FIELDs: JSONL with that field, or plain text with one per line.
        field: name of the texts.

    Raises:
        InputError: both or neither is given, or the file does not hold what it should.
    """
    if bool(given) == (file is not None):
        raise InputError(f"give either --{field} or --{field}s", where="command line")
    if file is None:
        return given
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the {field}s cannot be read", where=file, found=error) from error
    jsonl = file.suffix == ".jsonl"
    texts = [_text(line, f"{file}:{n}", field, jsonl) for n, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise InputError(f"the file holds no {field}", where=file)
    return texts


def _text(line: str, where: str, field: str, jsonl: bool) -> str:
    if not jsonl:
        return line
    try:
        value = json.loads(line)[field]
    except (ValueError, KeyError, TypeError) as error:
        what, expected = f"not a JSON object with a {field}", f'{{"{field}": "..."}}'
        raise InputError(what, where=where, found=line[:80], expected=expected) from error
    if not isinstance(value, str):
        raise InputError(f"the {field} is no text", where=f"{where}, {field}", found=repr(value))
    return value
