"""Text generation: the completion alone goes to standard output. Several, or a file: one JSON line per prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from minillama.config.loader import check
from minillama.errors import InputError
from minillama.inference.load import ModelArgs, Quantize, load_model, read_prompts
from minillama.inference.sampling import Sampling, models_own

if TYPE_CHECKING:
    from minillama.inference.chat import ChatPrompts, Prompt
    from minillama.inference.engine import Engine
    from minillama.inference.generate import Completion
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Args(ModelArgs):
    """Command-line arguments."""

    prompt: tuple[str, ...] = ()
    """One or more prompts; several are decoded in one batch."""
    prompts: Path | None = None
    """A file of prompts: JSONL with a field `prompt`, text or messages, or `messages`; or plain text, one per line; -:
    standard input, one per line."""
    chat: tyro.conf.FlagCreatePairsOff[bool] = False
    """The prompts are questions for the model's chat template; so by default where it has one."""
    raw: tyro.conf.FlagCreatePairsOff[bool] = False
    """The prompts are texts to continue, also where the model has a chat template."""
    special: tyro.conf.FlagCreatePairsOff[bool] = False
    """Names of special tokens in raw prompts are these tokens, and not plain text."""
    system: str = ""
    """System message of the chat template."""
    template: str = ""
    """Chat template instead of the model's: alpaca, chatml, llama-2, llama-3, vicuna ..., or a Jinja file."""
    max_new_tokens: int = field(default=128, metadata={"min": 1})
    """Maximum number of new tokens per prompt."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Stop strings; they are not written."""
    ignore_eos: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue after the end-of-text token."""
    speculate: tyro.conf.FlagCreatePairsOff[bool] = False
    """Speculative decoding by prompt lookup, the tokens that followed the same ones before."""
    draft: str | None = None
    """Speculative decoding with this draft model, a smaller one of the same vocabulary."""
    draft_tokens: int = field(default=8, metadata={"min": 1})
    """Maximum number of draft tokens per verification."""
    quantize: Quantize = "auto"
    """Weight quantization: int8 (scale per channel) or int4 (scale and zero point per group of 32 inputs); auto, on a
    CPU: int4 where the file has Q4_0 or Q4_1, whose values are kept, int8 where it has Q8_0, none otherwise."""
    batch_size: int = field(default=16, metadata={"min": 1})
    """Sequences per batch; continuous batching: the next prompt enters when a sequence has ended."""
    compile: Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help_behavior_hint="")] = True
    """Without the decode step in C++, which is compiled once in some seconds where a compiler is installed; on a CUDA
    device without the CUDA graph."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """KV cache dtype; auto: that of the matrix products."""
    window: int = field(default=0, metadata={"min": 0})
    """Sliding-window attention to the last N tokens; 0: to all."""
    sinks: int = field(default=4, metadata={"min": 0})
    """With --window: attention sinks, the first N tokens, stay visible."""


def run(args: Args) -> int:
    """Stream one completion, or print several as JSONL, one line per prompt in order, and per adapter."""
    check(args)
    prompts = read_prompts(args.prompt, args.prompts)
    speculates = args.speculate or args.draft is not None
    if args.speculate and args.draft is not None:
        raise InputError("give either --speculate or --draft, not both", where="command line")
    if speculates and args.window:
        what = "speculative decoding attends to the whole sequence"
        raise InputError(what, where="--window", fix="leave out one of the two")
    from minillama.inference.generate import generate, stream

    steps = args.cache_dtype != "int8"  # which the layers read
    model, tokenizer = args.load(args.quantize, args.compile and not speculates, several=True, generates=steps)
    chat, engine = _chat(args, tokenizer), _engine(args, model, tokenizer)
    asked = prompts if chat else _raw(args, tokenizer, prompts)
    options = (args.max_new_tokens, models_own(args.sampling, model.sampling), args.stop, args.ignore_eos, engine, chat)
    if len(args.adapter) > 1:
        from minillama.model.lora import active, adapter_names

        for name in adapter_names(model):
            with active(model, name):
                _print(prompts, generate(model, tokenizer, asked, *options), model, {"adapter": name})
    elif len(prompts) == 1 and args.prompts is None:
        is_empty = True
        for chunk in stream(model, tokenizer, asked, *options):
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            is_empty = is_empty and not chunk.text
            _explain(chunk.reason, 0, model.config.max_seq_len, is_empty)
        if sys.stdout.isatty():
            sys.stdout.write("\n")  # for the prompt that follows; a file gets the completion alone
            sys.stdout.flush()
    else:
        _print(prompts, generate(model, tokenizer, asked, *options), model)
    if engine.speculation is not None:
        print(f"speculation: {engine.speculation.acceptance}", file=sys.stderr)
    return 0


def _chat(args: Args, tokenizer: Tokenizer) -> ChatPrompts | Literal[False]:
    """Encoder of the prompts as questions for the chat template, unless they are to be continued; said."""
    from minillama.inference.chat import ChatPrompts

    if args.raw and (args.chat or args.system or args.template):
        what, fix = "--raw continues texts, without a chat template", "leave it out"
        raise InputError(what, where="command line", found="--raw with --chat, --system or --template", fix=fix)
    is_wanted = args.chat or args.system or args.template
    is_chat = not args.raw and (is_wanted or tokenizer.chat_template is not None)
    if args.special and is_chat:
        what, fix = "--special is for prompts that are continued", "add --raw; a question has no special tokens"
        raise InputError(what, where="command line", found="--special without --raw", fix=fix)
    if not is_chat:
        return False
    if not is_wanted:
        print("answering by the model's chat template; --raw continues the text instead", file=sys.stderr)
    return ChatPrompts(tokenizer, args.template, args.system)


def _raw(args: Args, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts to continue, with --special as ids; without it names of special tokens in them are told of."""
    found: list[Prompt] = []
    for number, prompt in enumerate(prompts, 1):
        name = tokenizer.special.names.search(prompt) if isinstance(prompt, str) else None
        if name and args.special and isinstance(prompt, str):
            ids = tokenizer.encode(prompt, special=True)
            found.append(([tokenizer.bos_id] if tokenizer.add_bos and ids[0] != tokenizer.bos_id else []) + ids)
            continue
        if name:
            print(f"prompt {number}: {name[0]!r} is plain text; --special makes it the special token", file=sys.stderr)
        found.append(prompt)
    return found


def _engine(args: Args, model: Decoder, tokenizer: Tokenizer) -> Engine:
    import torch

    from minillama.formats.open import open_model
    from minillama.inference.engine import Engine
    from minillama.inference.speculative import Speculation
    from minillama.tokenizer import Tokenizer

    speculation = None
    if args.draft is not None:
        opened = open_model(args.draft)
        if opened.tokenizer is not None:
            _check_draft(Tokenizer.load(opened.tokenizer), tokenizer)
        draft = load_model(opened, args.dtype, args.device, args.quantize)
        speculation = Speculation(draft, args.draft_tokens)
    elif args.speculate:
        speculation = Speculation(None, args.draft_tokens)
    cache_dtype = None if args.cache_dtype == "auto" else getattr(torch, args.cache_dtype)
    return Engine(model, args.batch_size, None, cache_dtype, args.window or None, args.sinks, speculation)


def _check_draft(draft: Tokenizer, own: Tokenizer) -> None:
    """Refuse a draft model whose token ids mean something else: its drafts would all be rejected, or nearly."""
    if draft.fingerprint == own.fingerprint:
        return
    pairs = ((i, draft.backend.id_to_token(i), own.backend.id_to_token(i)) for i in range(own.vocab_size))
    other = next(((i, found, expected) for i, found, expected in pairs if found != expected), None)
    if other is not None:
        what, fix = "the draft model has another tokenizer", "give a draft model that was trained with the model's"
        found, expected = f"{other[1]!r} at id {other[0]}", repr(other[2])
        raise InputError(what, where="--draft", found=found, expected=expected, fix=fix)


def _print(
    prompts: Sequence[Prompt], completions: Sequence[Completion], model: Decoder, more: Mapping[str, str] | None = None
) -> None:
    """One JSON line per prompt."""
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        line = {**(more or {}), "prompt": prompt, "completion": completion.text, "finish_reason": completion.reason}
        print(json.dumps(line, ensure_ascii=False))
        _explain(completion.reason, i, model.config.max_seq_len, not completion.text)


def _explain(reason: str | None, row: int, context: int, is_empty: bool) -> None:
    from minillama.inference.chat import why_empty

    if reason is not None and is_empty:
        print(f"prompt {row + 1}: no text, {why_empty(reason)}", file=sys.stderr)
    if reason == "context":
        print(f"prompt {row + 1}: stopped, the model's context of {context} tokens is full", file=sys.stderr)
