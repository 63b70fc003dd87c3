"""RWKV's average of the past: the scan against a loop over time and against attention, forward and backward.

    python benchmarks/wkv.py [--dim 256] [--batch 4] [--lengths 256 1024 4096]

Milliseconds for keys and values of (batch, T, dim), float32, medians; attention has heads of 64 and is torch's fused
kernel. Products around them are the same for all three and left out. Results go to wkv.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from minillama.layers.wkv import Sums, wkv_scan, wkv_step
from minillama.threads import adapt


def loop(k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Sums) -> Tensor:
    outputs = []
    for t in range(k.shape[1]):
        out, past = wkv_step(k[:, t], v[:, t], w, u, past)
        outputs.append(out)
    return torch.stack(outputs, dim=1)


def milliseconds(call: Callable[[], Tensor], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        call().sum().backward()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def measure(batch: int, length: int, dim: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    k, v, q = (torch.randn(batch, length, dim, requires_grad=True) for _ in range(3))
    w, u, empty = torch.rand(dim) * 2, torch.randn(dim), Sums.empty(batch, dim, torch.device("cpu"))
    heads = [part.detach().unflatten(-1, (-1, 64)).transpose(1, 2).requires_grad_() for part in (q, k, v)]
    return {
        "scan": milliseconds(lambda: wkv_scan(k, v, w, u, empty)[0], repeats),
        "loop": milliseconds(lambda: loop(k, v, w, u, empty), repeats),
        "attention": milliseconds(lambda: F.scaled_dot_product_attention(*heads, is_causal=True), repeats),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    table = {}
    print("| T | scan, ms | loop, ms | attention, ms |\n|---|---|---|---|")
    for length in args.lengths:
        row = table[length] = measure(args.batch, length, args.dim, args.repeats)
        print(f"| {length} | {row['scan']:.0f} | {row['loop']:.0f} | {row['attention']:.0f} |", flush=True)
    Path("wkv.json").write_text(json.dumps(table, indent=2), encoding="utf-8")


if __name__ == "__main__":
    adapt()
    main()
