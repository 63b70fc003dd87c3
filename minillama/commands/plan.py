"""Parameter counts, memory per GPU and whether it fits, FLOPs and training time of models, by arithmetic."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import tyro

from minillama.commands.tables import bytes_text, count_text, duration_text, print_table
from minillama.config import ModelConfig
from minillama.config.budget import MOST, SIZES, USABLE, Setting, Train, fits, remedies, usable
from minillama.config.cost import WEIGHT_BYTES, TrainingMemory, cache_slots, inference_memory
from minillama.config.loader import check, config_names, to_dict
from minillama.device import GPUS
from minillama.errors import InputError
from minillama.formats.shape import model_config
from minillama.runs.parallel import Sizes, meshes

MFU = 0.4  # of a GPU's peak, unless a speed is given
ADAPTER_TOKENS = 1e6


@dataclass(frozen=True)
class Args:
    """Command-line arguments."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]
    """Model presets, TOML files, models of any format, or runs; several are compared."""
    train: Train = "full"
    """All weights, LoRA adapters, or LoRA adapters on int4 weights."""
    batch: int = field(default=1, metadata={"min": 1})
    """Sequences in memory at once per GPU; of tensor parallelism per group of GPUs."""
    context: int = field(default=0, metadata={"min": 0})
    """Tokens per sequence; 0: the model's max_seq_len."""
    gpus: int = field(default=1, metadata={"min": 1})
    """Number of GPUs."""
    gpu: str = ""
    """GPU, as `RTX 4090` or `a100`: its memory, and 40 % of its peak as speed; all: a table of those known."""
    gpu_memory: float = field(default=0, metadata={"min": 0})
    """Memory of a GPU in GB; 0: that of --gpu, or 8, 16, 24 and 80."""
    checkpointing: tyro.conf.FlagCreatePairsOff[bool] = False
    """Activation checkpointing."""
    rank: int = field(default=8, metadata={"min": 1})
    """Rank of the adapters."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Dtype of matrix products in training (weights and optimizer are float32), and of the KV cache."""
    window: int = field(default=0, metadata={"min": 0})
    """Sliding window of `generate --window`: the KV cache holds twice as many tokens, or 256 more; 0: all."""
    sinks: int = field(default=4, metadata={"min": 0})
    """Attention sinks of `generate --sinks`, in the KV cache as well."""
    tokens: float = field(default=0, metadata={"min": 0})
    """Training tokens; 0: 20 per parameter (Chinchilla), of adapters a million."""
    tflops: float = field(default=0, metadata={"min": 0})
    """Achieved training TFLOP/s per GPU; 0: 40 % of the peak of --gpu, or of an H100."""
    tokens_per_second: float = field(default=0, metadata={"min": 0})
    """Measured training speed of all GPUs together, in place of --tflops; of a run folder its own."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object with plain numbers: bytes, FLOPs, days; a list of them for several models."""


def run(args: Args) -> int:
    """Print the figures as tables, or as JSON."""
    check(args)
    if not args.models:
        expected = f"a folder, a file, or one of {', '.join(config_names('model'))}"
        raise InputError("no model was given", where="command line", expected=expected)
    configs = [model_config(name) for name in args.models]
    tables = [figures(name, config, args) for name, config in zip(args.models, configs, strict=True)]
    if args.json:
        print(json.dumps(tables if len(tables) > 1 else tables[0]))
    elif len(tables) > 1:
        _compare(args, configs, tables)
    else:
        _show(configs[0], args, tables[0])
    return 0


def figures(name: str, config: ModelConfig, args: Args) -> dict[str, Any]:
    """All figures that are printed, as plain numbers.

    Raises:
        InputError: a sequence longer than the model's context, or an unknown GPU.
    """
    context, count = args.context or config.max_seq_len, config.num_params()
    if context > config.max_seq_len:
        raise InputError(
            "the sequence is longer than the context",
            where="--context",
            found=context,
            expected=f"at most the model's max_seq_len, {config.max_seq_len}",
            fix="give a larger max_seq_len, with rope_scaling, in a TOML file",
        )
    table = config.vocab_size * config.dim
    head = 0 if config.tie_embeddings else table
    width = int(WEIGHT_BYTES[args.dtype])
    setting = Setting(args.train, args.batch, context, args.gpus, "data parallel", args.checkpointing, args.rank, width)
    fitting = [_fit(config, setting, gigabytes, gpu) for gpu, gigabytes in _sizes(args)]
    return {
        "model": name,
        "config": to_dict(config),
        "context": context,
        "tensors": config.tensors(),
        "parameters": {
            "total": count,
            "embedding": table,
            "head": head,
            "layer": sum(map(math.prod, config.layer_tensors().values())),
            "non_embedding": count - table - head,
        },
        "flops_per_token": {
            "forward": config.flops_per_token(context, training=False),
            "training": _training_flops(config, context, args.train),
        },
        "setting": asdict(setting),
        "training_bytes": {
            label: asdict(memory) | {"total": memory.total}
            for label, memory in _columns(config, setting, fitting).items()
        },
        "fits": fitting,
        "inference_bytes": _inference(config, args, context, width),
        "training": _time(name, config, args, context),
    }


def _columns(config: ModelConfig, setting: Setting, fitting: list[dict[str, Any]]) -> dict[str, TrainingMemory]:
    """Memory that is listed: with and without checkpointing on one GPU; on several every split, and a mesh that fits.

    The mesh is that of the one GPU that was asked for.
    """
    if setting.gpus == 1:
        both = {"plain": False, "checkpointing": True}
        return {name: replace(setting, checkpointing=on).memory(config) for name, on in both.items()}
    found = {one.label(config): one.memory(config) for one in setting.splits(config)}
    mesh = fitting[0]["mesh"] if len(fitting) == 1 else None
    if mesh:
        sizes = Sizes(*mesh["sizes"].values())
        memory = setting.divided(config, sizes.shard, sizes.tensor)
        found |= {} if memory in found.values() else {_label(sizes): memory}
    return found


def _label(sizes: Sizes) -> str:
    """Name of a mesh in the terms of its splits."""
    axes = {"DP": sizes.data, "TP": sizes.tensor, "FSDP": sizes.shard}
    return " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)


def _sizes(args: Args) -> list[tuple[str, float]]:
    """Names of GPUs, empty for a mere size, and their memory."""
    if args.gpu == "all":
        return [(name, gpu.memory) for name, gpu in GPUS.items()]
    gpu = _gpu(args)
    if args.gpu_memory or gpu:
        return [(gpu, args.gpu_memory or GPUS[gpu].memory)]
    return [("", size) for size in SIZES]


def _gpu(args: Args) -> str:
    """Name in the table of GPUs, with or without its maker, series and memory; none where none was asked for."""
    if args.gpu in ("", "all"):
        return ""
    known = {_plain(name): name for name in GPUS}
    known |= {_plain(f"{name} {gpu.memory} GB"): name for name, gpu in GPUS.items()}
    found = known.get(_plain(args.gpu))
    if found is None:
        near = get_close_matches(_plain(args.gpu), known, n=3)
        fix = f"did you mean {' or '.join(dict.fromkeys(known[one] for one in near))}? else " if near else ""
        size = re.sub(r"\s*gb$", "", args.gpu.lower())
        fix += f"--gpu-memory {size}" if size.isdecimal() else "give --gpu-memory and --tflops"
        raise InputError(
            "this GPU is not in the table", where="--gpu", found=args.gpu, expected=", ".join(GPUS), fix=fix
        )
    return found


def _plain(gpu: str) -> str:
    return re.sub(r"nvidia|geforce|rtx|[\W_]", "", gpu.lower())


def _fit(config: ModelConfig, setting: Setting, gigabytes: float, gpu: str) -> dict[str, Any]:
    """Whether a training fits GPUs of a size; if not, the bytes that are missing, and settings that fit."""
    splits = setting.splits(config)
    there = [one.label(config) for one in splits if fits(config, one, gigabytes)]
    least = min(one.memory(config).total for one in splits)
    others = [] if there else remedies(config, setting, gigabytes)
    return {
        "gpu": gpu,
        "gigabytes": gigabytes,
        "fits": there,
        "mesh": _mesh(config, setting, gigabytes) if setting.gpus > 1 else None,
        "missing": 0 if there else int(least - usable(gigabytes)),
        "instead": {one.options(setting): one.memory(config).total for one in others},
    }


def _mesh(config: ModelConfig, setting: Setting, gigabytes: float) -> dict[str, Any] | None:
    """Mesh of a run that divides a model as little as fits, by the memory counted here; none where none fits."""
    before = None
    for sizes in meshes(setting.gpus, replace(setting, split="tensor parallel").ranks(config)):
        if setting.train == "qlora" and sizes.parts > 1:
            continue
        total = setting.divided(config, sizes.shard, sizes.tensor).total
        if total <= usable(gigabytes):
            less = "" if before is None else f"; {_label(before[0])} would take {bytes_text(before[1], 3)}"
            axes = {name: size for name, size in sizes._asdict().items() if size > 1}
            options = " ".join(f"--parallel.{name} {size}" for name, size in axes.items())
            reason = f"the least division that fits{less}"
            return {"sizes": sizes._asdict(), "total": total, "options": options, "reason": reason}
        before = sizes, total
    return None


def _inference(config: ModelConfig, args: Args, context: int, width: int) -> dict[str, Any]:
    """Bytes of inference per GPU, with tensor parallelism on several."""
    window, sinks = args.window or config.sliding_window, args.sinks if args.window else 0
    slots = cache_slots(config, context, window, sinks)
    ranks = Setting("full", 1, context, args.gpus, "tensor parallel").ranks(config)
    int8_width = 1 + 4 / config.head_dim  # int8, and a float32 scale per head
    kinds = {kind: inference_memory(config, args.batch, slots, kind, width, ranks) for kind in WEIGHT_BYTES}
    return {
        "weights": {kind: memory.weights for kind, memory in kinds.items()},
        "state_tokens": slots,
        "state_per_token": config.kv_bytes_per_token(width),
        "state": kinds[args.dtype].state,
        "state_int8": inference_memory(config, args.batch, slots, "int8", int8_width, ranks).state,
        "ranks": ranks,
    }


def _training_flops(config: ModelConfig, context: int, train: Train) -> float:
    """FLOPs per token: three times the forward pass, of adapters twice: frozen weights have no gradient."""
    return config.flops_per_token(context, training=False) * (3 if train == "full" else 2)


def _time(name: str, config: ModelConfig, args: Args, context: int) -> dict[str, Any]:
    gpu = _gpu(args) or "H100"
    tokens = args.tokens or (20 * config.num_params() if args.train == "full" else ADAPTER_TOKENS)
    per_token = _training_flops(config, context, args.train)
    rate = 1e12 * args.tflops or MFU * GPUS[gpu].flops
    measured = args.tokens_per_second or (0 if args.tflops or args.gpu else _measured(name))
    speed = measured or args.gpus * rate / per_token
    source = f"{args.gpus} x {f'{args.tflops:g} TFLOP/s' if args.tflops else f'{gpu} at {MFU:.0%} of its peak'}"
    return {
        "tokens": tokens,
        "flops": tokens * per_token,
        "speed_of": "measured" if measured else source,
        "tokens_per_second": speed,
        "days": tokens / speed / 86400,
    }


def _measured(name: str) -> float:
    """Median tokens per second of a run folder; 0 of anything else."""
    from minillama.runs.folder import read_metrics

    lines = read_metrics(Path(name) / "metrics.jsonl")
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    return median(speeds) if speeds else 0


def _show(config: ModelConfig, args: Args, table: dict[str, Any]) -> None:
    count, flops, memory = table["parameters"], table["flops_per_token"], table["training_bytes"]
    parts = ("total", "embedding", "head", "layer", "non_embedding")
    names = {"layer": f"one of {config.n_layers} layers", "non_embedding": "without embedding and head"}
    heads = f"{config.n_heads} heads of {config.head_dim} ({config.n_kv_heads} key/value heads)"
    total, unit = (count["total"] / 1e9, "B") if count["total"] >= 1e9 else (count["total"] / 1e6, "M")
    print(f"{table['model']}: {total:.4g} {unit} parameters, context {config.max_seq_len}")
    print(f"{config.n_layers} layers {config.dim} wide, {heads}\n")
    at_once = f"{args.batch} x {table['context']} tokens"
    print(f"{args.train} training, {at_once} at once, AdamW, products in {args.dtype}:")
    if args.gpu == "all":
        rows = [_gpu_row(fit, table["training"], args.gpus) for fit in table["fits"]]
        print_table("GPU", ("GB", "peak TFLOP/s", "fits", f"training time at {MFU:.0%}"), rows)
    else:
        print(f"fits a GPU, {USABLE:.0%} of its memory counted:")
        print("\n".join(line for fit in table["fits"] for line in _verdict(fit, args.gpus)) + "\n")
    _show_inference(table, args)
    rows = [(part, *(bytes_text(parts[part]) for parts in memory.values())) for part in next(iter(memory.values()))]
    print_table("memory per GPU" if args.gpus > 1 else "memory", memory, rows)
    training = table["training"]
    lines = {
        "forward, FLOPs per token": count_text(flops["forward"]),
        "training, FLOPs per token": count_text(flops["training"]),
        f"training on {count_text(training['tokens'])} tokens, FLOPs": count_text(training["flops"]),
        f"tokens per second ({training['speed_of']})": f"{training['tokens_per_second']:,.4g}",
        "training time": duration_text(86400 * training["days"]),
    }
    print_table("computation", ("",), lines.items())
    print_table("parameters", ("",), [(names.get(part, part), f"{count[part]:,}") for part in parts])
    print_table("tensors", ("shape", "parameters"), _tensors(config))


def _answer(fit: dict[str, Any], gpus: int) -> str:
    """Whether a training fits, and by which splits, or by how much it does not."""
    if fit["fits"]:
        return "yes" if gpus == 1 else ", ".join(fit["fits"])
    return f"no, {bytes_text(fit['missing'], 3)} too much"


def _verdict(fit: dict[str, Any], gpus: int) -> list[str]:
    """Lines of one size: the answer, and settings that fit instead."""
    name = f"{fit['gigabytes']:g} GB{', ' if fit['gpu'] else ''}{fit['gpu']}"
    others = [f"{options}, {bytes_text(number, 3)}" for options, number in fit["instead"].items()]
    asked = "" if fit["fits"] else "; what fits:" if others else f"; nor on {MOST} GPUs"
    mesh, lines = fit["mesh"], [f"  {name:6}  {_answer(fit, gpus)}{asked}", *(f"{'':12}{other}" for other in others)]
    if mesh:
        lines.append(f"{'':10}{mesh['options']}: {bytes_text(mesh['total'], 3)} per GPU,")
        lines.append(f"{'':10}{mesh['reason']}")
    return lines


def _gpu_row(fit: dict[str, Any], training: dict[str, Any], gpus: int) -> tuple[str, ...]:
    flops = GPUS[fit["gpu"]].flops
    seconds = training["flops"] / (gpus * MFU * flops)
    return fit["gpu"], f"{fit['gigabytes']:g}", f"{flops / 1e12:.0f}", _answer(fit, gpus), duration_text(seconds)


def _show_inference(table: dict[str, Any], args: Args) -> None:
    inference = table["inference_bytes"]
    ranks, kept = inference["ranks"], f"{args.batch} x {inference['state_tokens']} tokens"
    rows, sizes = [], sorted((fit["gigabytes"], fit["gpu"]) for fit in table["fits"])
    for kind, weights in inference["weights"].items():
        total = weights + inference["state"]
        fitting = (gpu or f"{size:g} GB" for size, gpu in sizes if total <= usable(size))
        size = next(fitting, f"not {sizes[-1][0]:g} GB")
        rows.append((kind, *map(bytes_text, (weights, inference["state"], total)), size))
    if ranks > 1:
        print(f"per GPU of {ranks}, tensor parallel:")
    print_table(f"inference, {kept}", ("weights", f"KV cache, {args.dtype}", "total", "fits"), rows)
    per_token, small = bytes_text(inference["state_per_token"]), bytes_text(inference["state_int8"])
    print(f"KV cache: {per_token} per token; int8 {small} for {kept}\n")


def _compare(args: Args, configs: list[ModelConfig], tables: list[dict[str, Any]]) -> None:
    """Table of several models side by side."""
    rows: dict[str, list[str]] = {
        "parameters": [f"{table['parameters']['total'] / 1e9:.4g} B" for table in tables],
        "layers x width": [f"{config.n_layers} x {config.dim}" for config in configs],
        "heads (key/value)": [f"{config.n_heads} ({config.n_kv_heads})" for config in configs],
        "context": [str(table["context"]) for table in tables],
    }
    for label in dict.fromkeys(label for table in tables for label in table["training_bytes"]):
        found = [table["training_bytes"].get(label, {}).get("total") for table in tables]
        rows[f"{args.train}, {label}"] = [bytes_text(number, 3) if number else "-" for number in found]
    for i, fit in enumerate(tables[0]["fits"]):
        lacks = [(one := table["fits"][i])["missing"] * (not one["fits"]) for table in tables]
        name = f"fits {fit['gpu'] or format(fit['gigabytes'], 'g') + ' GB'}"
        rows[name] = [f"no, {bytes_text(number, 3)}" if number else "yes" for number in lacks]
    inference = [table["inference_bytes"] for table in tables]
    rows |= {f"weights, {kind}": [bytes_text(one["weights"][kind], 3) for one in inference] for kind in WEIGHT_BYTES}
    rows["KV cache per token"] = [bytes_text(one["state_per_token"]) for one in inference]
    rows["training, FLOPs per token"] = [count_text(table["flops_per_token"]["training"]) for table in tables]
    rows["training tokens"] = [count_text(table["training"]["tokens"]) for table in tables]
    rows["training time"] = [duration_text(86400 * table["training"]["days"]) for table in tables]
    print(f"{args.train} training, batch {args.batch}, on {tables[0]['training']['speed_of']}")
    print_table("", args.models, [(name, *cells) for name, cells in rows.items()])


def _tensors(config: ModelConfig) -> list[tuple[str, ...]]:
    """One row per tensor; the layers, which are alike, once."""

    def row(name: str, shape: tuple[int, ...]) -> tuple[str, ...]:
        return name, " x ".join(map(str, shape)), f"{math.prod(shape):,}"

    first, *rest = [row(*pair) for pair in config.tensors().items() if not pair[0].startswith("model.layers.")]
    layer = [row(f"  {name}", shape) for name, shape in config.layer_tensors().items()]
    return [first, (f"model.layers.N, {config.n_layers} of", "", ""), *layer, *rest]
