"""Convert a model to another format: Hugging Face folder, Meta folder, or GGUF file for llama.cpp."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import tyro

__all__ = ["Args", "run"]


@dataclass(frozen=True)
class Args:
    """What the command line said."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """A Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    destination: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder or file to write; nothing may be there."""
    to: Literal["hf", "meta", "gguf"]
    """The format of DST."""
    tokenizer: str | None = None
    """A tokenizer.json, .model or .bin, or its folder, if it does not lie with SRC."""
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"] | None = None
    """Of the matrices; q8_0, q4_0 and q4_1 for gguf alone. As stored unless given; quantized ones become f32."""
    calibrate: str | None = None
    """With q4_1: a text like those that the model will read, by which its numbers are chosen."""
    max_shard_size: str = "5GB"
    """Of one file of a Hugging Face folder."""


def run(args: Args) -> int:
    """Convert, with a progress line on standard error."""
    from minillama.convert import convert
    from minillama.inference.calibrate import by_text

    done = 0

    def progress(name: str, total: int) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r\x1b[K{done}/{total} {name}", end="", file=sys.stderr, flush=True)
        elif done * 4 // total > (done - 1) * 4 // total:
            print(f"{done}/{total} tensors", file=sys.stderr, flush=True)

    path = convert(
        args.source,
        args.destination,
        args.to,
        args.dtype,
        args.tokenizer,
        args.max_shard_size,
        progress,
        by_text(args.calibrate, partial(print, file=sys.stderr, flush=True)) if args.calibrate else None,
    )
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    end = "\r\x1b[K" if sys.stderr.isatty() else ""
    print(f"{end}wrote {path}: {done} tensors, {size / 1e6:,.1f} MB in {len(files)} files", file=sys.stderr)
    return 0
