"""What int8 and int4 weights cost in perplexity, plain and calibrated.

    python benchmarks/quantization.py --model MODEL --text TEXT --calibrate TEXT [TEXT ...] [--tokens 4096]
        [--weights stored rescaled]

MODEL is whatever minillama opens, LLaMA's layers alone. Every kind of weights predicts the first TOKENS of --text in
windows of 513; int4 is made from the weights alone, and by the beginning of each text of --calibrate, which should be
another one.

Weights of a file that is itself of four bits lie on a grid, which int4 finds: that says nothing of others. So the model
is measured a second time, rescaled: norms are multiplied into the products that follow them, the inner channels of up
and down, and of values and output, by random numbers of 0.75 to 1.25 and their reciprocals. In float32 it computes the
same, and its weights lie on no grid. Groups are more unequal than they were, so that this is harder than weights as
they come from training.

Results go to quantization.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minillama.evaluate.perplexity import score
from minillama.inference.calibrate import windows
from minillama.inference.quantize import quantize
from minillama.model import Decoder
from minillama.threads import adapt
from minillama.tokenizer import Tokenizer

WINDOW = 512


@torch.no_grad()
def rescale(model: Decoder) -> None:
    """The same function with other weights, in place; see above."""
    config, source = model.config, torch.Generator().manual_seed(0)

    def factors(count: int) -> torch.Tensor:
        return 0.75 + 0.5 * torch.rand(count, generator=source)

    for block in model.blocks:
        attention, mlp = block.self_attn, block.mlp
        followers = {
            block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
            block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
        }
        for norm, products in followers.items():
            for product in products:
                product.weight.mul_(norm.weight)
            norm.weight.fill_(1)
        inner = factors(config.hidden_dim)
        mlp.up_proj.weight.mul_(inner[:, None])
        mlp.down_proj.weight.div_(inner)
        inner = factors(config.n_kv_heads * config.head_dim)
        attention.v_proj.weight.mul_(inner[:, None])
        shared = inner.view(config.n_kv_heads, 1, config.head_dim)
        attention.o_proj.weight.div_(shared.expand(-1, config.n_heads // config.n_kv_heads, -1).flatten())


def measure(load: Callable[[], Decoder], text: torch.Tensor, calibration: dict[str, torch.Tensor]) -> dict[str, object]:
    """Perplexity, loss of it and seconds of quantization, by kind."""
    kinds = {"float32": ("none", None), "int8": ("int8", None), "int4": ("int4", None)}
    kinds |= {f"int4, by {name}": ("int4", ids) for name, ids in calibration.items()}
    found: dict[str, object] = {}
    base = 0.0
    for name, (kind, ids) in kinds.items():
        model = load()
        began = time.perf_counter()
        quantize(model, kind, calibration=ids)
        seconds = time.perf_counter() - began
        perplexity = score(model, text.numpy(), 1.0, 8).perplexity
        base = base or perplexity
        found[name] = {"perplexity": perplexity, "loss": perplexity / base - 1, "seconds": seconds}
        print(f"{name}: {perplexity:.3f}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or file that minillama opens, with its tokenizer")
    parser.add_argument("--text", required=True, help="whose tokens are predicted")
    parser.add_argument("--calibrate", nargs="+", default=[], help="texts to choose int4 numbers by")
    parser.add_argument("--tokens", type=int, default=4096, help="of --text")
    parser.add_argument("--calibration-tokens", type=int, default=32768, help="of each text of --calibrate")
    parser.add_argument("--weights", nargs="+", choices=["stored", "rescaled"], default=["stored", "rescaled"])
    parser.add_argument("--json", type=Path, default=Path("quantization.json"))
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.model)

    def ids(source: str, tokens: int) -> torch.Tensor:
        return windows(source, tokenizer, WINDOW, max(1, tokens // WINDOW))

    def load(changed: bool) -> Decoder:
        model = Decoder.from_pretrained(args.model, torch.float32)
        if changed:
            rescale(model)
        return model.fuse()

    text = ids(args.text, args.tokens)
    calibration = {Path(name).name: ids(name, args.calibration_tokens)[:, :-1] for name in args.calibrate}
    results = {}
    print("| weights | kind | perplexity | loss | seconds |\n|---|---|---|---|---|")
    for name in args.weights:
        results[name] = measure(lambda name=name: load(name == "rescaled"), text, calibration)
        args.json.write_text(json.dumps(results, indent=2) + "\n")
        for kind, row in results[name].items():
            print(
                f"| {name} | {kind} | {row['perplexity']:.3f} | {row['loss']:.2%} | {row['seconds']:.0f} |", flush=True
            )


if __name__ == "__main__":
    adapt()
    main()
