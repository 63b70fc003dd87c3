"""Decoding: tokens per second, time to the first token and peak memory, beside transformers and llama.cpp.

    pip install -r benchmarks/requirements.txt
    python benchmarks/decoding.py --model MODEL [--contenders ours transformers llama.cpp] [--batches 1 4 16]

Every measurement is a process of its own with two threads; contenders take turns, and medians over the repeats are
shown. MODEL is whatever minillama opens. All contenders read the same weights: they are made bfloat16 as a Hugging Face
folder, and BF16, Q8_0 and Q4_0 GGUF files of that, in a temporary folder. Prompts are random tokens; decoding is greedy
and does not stop at an end-of-text token. Ours in int8 and int4 multiplies in the type that minillama chooses for the
machine. transformers is its `generate` with SDPA attention; the better of dynamic and static cache is its figure.
llama.cpp is xllamacpp's server, called without HTTP: one request with as many prompts as it has slots.

- prefill N: tokens of a prompt of N (--prompts, 512), a second until the first new token (median of three).
- first: milliseconds until the first new token after a prompt of 32 (median of three).
- batch N: N prompts of 32 tokens; new tokens of all rows per second, between the first new token and the last. Ours and
  transformers are timed at every step from the outside, for llama.cpp its own timings are taken, in all three figures.
- of limit: batch 1 as a share of bandwidth / bytes of the weights that a token reads (an embedding counts only as a
  tied head). The bandwidth is the best of ten sums over 256 MB of float32, measured in each process after the rest.
- spread: of the first batch, (highest - lowest) / median.
- memory: the most that the process ever held, loading and the largest batch included, before the bandwidth's turn.

Results go to decoding.json.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

# Neither torch nor minillama is imported up here: memory is to be that of a contender alone, and Linux gives a child
# what its parent holds as a first peak.

THREADS, SHORT, WARM_UP = 2, 32, 4
GGUF = ("bf16", "q8_0", "q4_0")
Prompts = list[list[int]]


class Times(NamedTuple):
    """Seconds until the first new token, and from there to the last."""

    first: float
    rest: float


@dataclass(frozen=True)
class Engine:
    """A contender, loaded. `run` takes prompts, the tokens to make room for, and after how many to stop."""

    run: Callable[[Prompts, int, int], Times]
    weight_bytes: Callable[[], int]


def ours(models: Path, dtype: str, quantize: str) -> Engine:
    """As the command `generate` loads and decodes."""
    import torch

    from minillama.inference import engine
    from minillama.inference.load import ModelArgs
    from minillama.inference.request import Request

    torch.set_num_threads(THREADS)
    model, _ = ModelArgs(str(models / "hf"), None, cast(Any, dtype), "cpu").load(
        cast(Any, quantize), True, generates=True
    )

    def run(prompts: Prompts, tokens: int, stop: int) -> Times:
        rows = engine.Engine(model, len(prompts), chunk=None)
        for prompt in prompts:
            rows.submit(Request(prompt, tokens))
        ends = [time.perf_counter()]
        while rows.is_busy and len(ends) <= stop:
            rows.step()
            ends.append(time.perf_counter())
        return Times(ends[1] - ends[0], ends[-1] - ends[1])

    return Engine(run, lambda: weight_bytes(model))


def transformers(models: Path, dtype: str, cache: str) -> Engine:
    """`generate`, with a stopping criterion that looks at the clock."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(models / "hf", dtype=kind, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None

    def run(prompts: Prompts, tokens: int, stop: int) -> Times:
        ids = torch.tensor(prompts)
        ends = [time.perf_counter()]

        def look(*_: Any, **__: Any) -> torch.Tensor:
            ends.append(time.perf_counter())
            return torch.full((len(prompts),), len(ends) > stop)

        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            stopping_criteria=[look],
        )
        return Times(ends[1] - ends[0], ends[-1] - ends[1])

    return Engine(run, lambda: weight_bytes(model))


def weight_bytes(model: Any) -> int:
    """What a token reads: each tensor once, the embedding only where it is the head too."""
    tensors = model.state_dict()
    tied = not any("lm_head" in name for name in tensors)
    read = {t.data_ptr(): t.nbytes for name, t in tensors.items() if tied or "embed_tokens" not in name}
    return sum(read.values())


def llama_cpp(models: Path, kind: str, _: str) -> Engine:
    """A server with one slot a prompt, made anew when the prompts are others in number or length."""
    import xllamacpp

    path = models / f"{kind}.gguf"
    servers: dict[tuple[int, int], Any] = {}

    def server(rows: int, context: int) -> Any:
        if (rows, context) not in servers:
            servers.clear()
            params = xllamacpp.CommonParams()
            params.model.path = str(path)
            params.n_parallel, params.n_ctx, params.kv_unified = rows, rows * context, False
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
            params.cache_prompt, params.cache_ram_mib = False, 0
            servers[rows, context] = xllamacpp.Server(params)
        return servers[rows, context]

    def run(prompts: Prompts, tokens: int, stop: int) -> Times:
        context = -(-(len(prompts[0]) + tokens + 1) // 256) * 256  # llama.cpp makes a slot's a multiple of 256
        request = {
            "prompt": prompts,
            "n_predict": stop,
            "samplers": ["top_k"],
            "top_k": 1,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        answer = server(len(prompts), context).handle_completions(request)
        timings = answer.get("timings", {})  # the first row's; all rows are posted together and take the same steps
        done = (len(answer.get("choices", ())), timings.get("prompt_n"), timings.get("predicted_n"))
        if done != (len(prompts), len(prompts[0]), stop):
            raise SystemExit(f"llama.cpp did something else than {len(prompts)} rows of {stop} tokens: {answer}")
        return Times(timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3)

    def read() -> int:
        from minillama.formats.gguf_header import read_header

        tensors = read_header(path).tensors
        embedding = tensors["token_embd.weight"].size if "output.weight" in tensors else 0
        return sum(info.size for info in tensors.values()) - embedding

    return Engine(run, read)


MAKERS = {"ours": ours, "transformers": transformers, "llama.cpp": llama_cpp}
CONTENDERS = {
    "ours-bf16": ("ours", "bfloat16", "none"),
    "ours-float32": ("ours", "float32", "none"),
    "ours-int8": ("ours", "auto", "int8"),
    "ours-int4": ("ours", "auto", "int4"),
    "transformers-bf16-dynamic": ("transformers", "bfloat16", "dynamic"),
    "transformers-bf16-static": ("transformers", "bfloat16", "static"),
    "transformers-float32-dynamic": ("transformers", "float32", "dynamic"),
    "transformers-float32-static": ("transformers", "float32", "static"),
} | {f"llama.cpp-{kind}": ("llama.cpp", kind, "") for kind in GGUF}


def bandwidth() -> float:
    """Bytes a second that sums read."""
    import torch

    torch.set_num_threads(THREADS)
    numbers = torch.ones(2**26)
    best = 0.0
    for _ in range(10):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, numbers.nbytes / (time.perf_counter() - began))
    return best


def child(contender: str, models: Path, lengths: list[int], batches: list[int], tokens: int) -> dict[str, float]:
    """Every figure of one contender; each length and batch is run for a few tokens first."""
    from minillama.threads import adapt

    adapt()
    name, *variant = CONTENDERS[contender]
    engine = MAKERS[name](models, *variant)
    vocab = json.loads((models / "hf" / "config.json").read_text())["vocab_size"]
    source = random.Random(0)

    def prompts(rows: int, length: int) -> Prompts:
        return [[source.randrange(vocab) for _ in range(length)] for _ in range(rows)]

    def first(length: int) -> float:
        return statistics.median([engine.run(prompts(1, length), 1, 1).first for _ in range(4)][1:])

    found = {f"prefill {length}": length / first(length) for length in lengths} | {"first": first(SHORT)}
    for rows in batches:
        engine.run(prompts(rows, SHORT), tokens, min(WARM_UP, tokens))
        found[f"batch {rows}"] = rows * (tokens - 1) / engine.run(prompts(rows, SHORT), tokens, tokens).rest
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["bandwidth"], found["weight bytes"] = bandwidth(), engine.weight_bytes()
    if "batch 1" in found:
        found["of limit"] = found["batch 1"] * found["weight bytes"] / found["bandwidth"]
    return found


def make(source: str, models: Path) -> None:
    """The files of the contenders."""
    work = [(source, "hf", ("--to", "hf", "--dtype", "bf16"))]
    work += [(str(models / "hf"), f"{kind}.gguf", ("--to", "gguf", "--dtype", kind)) for kind in GGUF]
    for origin, name, options in work:
        command = [sys.executable, "-m", "minillama", "convert", origin, str(models / name), *options]
        subprocess.run(command, check=True)


def measure(contender: str, models: Path, lengths: list[int], batches: list[int], tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", contender, str(models), "--tokens", str(tokens)]
    command += ["--batches", *map(str, batches), "--prompts", *map(str, lengths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, float]], batches: list[int]) -> dict[str, Any]:
    found = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    of_first = [run[f"batch {batches[0]}"] for run in runs]
    return found | {"spread": (max(of_first) - min(of_first)) / statistics.median(of_first), "runs": runs}


def line(contender: str, found: dict[str, Any], lengths: list[int], batches: list[int]) -> str:
    prompts = " | ".join(f"{found[f'prefill {length}']:.0f}" for length in lengths)
    limit = f"{found['of limit']:.0%}" if "of limit" in found else "-"
    speeds = " | ".join(f"{found[f'batch {rows}']:.0f}" for rows in batches)
    return (
        f"| {contender} | {prompts} | {found['first'] * 1e3:.0f} | {speeds} | {limit} | "
        f"{found['spread']:.0%} | {found['memory'] / 1e9:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or file that minillama opens, with its tokenizer")
    parser.add_argument("--contenders", nargs="+", default=list(MAKERS), help=f"of {', '.join(CONTENDERS)}; or a group")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512], help="lengths of prompts that are only read")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="that each row decodes, at least 2")
    parser.add_argument("--json", type=Path, default=Path("decoding.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        contender, models = args.child
        print(json.dumps(child(contender, Path(models), args.prompts, args.batches, args.tokens)))
        return
    if args.model is None or args.tokens < 2:
        parser.error("--model is needed, and at least two --tokens")
    contenders = [name for name in CONTENDERS if name in args.contenders or CONTENDERS[name][0] in args.contenders]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        make(args.model, Path(folder))
        for repeat in range(args.repeats):
            for name in list(runs):
                print(f"{repeat + 1}/{args.repeats} {name}", file=sys.stderr)
                try:
                    runs[name].append(measure(name, Path(folder), args.prompts, args.batches, args.tokens))
                except RuntimeError as error:
                    print(f"{name} is left out: {error}", file=sys.stderr)
                    del runs[name]
            results = {name: summary(found, args.batches) for name, found in runs.items()}
            args.json.write_text(json.dumps(results, indent=2) + "\n")
    speeds = " | ".join(f"batch {rows}" for rows in args.batches)
    prompts = " | ".join(f"prefill {length}" for length in args.prompts)
    print(f"| contender | {prompts} | first, ms | {speeds} | of limit | spread | memory, GB |")
    print("|---" * (len(args.prompts) + len(args.batches) + 5) + "|")
    for name, found in results.items():
        print(line(name, found, args.prompts, args.batches), flush=True)


if __name__ == "__main__":
    main()
