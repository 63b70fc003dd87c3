"""Contents of a model file or folder, without loading it: format, configuration, metadata, tensors."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from minillama.commands.tables import print_pairs


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """A Hugging Face or Meta folder, a GGUF file, or a llama2.c .bin."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(args: Args) -> int:
    """Print format, shape, metadata and every tensor as the file has it."""
    from minillama.config.loader import to_dict
    from minillama.formats.open import contents

    held = contents(args.path)
    model, numbers = held.model, Counter[str]()
    for item in held.stored.values():
        numbers[item.dtype] += math.prod(item.shape)
    config = to_dict(model.config) if model else {}
    metadata = {key: _short(value) for key, value in held.metadata.items()}
    table = {
        "path": args.path,
        "format": held.format,
        "config": config or None,
        "parameters": model.config.num_params() if model else None,
        "numbers": dict(numbers),
        "tokenizer": str(model.tokenizer) if model and model.tokenizer else None,
        "metadata": metadata,
        "tensors": {name: {"dtype": item.dtype, "shape": item.shape} for name, item in held.stored.items()},
    }
    if args.json:
        print(json.dumps(table, default=str))
        return 0
    print(f"{args.path}: {held.format}")
    print("stored: " + (", ".join(f"{count:,} values in {dtype}" for dtype, count in numbers.items()) or "no tensors"))
    if model:
        print(f"parameters: {model.config.num_params():,}")
        print(f"tokenizer: {model.tokenizer or 'none'}")
    print_pairs("\nconfig", {key: str(value) for key, value in config.items() if value not in (None, "")})
    print_pairs("\nmetadata", metadata)
    lines = {name: f"{item.dtype:<5} {' x '.join(map(str, item.shape))}" for name, item in held.stored.items()}
    print_pairs("\ntensors", lines)
    return 0


def _short(value: Any) -> Any:
    """A long array as its length and first values, a long string cut."""
    if isinstance(value, str):
        return value if len(value) <= 80 else value[:77] + "..."
    if hasattr(value, "__len__"):
        items = [str(item) for item in value[:4]]
        return f"{len(value)} values: {', '.join(items)}{', ...' if len(value) > 4 else ''}"
    return value
