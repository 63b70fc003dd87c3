"""Parameter counts, FLOPs, memory and training time of a model, by arithmetic: nothing is built."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import tyro

from minillama.commands.tables import print_table
from minillama.config import ModelConfig
from minillama.config.cost import cache_slots, inference_memory, training_days, training_memory
from minillama.config.loader import check, to_dict
from minillama.errors import InputError

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Model preset, TOML file, or Hugging Face folder."""
    seq_len: int = field(default=0, metadata={"min": 0})
    """Tokens per sequence; 0: the model's max_seq_len."""
    batch_size: int = field(default=1, metadata={"min": 1})
    """Sequences in memory at once."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matrix products in training (weights and optimizer are float32), and of the KV cache."""
    window: int = field(default=0, metadata={"min": 0})
    """Sliding window of `generate --window`: the KV cache holds twice as many tokens, or 256 more; 0: all."""
    sinks: int = field(default=4, metadata={"min": 0})
    """Attention sinks of `generate --sinks`, in the KV cache as well."""
    tokens: float = field(default=0, metadata={"min": 0})
    """Training tokens; 0: 20 per parameter (Chinchilla)."""
    tflops: float = field(default=400.0, metadata={"above": 0})
    """Achieved training TFLOP/s per device; 400 is 40 % of an H100's bfloat16 peak."""
    devices: int = field(default=1, metadata={"min": 1})
    """Number of devices."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object with plain numbers: bytes, FLOPs, days."""


def run(args: Args) -> int:
    """Print the figures as tables, or as JSON."""
    check(args)
    config = ModelConfig.load(args.model)
    table = figures(config, args)
    if args.json:
        print(json.dumps(table))
    else:
        _show(config, args, table)
    return 0


def figures(config: ModelConfig, args: Args) -> dict[str, Any]:
    """All figures that are printed, as plain numbers.

    Raises:
        InputError: a sequence longer than the model's context.
    """
    seq_len, count = args.seq_len or config.max_seq_len, config.num_params()
    if seq_len > config.max_seq_len:
        expected = f"at most the model's max_seq_len, {config.max_seq_len}"
        raise InputError("the sequence is longer than the context", where="seq_len", found=seq_len, expected=expected)
    table = config.vocab_size * config.dim
    head = 0 if config.tie_embeddings else table
    width = int(WEIGHT_BYTES[args.dtype])
    training = {
        name: training_memory(config, args.batch_size, seq_len, activation_bytes=width, checkpointing=checkpointing)
        for name, checkpointing in (("plain", False), ("checkpointing", True))
    }
    weights = {name: inference_memory(config, 1, 1, size).weights for name, size in WEIGHT_BYTES.items()}
    int8_width = 1 + 4 / config.head_dim  # int8, and a float32 scale per head
    slots = cache_slots(config, seq_len, args.window, args.sinks)
    tokens = args.tokens or 20 * count
    return {
        "model": args.model,
        "config": to_dict(config),
        "seq_len": seq_len,
        "batch_size": args.batch_size,
        "tensors": config.tensors(),
        "parameters": {
            "total": count,
            "embedding": table,
            "head": head,
            "layer": sum(map(math.prod, config.layer_tensors().values())),
            "non_embedding": count - table - head,
        },
        "flops_per_token": {
            "forward": config.flops_per_token(seq_len, training=False),
            "training": config.flops_per_token(seq_len),
        },
        "training_bytes": {name: asdict(part) | {"total": part.total} for name, part in training.items()},
        "inference_bytes": {
            "weights": weights,
            "state_tokens": slots,
            "state_per_token": config.kv_bytes_per_token(width),
            "state": inference_memory(config, args.batch_size, slots, kv_bytes=width).state,
            "state_int8": inference_memory(config, args.batch_size, slots, kv_bytes=int8_width).state,
        },
        "training": {
            "tokens": tokens,
            "flops": tokens * config.flops_per_token(seq_len),
            "devices": args.devices,
            "flops_per_second": args.tflops * 1e12,
            "days": training_days(config, tokens, seq_len, args.tflops * 1e12, args.devices),
        },
    }


def _show(config: ModelConfig, args: Args, table: dict[str, Any]) -> None:
    count, flops, training = table["parameters"], table["flops_per_token"], table["training"]
    memory, inference = table["training_bytes"], table["inference_bytes"]
    size, kept = (f"{args.batch_size} x {n} tokens" for n in (table["seq_len"], inference["state_tokens"]))
    parts = ("total", "embedding", "head", "layer", "non_embedding")
    names = {"layer": f"one of {config.n_layers} layers", "non_embedding": "without embedding and head"}
    heads = f"{config.n_heads} heads of {config.head_dim} ({config.n_kv_heads} key/value heads)"
    print(f"{args.model}: {config.n_layers} layers, {heads}, context {config.max_seq_len}\n")
    print_table("tensors", ("shape", "parameters"), _tensors(config))
    print_table("parameters", ("",), [(names.get(part, part), f"{count[part]:,}") for part in parts])
    rows = [(part, *(_bytes(memory[kind][part]) for kind in memory)) for part in memory["plain"]]
    print_table("training memory", (size, "with checkpointing"), rows)
    lines = {f"weights, {name}": number for name, number in inference["weights"].items()} | {
        f"KV cache, {args.dtype}, per token": inference["state_per_token"],
        f"KV cache, {args.dtype}, {kept}": inference["state"],
        f"KV cache, int8, {kept}": inference["state_int8"],
    }
    print_table("inference memory", ("",), [(name, _bytes(number)) for name, number in lines.items()])
    figures = {
        "forward, FLOPs per token": f"{flops['forward']:.4g}",
        "training, FLOPs per token": f"{flops['training']:.4g}",
        f"training on {training['tokens']:.4g} tokens, FLOPs": f"{training['flops']:.4g}",
        f"days on {args.devices} x {args.tflops:g} TFLOP/s": f"{training['days']:,.4g}",
    }
    print_table("computation", ("",), figures.items())


def _tensors(config: ModelConfig) -> list[tuple[str, ...]]:
    """One row per tensor; the layers, which are alike, once."""

    def row(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        return name, " x ".join(map(str, shape)), f"{math.prod(shape):,}"

    first, *rest = [row(*pair) for pair in config.tensors().items() if not pair[0].startswith("model.layers.")]
    layer = [row(f"  {name}", shape) for name, shape in config.layer_tensors().items()]
    return [first, (f"model.layers.N, {config.n_layers} of", "", ""), *layer, *rest]


def _bytes(number: float) -> str:
    power = min(int(math.log2(number or 1)) // 10, 4)
    scaled = number / 1024**power
    digits = f"{scaled:,.0f}" if scaled >= 1000 else f"{scaled:.4g}"
    return f"{digits} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
