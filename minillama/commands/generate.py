"""Continue a prompt: the completion alone goes to standard output. Several, or a file: a JSON line each, in order."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minillama.config.loader import check
from minillama.errors import InputError
from minillama.inference.load import DType, Quantize, load_for_decoding, load_model, read_texts
from minillama.inference.sampling import Sampling

if TYPE_CHECKING:
    import torch

    from minillama.inference.engine import Decoding
    from minillama.inference.speculative import Speculation

__all__ = ["Args", "run"]


@dataclass(frozen=True)
class Args:
    """What the command line said."""

    model: str
    """A Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    prompt: tuple[str, ...] = ()
    """One or more texts to continue; several are read in one batch."""
    prompts: Path | None = None
    """A file of prompts: JSONL with a field `prompt`, or plain text with one a line."""
    tokenizer: str | None = None
    """A tokenizer.json, .model or .bin, or its folder, if it does not lie with the model."""
    max_new_tokens: int = field(default=128, metadata={"min": 1})
    """Tokens a prompt at most."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not written."""
    ignore_eos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Go on after the end-of-text token."""
    dtype: DType = "auto"
    """Of the weights; auto: as they are stored, quantized ones and what the CPU does not multiply as float32."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""
    speculate: tyro.conf.FlagCreatePairsOff[bool] = False
    """One prompt: guess tokens from what followed the same words before, and check them in one pass."""
    draft: str | None = None
    """One prompt: let this smaller model of the same vocabulary guess the tokens."""
    draft_tokens: int = field(default=8, metadata={"min": 1})
    """Tokens to guess before each check at most."""
    quantize: Quantize = "auto"
    """Weights of one byte (a scale a channel) or half a byte (a scale and an offset for 32 inputs); auto, on a CPU:
    int4 where the file has Q4_0 or Q4_1, whose numbers are kept, int8 where it has Q8_0, none otherwise."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Prompts at once; the next one enters when one has ended."""
    compile: tyro.conf.FlagCreatePairsOff[bool] = True
    """Decode by the step in C++ where a compiler is there, which is compiled once, in some seconds; on a CUDA device by
    the recorded one."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Of keys and values; auto: that of the products."""
    window: int = field(default=0, metadata={"min": 0})
    """See only the last N tokens; 0 sees all."""
    sinks: int = field(default=4, metadata={"min": 0})
    """With --window: the first N tokens are seen as well."""


def run(args: Args) -> int:
    """Stream one completion, or write several as JSONL, one line per prompt in order."""
    check(args)
    prompts = read_texts(args.prompt, args.prompts, "prompt")
    speculates = args.speculate or args.draft is not None
    if args.speculate and args.draft is not None:
        raise InputError("give either --speculate or --draft: they guess in two ways", where="command line")
    if speculates and len(prompts) > 1:
        raise InputError(
            "speculation takes one prompt",
            where="command line",
            found=f"{len(prompts)} prompts",
            fix="leave out --speculate and --draft, or give the prompts one by one",
        )
    if speculates and args.window:
        raise InputError("speculation sees the whole text", where="--window", fix="leave out one of the two")
    from minillama.inference.generate import generate, stream

    model, tokenizer = load_for_decoding(
        args.model, args.tokenizer, args.dtype, args.device, args.quantize, args.compile and not speculates
    )
    options: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "sampling": args.sampling,
        "stop": args.stop,
        "ignore_eos": args.ignore_eos,
        "decoding": _speculation(args) if speculates else _batches(args),
    }
    if len(prompts) == 1 and args.prompts is None:
        for piece in stream(model, tokenizer, prompts[0], **options):
            sys.stdout.write(piece.text)
            sys.stdout.flush()
            _explain(piece.reason, 0, model.config.max_seq_len)
        if sys.stdout.isatty():
            sys.stdout.write("\n")  # for the prompt that follows; a file gets the completion alone
            sys.stdout.flush()
    else:
        for i, completion in enumerate(generate(model, tokenizer, prompts, **options)):
            line = {"prompt": prompts[i], "completion": completion.text, "finish_reason": completion.reason}
            print(json.dumps(line, ensure_ascii=False))
            _explain(completion.reason, i, model.config.max_seq_len)
    if speculates:
        print(f"speculation: {options['decoding'].acceptance}", file=sys.stderr)
    return 0


def _batches(args: Args) -> Decoding:
    from minillama.inference.engine import decode

    seen = args.window or None
    return partial(decode, batch_size=args.batch_size, cache_dtype=_cache_dtype(args), window=seen, sinks=args.sinks)


def _speculation(args: Args) -> Speculation:
    from minillama.formats.open import open_model
    from minillama.inference.speculative import Speculation

    draft = None
    if args.draft is not None:
        draft = load_model(open_model(args.draft), args.dtype, args.device, args.quantize)
    return Speculation(draft, args.draft_tokens, cache_dtype=_cache_dtype(args))


def _cache_dtype(args: Args) -> torch.dtype | None:
    import torch

    return None if args.cache_dtype == "auto" else getattr(torch, args.cache_dtype)


def _explain(reason: str | None, row: int, context: int) -> None:
    if reason == "context":
        print(f"prompt {row + 1}: stopped, the model's context of {context} tokens is full", file=sys.stderr)
