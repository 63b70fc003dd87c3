"""Infilling of masked spans: the whole text goes to standard output. Several, or a file: one JSON line per text."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from minillama.config.loader import check
from minillama.inference.load import ModelArgs, read_texts
from minillama.inference.sampling import Sampling


@dataclass(frozen=True)
class Args(ModelArgs):
    """Command-line arguments."""

    model: str
    """Folder of a model trained for infilling, such as glm-tiny."""
    text: tuple[str, ...] = ()
    """One or more texts; each holds [MASK] (a few words), [sMASK] (a sentence) or [gMASK] (a long text)."""
    texts: Path | None = None
    """A file of texts: JSONL with a field `text`, or plain text with one per line."""
    max_new_tokens: int = field(default=64, metadata={"min": 1})
    """Maximum number of tokens per masked span."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=lambda: Sampling(temperature=0))


def run(args: Args) -> int:
    """Print one filled text, or several as JSONL, one line per text in order."""
    check(args)
    texts = read_texts(args.text, args.texts, "text")
    from minillama.inference.infill import infill

    model, tokenizer = args.load()
    for i, filled in enumerate(infill(model, tokenizer, texts, args.max_new_tokens, args.sampling)):
        if len(texts) == 1 and args.texts is None:
            print(filled.text)
        else:
            line = {"text": texts[i], "filled": filled.text, "blanks": filled.spans, "finish_reasons": filled.reasons}
            print(json.dumps(line, ensure_ascii=False))
        if "context" in filled.reasons:
            print(f"text {i + 1}: stopped, the model's context is full", file=sys.stderr)
    return 0
