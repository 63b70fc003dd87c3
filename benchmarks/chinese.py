"""Teach the default English model Chinese: a longer vocabulary, a grown embedding, three stages.

    python benchmarks/chinese.py FILE... [--base runs/tiny/model] [--pieces 2048] [--steps 300] [--out DIR]

Each FILE is Chinese text, or JSON whose strings are. The default model is trained first unless --base names one.
Its byte-level vocabulary is merged with one that is trained on the Chinese text (`minillama tokenizer merge`),
and the model goes on from there on a mixture of Chinese and its own English: the embeddings alone, then
attention as well, then everything. A control goes on with the old vocabulary for as many steps. Before and
after, both languages' held-out text is scored in bits per byte, and tokens are counted. Written to OUT/chinese.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minillama import Decoder, Tokenizer
from minillama.data.sources import Source
from minillama.data.split import SplitSource
from minillama.evaluate.perplexity import score
from minillama.threads import adapt
from minillama.tokenizer import TokenizerTrainer
from minillama.tokenizer.merge import extend

HAN = re.compile(r"[\u3400-\u9fff]")
MARKDOWN = (".md", ".txt")
STAGES = """
[[stages]]
until_step = {first}
trainable = ["model.embed_tokens.*", "lm_head.*"]
[[stages]]
until_step = {second}
trainable = ["model.embed_tokens.*", "lm_head.*", "*.self_attn.*"]
[[stages]]
until_step = {last}
"""
CONFIG = """
name = "{name}"
[data]
sources = [{{ path = "{text}", weight = 0.75 }}, {{ name = "python-docs", weight = 0.25 }}]
[tokenizer]
path = "{tokenizer}"
[train]
init_from = "{base}"
init_embeddings = "mean"
steps = {last}
batch_size = 16
[optim]
lr = 3e-3
muon_lr = 0.02
warmup_steps = 20
[validate]
every = {last}
tokens = 16000
[sample]
prompts = ["子曰", "This module provides"]
max_new_tokens = 40
temperature = 0.5
[checkpoint]
every = {last}
"""


def documents(path: Path) -> Iterator[str]:
    """The Chinese texts of a file: each list of strings in JSON is one, and a whole Markdown file."""
    if path.suffix in MARKDOWN:
        yield path.read_text(encoding="utf-8")
        return

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            yield "\n".join(value)
        elif isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from walk(item)

    yield from (text for text in walk(json.loads(path.read_text(encoding="utf-8"))) if HAN.search(text))


def held_out(source: Source) -> list[str]:
    return [part.text for part in SplitSource(source, 0.05, "stop", 2**28).parts() if part.split == "val"]


def train(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "minillama", "train", *words], check=True)
    return time.perf_counter() - began


def measure(folder: Path, texts: list[str], limit: int = 60_000) -> dict[str, float]:
    """Bits a byte of a text, and tokens for each of its characters, Chinese ones alone where it has any."""
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    encoded = tokenizer.encode_batch(texts)
    ids = np.array([i for text in encoded for i in (tokenizer.bos_id, *text)], dtype=np.int64)
    size, step = sum(len(text.encode()) for text in texts), model.config.max_seq_len
    windows = (ids[at : at + step + 1] for at in range(0, min(limit, len(ids)) - 1, step))
    return {
        "bits_per_byte": score(model, windows, size / len(ids)).bits_per_byte,
        "tokens_per_character": sum(map(len, encoded)) / sum(map(len, texts)),
        "tokens": len(ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--pieces", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/chinese"))
    args = parser.parse_args()
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    base = args.base or out / "english/model"
    if args.base is None and not base.exists():
        train("--out", str(out / "english"))
    chinese = Source(path=str(out / "chinese.jsonl"))
    texts = [text for file in args.files for text in documents(file)]
    with open(chinese.path, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    known = [part.text for part in SplitSource(chinese, 0.05, "stop", 2**28).parts() if part.split == "train"]
    TokenizerTrainer("byte-bpe", args.pieces)(known).save(out / "tokenizer-chinese")
    grown = extend(base, out / "tokenizer-chinese")
    grown.tokenizer.save(out / "tokenizer-grown")
    print(f"{len(texts):,} Chinese texts, {sum(map(len, texts)):,} characters; {grown.merged:,} new pieces")
    runs: dict[str, Path] = {"before": base}
    seconds: dict[str, float] = {}
    for name, tokenizer in (("grown", out / "tokenizer-grown"), ("control", base)):
        first, second = args.steps // 4, args.steps // 2
        text = CONFIG.format(name=name, text=chinese.path, tokenizer=tokenizer, base=base, last=args.steps)
        text += STAGES.format(first=first, second=second, last=args.steps) if name == "grown" else ""
        (out / f"{name}.toml").write_text(text, encoding="utf-8")
        seconds[name] = train(str(out / f"{name}.toml"), "--out", str(out / name), "--overwrite")
        runs[name] = out / name / "model"
    languages = {"Chinese": held_out(chinese), "English": held_out(Source("python-docs"))}
    table = {run: {name: measure(path, held) for name, held in languages.items()} for run, path in runs.items()}
    print(f"\n| model | {' | '.join(f'{name}: bits per byte, tokens per character' for name in languages)} | seconds |")
    print("|---|---|---|---|")
    for run, row in table.items():
        cells = [f"{f['bits_per_byte']:.3f}, {f['tokens_per_character']:.3f}" for f in row.values()]
        print(f"| {run} | {' | '.join(cells)} | {seconds.get(run, 0):.0f} |")
    result = {"table": table, "seconds": seconds, "new_pieces": grown.merged, "steps": args.steps}
    (out / "chinese.json").write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    adapt()
    main()
