"""Int8 and int4 quantization for decoding: linear layers that take it, loading, and the importance matrix.

An error e_i of the weight of input x_i changes the output by e_i x_i, so that over a text its square counts with the
mean square of x_i. Some inputs are a thousand times as large as others, and a group of weights has one scale and zero
point, chosen for the large ones (the activation-aware scales of AWQ, Lin et al. 2023, arXiv 2306.00978, §3, have the
same motivation). GPTQ's error compensation (Frantar et al. 2022, arXiv 2210.17323) on top of it made single layers
better and the model worse, see benchmarks/README.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from minillama.config.arguments import checked
from minillama.errors import InputError
from minillama.files import replace_file
from minillama.formats import gguf
from minillama.formats.model_file import ModelFile
from minillama.layers.int4 import GROUP, Int4
from minillama.layers.quantized_linear import Int4Linear, Int8Linear, Quantization, takes_int4
from minillama.model import Decoder
from minillama.model.linears import linears, parts, refuse_others
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.gguf_export import vocabulary

TOKENS = 4096  # per forward pass


@checked
@torch.no_grad()
def quantize(model: Decoder, kind: Quantization, group: int = GROUP, calibration: Tensor | None = None) -> Decoder:
    """Quantization of a model's linear layers in place, irreversible.

    The head takes int8 in both kinds, a copy where it is tied: its errors are the largest in the logits, which is
    also why GGUF's 4-bit files keep more bits there. Embeddings and norms stay as they are, and so does a layer
    whose shape the kernels do not support.

    Args:
        model: a decoder, best after `fuse`.
        kind: int8, one scale per output channel, or int4, one scale and zero point per group of inputs.
        group: of int4: 32, 64 or 128.
        calibration: of int4: (N, T) ids of a text, whose `importance_matrix` weights the errors;
            without them only the weights are used.

    Raises:
        InputError: int4 elsewhere than on a CPU, calibration of another kind, or linear layers that are more than
            `nn.Linear`, such as an adapter's.
    """
    if calibration is not None and kind != "int4":
        raise InputError("int4 alone is calibrated", where="calibration", found=kind)
    if kind == "none":
        return model
    _check(kind, model.device)
    if calibration is not None and not calibration.numel():
        raise InputError("no text to calibrate by", where="calibration", found=tuple(calibration.shape))
    refuse_others(model, model.config.tensors(), "quantized", (nn.Linear, Int8Linear, Int4Linear))
    counts = {} if calibration is None else importance_matrix(model, calibration)
    model.step = None  # it has the old weights
    for name in list(linears(model)):  # names alone, so that each layer is freed when it is replaced
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear):
            model.set_submodule(name, _quantized(linear, kind, group, counts.get(name)))
    return quantize_head(model)


@torch.no_grad()
def quantized(
    opened: ModelFile,
    kind: Literal["int8", "int4"],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    fuses: bool = True,
    dropout: float = 0.0,
    head: bool = True,
) -> Decoder:
    """Quantized loading: `quantize` of a fused model, one linear layer at a time from a file.

    Matrices that the file has in int4 (`ModelFile.int4`) keep their values, scales and zero points rounded to bfloat16;
    int4 of others is searched in the stored dtype.

    Args:
        opened: the model.
        kind: of its linear layers.
        dtype: of the inputs, and of embeddings and norms; `ModelFile.default_dtype` unless given.
        device: where to put it.
        fuses: whether it is fused; adapters need one that is not.
        dropout: of the decoder, for training.
        head: whether the head is quantized too.

    Raises:
        InputError: int4 elsewhere than on a CPU, or what reading tensors raises.
    """
    _check(kind, torch.device(device))
    dtype = dtype or opened.default_dtype(device)
    with torch.device("meta"):
        model = Decoder(opened.config, dropout)
    for name in list(linears(model.fuse() if fuses else model)):
        linear, names = cast(nn.Linear, model.get_submodule(name)), parts(name)
        bias = _bias(opened, names, dtype)
        if kind == "int4" and takes_int4(linear, GROUP):
            numbers = Int4.stacked(_numbers(opened, f"{part}.weight") for part in names)
            model.set_submodule(name, Int4Linear(numbers, bias, dtype))
        else:
            weight = torch.cat([opened.tensors[f"{part}.weight"] for part in names])
            linear.weight = nn.Parameter(weight.to(device=device, dtype=dtype), requires_grad=False)
            linear.bias = cast(Any, bias)
            model.set_submodule(name, _quantized(linear, "int8", GROUP))
    model.fill(opened, dtype, device)
    return quantize_head(model) if head else model


def _numbers(opened: ModelFile, name: str) -> Int4:
    return opened.int4[name] if name in opened.int4 else Int4.of(opened.tensors[name])


def _bias(opened: ModelFile, names: Sequence[str], dtype: torch.dtype) -> nn.Parameter | None:
    found = [opened.tensors[f"{name}.bias"] for name in names if f"{name}.bias" in opened.tensors]
    return nn.Parameter(torch.cat(found).to(dtype), requires_grad=False) if found else None


def stored_kind(opened: ModelFile, device: torch.device) -> Quantization:
    """Stored quantization of a file's block weights, if `quantized` supports it on this device.

    int4 for Q4_0 and Q4_1, int8 for Q8_0, both on a CPU only. Matrices whose rows fill no blocks do not matter.
    """
    blocks = (item for name, item in opened.stored.items() if name.startswith("blk.") and len(item.shape) > 1)
    kinds = {item.dtype for item in blocks if item.shape[-1] % GROUP == 0}
    if device.type != "cpu" or not kinds:
        return "none"
    return "int4" if kinds <= {"Q4_0", "Q4_1"} else "int8" if kinds == {"Q8_0"} else "none"


def _check(kind: Quantization, device: torch.device) -> None:
    if kind == "int4" and device.type != "cpu":
        raise InputError("int4 products run on a CPU alone", where="--quantize", found="int4", fix="take int8")


def _quantized(linear: nn.Linear, kind: Quantization, group: int, importance: Tensor | None = None) -> nn.Module:
    if kind == "int4" and takes_int4(linear, group):
        return Int4Linear.of(linear, group, importance)
    return Int8Linear(linear) if linear.in_features % 32 == 0 else linear


@torch.no_grad()
def quantize_head(model: Decoder) -> Decoder:
    """Int8 quantization of the head in place, of a copy where it is tied to the embedding."""
    head = nn.Linear(model.config.dim, model.config.vocab_size, bias=False, device="meta")
    head.weight = nn.Parameter(model.output_weight.detach(), requires_grad=False)
    model.lm_head = cast(Any, _quantized(head, "int8", GROUP))
    return model


@torch.no_grad()
def importance_matrix(model: Decoder, ids: Tensor) -> dict[str, Tensor]:
    """Importance matrix: mean squared activation (I,) per input channel of each linear layer, by name, float32.

    Args:
        model: the decoder, before quantization; faster after `fuse`.
        ids: (N, T) of the text.
    """
    found: dict[str, Tensor] = {}

    def called(name: str, linear: nn.Module, args: tuple[Tensor]) -> None:
        squares = args[0].flatten(0, -2).float().square().sum(0) / ids.numel()
        found[name] = found[name] + squares if name in found else squares

    handles = [part.register_forward_pre_hook(partial(called, name)) for name, part in linears(model).items()]
    try:
        for part in ids.split(max(1, TOKENS // ids.shape[1])):
            model.hidden(part)
    finally:
        for handle in handles:
            handle.remove()
    return found


def int4_numbers(model: Decoder) -> dict[str, Int4]:
    """Int4 weights by parameter name, those of fused layers split."""
    shapes = model.config.tensors()
    found: dict[str, Int4] = {}
    for name, layer in linears(model).items():
        if isinstance(layer, Int4Linear):
            found |= {weight: layer.numbers.rows(*span) for weight, span in _spans(name, shapes)}
    return found


def plain_tensors(model: Decoder) -> dict[str, Tensor]:
    """Parameters outside `int4_numbers` by name, int8 weights dequantized."""
    shapes = model.config.tensors()
    found = {name: tensor for name, tensor in model.state_dict().items() if name in shapes}
    for name, layer in linears(model).items():
        if not isinstance(layer, Int4Linear):
            rows = cast(Any, layer).weight
            found |= {weight: rows[start:end] for weight, (start, end) in _spans(name, shapes)}
    return found if model.config.tie_embeddings else found | {"lm_head.weight": model.output_weight}


def _spans(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and row range of each weight of a linear layer."""
    end = 0
    for part in parts(name):
        start, end = end, end + shapes[f"{part}.weight"][0]
        yield f"{part}.weight", (start, end)


def save_gguf(
    model: Decoder, destination: str | os.PathLike[str], tokenizer: Tokenizer, name: str = "minillama"
) -> Path:
    """GGUF export (q4_1) of a model that `quantize` made int4, with the same values.

    Args:
        model: the decoder, fused or not.
        destination: the file; what is there is replaced.
        tokenizer: goes into it.
        name: `general.name`.

    Raises:
        InputError: the format cannot express the shape or the tokenizer; adapters.
    """
    refuse_others(model, model.config.tensors(), "saved", (nn.Linear, Int8Linear, Int4Linear))
    keys = vocabulary(tokenizer, model.config.vocab_size)
    tensors, numbers = plain_tensors(model), int4_numbers(model)
    return replace_file(
        Path(destination), lambda path: gguf.write(path, model.config, tensors, keys, "q4_1", name, int4=numbers)
    )
