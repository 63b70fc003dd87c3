"""Model conversion: to a Hugging Face folder, a Meta folder, or a GGUF file for llama.cpp."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro

from minillama.commands.progress import Progress
from minillama.errors import InputError


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Output folder or file; it must not exist."""
    to: Literal["hf", "meta", "gguf"] | None = None
    """The format of DST, gguf unless given where it ends in .gguf."""
    tokenizer: str | None = None
    """A tokenizer.json, .model or .bin, or its folder, if it is not in SRC."""
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] | None = None
    """Matrix dtype; q8_0, q4_0 and q4_1 for gguf only. As stored unless given; quantized tensors become f32."""
    calibrate: str | None = None
    """With q4_1: calibration text, like the later input, from which the importance matrix is measured."""
    merge: str | None = None
    """Adapter folder (PEFT), merged into the weights in float32; quantized weights are dequantized before."""
    max_shard_size: str = "5GB"
    """Largest file of a Hugging Face folder."""


def run(args: Args) -> int:
    """Convert, with a progress line on standard error."""
    from minillama.convert import convert
    from minillama.formats.open import open_model
    from minillama.inference.calibrate import by_text

    def advance(name: str, total: int) -> None:
        progress.total = total
        progress.advance(1)

    to = args.to or ("gguf" if args.destination.lower().endswith(".gguf") else None)
    if to is None:
        found = f"DST {args.destination}"
        raise InputError("the format of the output is not given", where="--to", found=found, fix="add --to hf or meta")
    calibration = by_text(args.calibrate, partial(print, file=sys.stderr, flush=True)) if args.calibrate else None
    options = (args.dtype, args.tokenizer, args.max_shard_size)
    with Progress("tensors", 0) as progress:
        path = convert(args.source, args.destination, to, *options, advance, calibration, args.merge)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    written = f"{size / 1e6:,.1f} MB in {len(files)} file{'s' * (len(files) > 1)}"
    print(f"wrote {path}: {progress.done} tensors, {written}", file=sys.stderr)
    if to == "gguf" and (window := open_model(path).config.switches().get("sliding_window")):
        print(f"llama.cpp ignores the sliding window: beyond {window} tokens it attends to all", file=sys.stderr)
    return 0
