"""Training steps: tokens per second, share of the machine's peak and peak memory, beside transformers and litgpt.

    pip install -r benchmarks/requirements.txt
    python benchmarks/training.py [--shapes tiny 15m 42m 110m] [--peers ours transformers litgpt] [--repeats 3]

Every measurement is a process of its own; contenders take turns, and medians over the repeats are shown. A step is
forward, backward, gradient clipping to 1 and AdamW (fused) on random tokens, the model float32 with its products in the
type that the machine multiplies fastest. Settings of a peer: `default` is float32 and eager; `best` is the faster of
eager and torch.compile, in bfloat16 autocast where the processor has bfloat16 units. The peak is that of torch's matrix
product (2048 squared), measured in each process before the steps. Results go to training.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillama.config import ModelConfig
from minillama.device import choose_dtype, keep_freed_pages, peak_flops
from minillama.threads import adapt


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    dim: int
    layers: int
    heads: int
    hidden: int
    vocab: int
    context: int
    batch: int

    def config(self) -> ModelConfig:
        return ModelConfig(
            dim=self.dim,
            n_layers=self.layers,
            n_heads=self.heads,
            hidden_dim=self.hidden,
            vocab_size=self.vocab,
            max_seq_len=self.context,
        )


SHAPES = {
    "tiny": Shape(128, 4, 4, 352, 2048, 256, 16),
    "15m": Shape(288, 6, 6, 768, 32000, 256, 16),
    "15m-4096": Shape(288, 6, 6, 768, 32000, 4096, 1),
    "42m": Shape(512, 8, 8, 1376, 32000, 1024, 4),
    "110m": Shape(768, 12, 12, 2048, 32000, 1024, 2),
}
CONTENDERS = {
    "ours": [("ours", "eager"), ("ours", "compile")],
    "transformers": [("transformers", "default"), ("transformers", "eager"), ("transformers", "compile")],
    "litgpt": [("litgpt", "default"), ("litgpt", "eager"), ("litgpt", "compile")],
}
Step = Callable[[torch.Tensor], torch.Tensor]


def ours(shape: Shape, setting: str) -> tuple[Callable[[torch.Tensor], None], str]:
    """The trainer's own step, without its data, report and files."""
    from minillama.model import Decoder
    from minillama.runs.sections import OptimConfig
    from minillama.training.compile import use_native_kernels
    from minillama.training.optim.groups import make_optimizers
    from minillama.training.precision import choose_precision

    keep_freed_pages()  # as train.py does
    dtype = choose_dtype("auto", torch.device("cpu"))
    model = Decoder(shape.config())
    working = choose_precision(model, dtype)
    optimizers = make_optimizers(model, OptimConfig(lr=1e-3))
    if setting != "eager":
        use_native_kernels([working.model], working.model, lambda text: None)
    if setting == "compile":
        working.model.compile_blocks()
    working.model.train()

    def step(ids: torch.Tensor) -> None:
        hidden = working.model.hidden(ids[:, :-1])
        loss = working.model.loss(hidden, ids[:, 1:])
        (loss / ids[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        working.refresh()

    return step, str(dtype).removeprefix("torch.")


def peer_step(model: Any, forward: Step, setting: str) -> tuple[Callable[[torch.Tensor], None], str]:
    """What a training script around a peer's model does."""
    dtype = torch.float32 if setting == "default" else choose_dtype("auto", torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    model.train()

    def step(ids: torch.Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, str(dtype).removeprefix("torch.")


def transformers(shape: Shape, setting: str) -> tuple[Callable[[torch.Tensor], None], str]:
    """LlamaForCausalLM with its own loss; SDPA attention, which it takes by default."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.hidden,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.context,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    run = torch.compile(model) if setting == "compile" else model
    return peer_step(model, lambda ids: run(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss, setting)


def litgpt(shape: Shape, setting: str) -> tuple[Callable[[torch.Tensor], None], str]:
    """GPT in LLaMA's form, with litgpt's chunked cross entropy, as its pretraining script has it."""
    from litgpt.model import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=shape.context,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_embd=shape.dim,
        intermediate_size=shape.hidden,
        padded_vocab_size=shape.vocab,
        vocab_size=shape.vocab,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    run = torch.compile(model) if setting == "compile" else model
    return peer_step(model, lambda ids: chunked_cross_entropy(run(ids[:, :-1]), ids[:, 1:].contiguous()), setting)


MAKERS = {"ours": ours, "transformers": transformers, "litgpt": litgpt}


def child(name: str, setting: str, shape: Shape, seconds: float) -> dict[str, Any]:
    """Steps for so many seconds, at least three, after two that warm up."""
    adapt()
    torch.manual_seed(0)
    step, dtype = MAKERS[name](shape, setting)
    peak = peak_flops(torch.device("cpu"), getattr(torch, dtype))
    ids = torch.randint(0, shape.vocab, (shape.batch, shape.context + 1))
    for _ in range(2):
        step(ids)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        began = time.perf_counter()
        step(ids)
        times.append(time.perf_counter() - began)
    speed = shape.batch * shape.context / statistics.median(times)
    flops = shape.config().flops_per_token(shape.context) * speed
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"tokens_per_second": speed, "flops": flops, "peak": peak, "memory": memory, "dtype": dtype}


def measure(name: str, setting: str, shape: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, setting, shape, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} {setting} {shape}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    speeds = sorted(run["tokens_per_second"] for run in runs)
    middle = {key: statistics.median(run[key] for run in runs) for key in ("flops", "peak", "memory")}
    return middle | {
        "tokens_per_second": statistics.median(speeds),
        "spread": (speeds[-1] - speeds[0]) / statistics.median(speeds),
        "dtype": runs[0]["dtype"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--peers", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of steps a measurement")
    parser.add_argument("--json", type=Path, default=Path("training.json"))
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, setting, shape, seconds = args.child
        print(json.dumps(child(name, setting, SHAPES[shape], float(seconds))))
        return
    results: dict[str, dict[str, Any]] = {}
    print(
        "| shape | contender | type | tokens/s | spread | GFLOP/s | of peak | memory, GB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for shape in args.shapes:
        contenders = [pair for peer in args.peers for pair in CONTENDERS[peer]]
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in contenders}
        for _ in range(args.repeats):
            for pair in contenders:
                runs[pair].append(measure(*pair, shape, args.seconds))
        for (name, setting), found in ((pair, summary(runs[pair])) for pair in contenders):
            results[f"{shape} {name} {setting}"] = found
            print(
                f"| {shape} | {name}, {setting} | {found['dtype']} | {found['tokens_per_second']:.0f} | "
                f"{found['spread']:.0%} | {found['flops'] / 1e9:.0f} | {found['flops'] / found['peak']:.0%} | "
                f"{found['memory'] / 1e9:.2f} |",
                flush=True,
            )
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
