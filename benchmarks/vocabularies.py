"""Seconds to train every kind of vocabulary by library and by readable code, and how fast texts are encoded.

    python benchmarks/vocabularies.py TEXT [--vocab-size 2000] [--sentencepiece FILE.model]

TEXT is a text file; its paragraphs are the documents. Encoding is compared with a bare `tokenizers.Tokenizer`
and, for a SentencePiece file, with the sentencepiece library, each at its best: a batch, all cores, medians of
five. Results go to vocabularies.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from minillama import Tokenizer
from minillama.tokenizer import TokenizerTrainer
from minillama.tokenizer.train import Kind


def median(call: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--sentencepiece", type=Path)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    documents, size = text.split("\n\n"), len(text.encode()) / 1e6
    result: dict[str, dict[str, float]] = {}
    print(f"{size:.2f} MB, {args.vocab_size} tokens\n")
    print("| kind | library, s | readable, s | encode, MB/s | bare backend, MB/s |")
    print("|---|---|---|---|---|")
    for kind in get_args(Kind):
        if kind == "bytes":
            continue
        row = {}
        for name, reference in (("library", False), ("readable", True)):
            began = time.perf_counter()
            made = TokenizerTrainer(kind, args.vocab_size, reference=reference)(documents)
            row[name] = time.perf_counter() - began
        row["encode"] = size / median(lambda made=made: made.encode_batch(documents))
        bare = made.backend
        row["bare"] = size / median(lambda bare=bare: bare.encode_batch_fast(documents, add_special_tokens=False))
        result[kind] = row
        print(f"| {kind} | {row['library']:.1f} | {row['readable']:.1f} | {row['encode']:.1f} | {row['bare']:.1f} |")
    if args.sentencepiece:
        from sentencepiece import SentencePieceProcessor

        made, theirs = Tokenizer.load(args.sentencepiece), SentencePieceProcessor(model_file=str(args.sentencepiece))
        row = {
            "encode": size / median(lambda: made.encode_batch(documents)),
            "bare": size / median(lambda: made.backend.encode_batch_fast(documents, add_special_tokens=False)),
            "sentencepiece": size / median(lambda: theirs.encode(documents)),
        }
        result[args.sentencepiece.name] = row
        print(f"\n{args.sentencepiece.name}, MB/s: {', '.join(f'{key} {value:.1f}' for key, value in row.items())}")
    Path("vocabularies.json").write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
