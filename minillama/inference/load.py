"""Model loading for inference, shared by the commands, and the reading of their input texts."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from minillama.data.reading import Document, Record, from_record, holds_records, read_file, read_lines, read_records
from minillama.data.skipped import BadText, Remark
from minillama.errors import InputError
from minillama.files import stamp

if TYPE_CHECKING:
    import torch

    from minillama.formats.model_file import ModelFile
    from minillama.inference.chat import Prompt
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

T = TypeVar("T")
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
    adapter: tuple[str, ...] = ()
    """Adapter folder (PEFT), DIR or NAME=DIR. One is merged into float weights, and stays beside quantized ones. Of
    several, which `generate` alone takes, each completes every prompt, in JSON lines that name it."""

    @property
    def files(self) -> str:
        """Digest of the names, sizes and times of the files of model, tokenizer and adapters."""
        return stamp([Path(self.model), *([Path(self.tokenizer)] if self.tokenizer else []), *self.adapter_paths])

    @property
    def adapter_paths(self) -> list[Path]:
        """Paths of the adapters, given as PATH or NAME=PATH."""
        return [*_by_name(self.adapter).values()]

    def load(
        self,
        quantize: Quantize = "none",
        compiles: bool = False,
        several: bool = False,
        scores: bool = False,
        generates: bool = False,
    ) -> tuple[Decoder, Tokenizer]:
        """Model, as by `load_model`, and its tokenizer.

        Args:
            quantize: see `load_model`.
            compiles: see `load_model`.
            several: whether there may be several adapters.
            scores: see `load_model`.
            generates: see `load_model`.
        """
        from minillama.device import keep_freed_pages
        from minillama.formats import peft
        from minillama.formats.open import open_model
        from minillama.tokenizer import Tokenizer

        keep_freed_pages()
        opened, adapters = open_model(self.model), _by_name(self.adapter)
        if len(adapters) > 1 and not several:
            raise InputError("one adapter at a time", where="--adapter", found=", ".join(adapters), fix="give one")
        readers = [peft.with_files(opened, folder) for folder in adapters.values()] or [opened]
        paths: list[str | Path] = [self.tokenizer] if self.tokenizer else [r.tokenizer_path() for r in readers]
        tokenizer, *others = map(Tokenizer.load, dict.fromkeys(paths))
        if any((o.fingerprint, o.chat_template) != (tokenizer.fingerprint, tokenizer.chat_template) for o in others):
            what, fix = "the adapters have different tokenizers or chat templates", "ask them one at a time"
            raise InputError(what, where="--adapter", found=", ".join(adapters), fix=f"{fix}, or give --tokenizer")
        how = (quantize, compiles, adapters, scores, generates)
        return load_model(readers[0], self.dtype, self.device, *how), tokenizer


def _by_name(adapters: Sequence[str]) -> dict[str, Path]:
    """Adapter folders by name; that of the folder unless given as NAME=DIR."""
    found: dict[str, Path] = {}
    for word in adapters:
        name, separator, folder = word.partition("=")
        if not separator or Path(word).exists():
            name, folder = re.sub(r"[^A-Za-z0-9_-]", "_", Path(word).resolve().name), word
        if name in found:
            raise InputError("two adapters of one name", where="--adapter", found=name, fix="give NAME=DIR")
        found[name] = Path(folder)
    return found


def load_model(
    opened: ModelFile,
    dtype: DType,
    device: str,
    quantize: Quantize = "none",
    compiles: bool = False,
    adapters: Mapping[str, Path] | None = None,
    scores: bool = False,
    generates: bool = False,
) -> Decoder:
    """Model ready to decode, its linear layers fused unless it has adapters beside them.

    Args:
        opened: the model's file or folder.
        dtype: of the weights; auto: as `decoding_dtype` chooses.
        device: as `choose_device` takes it.
        quantize: int8 or int4 weights of the linear layers, see `quantized`; auto: as they are stored, if
            `stored_kind` says so.
        compiles: use the C++ step where it supports the model and a compiler is there, compiled once; on a
            CUDA device the CUDA graph.
        adapters: their folders by name. One is merged into float weights; several, and those of quantized weights, stay
            beside them, the first one active.
        scores: many tokens are read, and none or few generated: linear layers in float32 on a CPU with AMX are
            those of `native/linear.py`, where it can be compiled.
        generates: it does nothing but generate, so that the C++ step reads all tokens, and bfloat16 weights stay as
            they are stored where the processor emulates it: the step multiplies them in float32.
    """
    from minillama.formats import peft
    from minillama.inference.quantize import quantized
    from minillama.model import Decoder

    on, kind, weights = resolved(opened, dtype, device, quantize)
    folders = dict(adapters or {})
    if weights == "none" and len(folders) == 1:
        _, folder = folders.popitem()
        opened = peft.merged(opened, peft.read(folder, opened.config))
    if weights == "none":
        keeps = generates and compiles and not folders and dtype == "auto"
        model = Decoder.from_pretrained(opened, opened.default_dtype(on) if keeps else kind, on)
        model = model if folders else model.fuse()
    else:
        model = quantized(opened, weights, kind, on, fuses=not folders)
    if folders:
        _attach(model, opened, folders)
    if compiles:
        attach_fast_step(model)
        if model.dtype != kind and not getattr(model.step, "reads_prompts", False):
            model.to(kind)
            attach_fast_step(model)
    if scores:
        from minillama.native.linear import use_split_linears

        use_split_linears(model, partial(print, file=sys.stderr))
    return model


def resolved(
    opened: ModelFile, dtype: DType, device: str, quantize: Quantize
) -> tuple[torch.device, torch.dtype, Literal["none", "int8", "int4"]]:
    """Device, weight dtype and quantization that `load_model` takes for these arguments."""
    import torch

    from minillama.device import choose_device, decoding_dtype
    from minillama.inference.quantize import stored_kind

    on = choose_device(device, "--device")
    kind = decoding_dtype(opened.default_dtype(on), on) if dtype == "auto" else getattr(torch, dtype)
    return on, kind, stored_kind(opened, on) if quantize == "auto" else quantize


def _attach(model: Decoder, opened: ModelFile, folders: Mapping[str, Path]) -> None:
    """Attach adapters for decoding, the first one active."""
    from minillama.model.lora import activate, load_adapter, lora_layers

    for name, folder in folders.items():
        load_adapter(model, folder, name, opened)
    for layer in lora_layers(model).values():
        layer.fix_gains()
    activate(model, next(iter(folders)))


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


def read_prompts(given: Sequence[str], file: Path | None) -> Sequence[Prompt]:
    """Prompts of the command line, or of a file, as by `read_texts`; records may have messages, too.

    They stand in `messages`, or in `prompt` in place of a text.

    Raises:
        InputError: see `read_texts`.
    """
    from minillama.inference.chat import is_messages

    if given or file is None or not holds_records(file):
        return read_texts(given, file, "prompt")
    found: list[Prompt] = []
    for item in read_records(file):
        if isinstance(item, Record):
            messages: Any = item.value.get("prompt", item.value.get("messages"))
            if is_messages(messages):
                found.append(messages)
            else:
                found += _texts(from_record(item.value, "prompt", item.where))
        else:
            found += _texts(item)
    return _some(found, "prompt", file)


def read_texts(given: Sequence[str], file: Path | None, field: str) -> Sequence[str]:
    """Input texts of the command line, or of a file.

    Args:
        given: of the option --FIELD.
        file: of the option --FIELDs: JSONL or JSON with that field, or plain text with one per line; -: standard
            input, one per line.
        field: name of the texts.

    Raises:
        InputError: both or neither is given, or the file does not hold what it should.
    """
    if bool(given) == (file is not None):
        raise InputError(f"give either --{field} or --{field}s", where="command line")
    if file is None:
        return given
    if str(file) == "-":
        return _some([line for line in sys.stdin.read().split("\n") if line], field, file)
    read = read_file if holds_records(file) else read_lines
    return _some([text for item in read(file, field) for text in _texts(item)], field, file)


def _texts(item: Document | BadText | Remark) -> list[str]:
    """The text of a document, if it has one."""
    if isinstance(item, BadText):
        raise InputError(item.what, where=item.where, found=item.found, expected=item.expected)
    return [item.text] if isinstance(item, Document) and item.text.strip() else []


def _some(found: list[T], field: str, file: Path) -> list[T]:
    if not found:
        raise InputError(f"the file holds no {field}", where=file)
    return found
