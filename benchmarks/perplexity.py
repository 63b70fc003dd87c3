"""What the decode step's number formats cost in perplexity, beside llama.cpp's of the same type on the same text.

    pip install -r benchmarks/requirements.txt
    python benchmarks/perplexity.py --model MODEL --text TEXT [--tokens 3072] [--window 192] [--kinds bf16 int8 int4]

MODEL is whatever minillama opens. As in `decoding.py` all read the same weights, made bfloat16; llama.cpp reads BF16,
Q8_0 and Q4_0 files of them. Ours are made by the command's quantization. The first TOKENS of the text are predicted in
windows, one token at a time, as in decoding: the weights as they are stored, inputs rounded as each program rounds
them. "float32" are the same stored weights, dequantized and multiplied in float32 by torch.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from decoding import make

from minillama.inference.load import ModelArgs
from minillama.inference.quantize import int4_numbers, plain_tensors
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer

KINDS = {"bf16": ("bfloat16", "none", "bf16"), "int8": ("auto", "int8", "q8_0"), "int4": ("auto", "int4", "q4_0")}
TOP = 2000  # most probable tokens that a request lists, before it lists all


@torch.inference_mode()
def by_step(model: Decoder, windows: list[list[int]]) -> float:
    """Perplexity by the decode step, a token at a time."""
    nats = []
    for ids in windows:
        state = model.state(1, len(ids))
        for token, wanted in itertools.pairwise(ids):
            logits = model.step([[token]], state, Mask()) if model.step else None
            if logits is None:
                raise SystemExit("the decode step in C++ is not available")
            nats.append(-logits[0].float().log_softmax(-1)[wanted].item())
    return math.exp(sum(nats) / len(nats))


@torch.inference_mode()
def by_layers(model: Decoder, windows: list[list[int]]) -> float:
    """Perplexity by torch's operations in float32."""
    nats = []
    for ids in windows:
        logits = model(torch.tensor([ids[:-1]]))[0].float().log_softmax(-1)
        nats += (-logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]).tolist()
    return math.exp(sum(nats) / len(nats))


def dequantized(model: Decoder) -> Decoder:
    """The weights as they are stored, in float32."""
    tensors = plain_tensors(model) | {name: numbers.weight() for name, numbers in int4_numbers(model).items()}
    same = Decoder(model.config)
    same.load_state_dict({name: tensors[name].float() for name in same.state_dict()})
    return same


def by_llama_cpp(path: Path, windows: list[list[int]]) -> float:
    """Perplexity by llama.cpp's server: a request per token, whose prompt's other tokens are cached."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = str(path), 1, 256 * -(-len(windows[0]) // 256)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)

    def listed(prompt: list[int], count: int) -> dict[int, float]:
        request = {"prompt": [prompt], "n_predict": 1, "logprobs": count, "temperature": -1.0, "cache_prompt": True}
        answer = server.handle_completions(request)
        rows: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {row["id"]: row["logprob"] for row in rows}

    nats = []
    for ids in windows:
        for i, wanted in enumerate(ids[1:], 1):
            found = listed(ids[:i], TOP)
            nats.append(-(found if wanted in found else listed(ids[:i], 10**6))[wanted])
    return math.exp(sum(nats) / len(nats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder or file that minillama opens, with its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="whose tokens are predicted")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--window", type=int, default=192, help="tokens predicted in one context")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make(args.model, folder)
        tokenizer = Tokenizer.load(folder / "hf")
        ids = tokenizer.encode(args.text.read_text(encoding="utf-8"))[: args.tokens + 1]
        windows = [ids[i : i + args.window + 1] for i in range(0, len(ids) - 1, args.window)]
        plain = by_layers(ModelArgs(str(folder / "hf"), None, "float32", "cpu").load("none")[0], windows)
        print(f"float32: {plain:.4f}", flush=True)
        for kind in args.kinds:
            dtype, quantize, file = KINDS[kind]
            model, _ = ModelArgs(str(folder / "hf"), None, cast(Any, dtype), "cpu").load(
                cast(Any, quantize), True, generates=True
            )
            own = by_step(model, windows)
            same = by_layers(dequantized(model), windows)
            other = by_llama_cpp(folder / f"{file}.gguf", windows)
            gguf, _ = ModelArgs(str(folder / f"{file}.gguf"), None, "float32", "cpu").load("none")
            print(
                f"{kind}: ours {own:.4f}, its weights in float32 {same:.4f}; "
                f"llama.cpp {file} {other:.4f}, its weights in float32 {by_layers(gguf, windows):.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
