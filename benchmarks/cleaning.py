"""Cleaning beside datatrove and KenLM, its memory, and what it does to a model.

    python benchmarks/cleaning.py steps TEXTS...              documents per second per step; datatrove's where it has it
    python benchmarks/cleaning.py near TEXTS...               MinHash beside exact Jaccard, at most 2,000 documents
    python benchmarks/cleaning.py memory TEXTS...             peak memory on TEXTS once and ten times
    python benchmarks/cleaning.py kenlm TEXT [--kenlm DIR]    scores of 1,000 lines beside KenLM's, for one ARPA file
    python benchmarks/cleaning.py models SOURCES... --held-out TEXT --work DIR [--steps N] [--seeds 0 1 2]

TEXTS are training sources. datatrove counts the words of our splitter unless spaCy is installed, which it asks for.
`models` trains on the sources as they are read (pages extracted, nothing removed) and on what the english pipeline
keeps: one tokenizer, equal tokens, bits per byte of a clean text that is in neither.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minillama.data.cleaning.c4 import C4
from minillama.data.cleaning.document import Draft
from minillama.data.cleaning.extraction import Extract
from minillama.data.cleaning.fineweb import FineWeb
from minillama.data.cleaning.gopher import GopherQuality, GopherRepetition
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.language import Language
from minillama.data.cleaning.minhash import NearDuplicates, shingles
from minillama.data.cleaning.perplexity import PieceLM
from minillama.data.cleaning.personal import PersonalData
from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.repair import Repair
from minillama.data.cleaning.run import Cleaning
from minillama.data.cleaning.words import sentences, words
from minillama.data.sources import Source, documents

THEIRS = {
    "gopher-quality": "gopher_quality_filter.GopherQualityFilter",
    "gopher-repetition": "gopher_repetition_filter.GopherRepetitionFilter",
    "c4": "c4_filters.C4QualityFilter",
    "fineweb": "fineweb_quality_filter.FineWebQualityFilter",
}


def texts_of(names: list[str], limit: int = 10**9) -> list[str]:
    found = [document.text for name in names for document in documents(Source(name), "skip")]
    return found[:limit]


class Splitter:
    """Our words and sentences behind datatrove's interface."""

    def word_tokenize(self, text: str) -> list[str]:
        return list(words.__wrapped__(text))

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        ends, at = [], 0
        for sentence in sentences(text):
            at = text.index(sentence, at) + len(sentence)
            ends.append((0, at))
        return ends


def rate(function: Callable[[str], Any], texts: list[str], repeats: int = 3) -> float:
    """Documents per second, the best of some passes."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        for text in texts:
            words.cache_clear()
            function(text)
        best = max(best, len(texts) / (time.perf_counter() - start))
    return best


def steps(options: argparse.Namespace) -> None:
    from importlib import import_module
    from importlib.util import find_spec

    import datatrove.utils.text
    import datatrove.utils.word_tokenizers
    import xxhash
    from datatrove.data import Document
    from datatrove.pipeline.dedup import minhash

    if find_spec("spacy") is None:
        datatrove.utils.word_tokenizers.load_word_tokenizer = lambda language: Splitter()
        minhash.load_word_tokenizer = lambda language: Splitter()
    texts = texts_of(options.texts)
    print(f"{len(texts)} documents, {sum(map(len, texts)) / len(texts):,.0f} characters each")
    print(f"{'step':20} {'ours/s':>9} {'theirs/s':>9} {'ratio':>6}")
    ours = [
        Repair(),
        Language(),
        GopherQuality(),
        GopherRepetition(),
        C4(),
        FineWeb(),
        PersonalData(),
        NearDuplicates(),
    ]
    for step in ours:
        call = step.signature if isinstance(step, NearDuplicates) else lambda text, step=step: step(Draft(text))
        mine, theirs = rate(call, texts), 0.0
        if step.name in THEIRS:
            module, _, name = THEIRS[step.name].partition(".")
            filter = getattr(import_module(f"datatrove.pipeline.filters.{module}"), name)()

            def verdict(text: str, filter: Any = filter) -> None:
                datatrove.utils.text.split_into_parts.cache_clear()
                filter.filter(Document(text=text, id=""))

            theirs = rate(verdict, texts)
        elif isinstance(step, NearDuplicates):
            with tempfile.TemporaryDirectory() as folder:
                signer = minhash.MinhashDedupSignature(folder)
                signer._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())  # its own fails with xxhash 4
                theirs = rate(lambda text, signer=signer: signer.get_signature(signer.get_shingles(text)), texts)
        print(f"{step.name:20} {mine:9,.0f} " + (f"{theirs:9,.0f} {mine / theirs:6.2f}" if theirs else ""), flush=True)


def near(options: argparse.Namespace) -> None:
    texts = texts_of(options.texts, 2000)
    sets = [set(shingles(text, 5).tolist()) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        step = NearDuplicates()
        made = Cleaning(Pipeline("near", (Input(str(path)),), (step,)), Path(folder) / "out").run()
        kept = {json.loads(line)["id"] for line in _lines(Path(folder) / "out")}
    found = {i for i in range(len(texts)) if f"00000-0000-{i}" not in kept}
    true = set()
    for i, one in enumerate(sets):
        for other in sets[:i]:
            smaller, larger = sorted((len(one), len(other)))
            if smaller >= step.similarity * larger > 0 and len(one & other) >= step.similarity * len(one | other):
                true.add(i)
                break
    hits = len(found & true)
    print(f"{len(texts)} documents: {len(true)} with an earlier one of Jaccard similarity {step.similarity} or more")
    print(f"removed {len(found)}: precision {hits / max(len(found), 1):.3f}, recall {hits / max(len(true), 1):.3f}")
    print(made["decisions"])


def _lines(folder: Path) -> list[bytes]:
    import zstandard

    found = []
    for path in sorted(folder.glob("*.jsonl.zst")):
        with path.open("rb") as file:
            found += zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True).read().splitlines()
    return found


def memory(options: argparse.Namespace) -> None:
    texts = texts_of(options.texts)
    with tempfile.TemporaryDirectory() as folder:
        for times in (1, 10):
            path = Path(folder) / f"{times}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for copy in range(times):
                    file.writelines(json.dumps({"text": text.replace("e", f"e{copy}")}) + "\n" for text in texts)
            call = [sys.executable, __file__, "one", str(path), "--work", str(Path(folder) / f"out{times}")]
            output = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            print(f"{times:3} x {path.stat().st_size / times / 1e6:.1f} MB: {output.strip()}", flush=True)


def one(options: argparse.Namespace) -> None:
    pipeline = replace(Pipeline.load("english").with_sources(tuple(options.texts)), name="memory")
    made = Cleaning(pipeline, options.work, 2**22).run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{made['documents']} documents kept, peak {peak:.0f} MB")


def kenlm(options: argparse.Namespace) -> None:
    sys.path.insert(0, str(options.kenlm or ""))
    import kenlm as library

    from minillama.tokenizer import byte_tokenizer

    lines = [line for text in texts_of(options.texts) for line in text.split("\n") if line.strip()]
    tokenizer = byte_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        lm = PieceLM.train(lines[1000:], tokenizer, 5, normalize=False)
        lm.lm.write_arpa(Path(folder) / "a.arpa")
        theirs = library.Model(str(Path(folder) / "a.arpa"))
    worst, seconds = 0.0, [0.0, 0.0]
    for line in lines[:1000]:
        ids = lm.ids[tokenizer.encode(line)].tolist()
        start = time.perf_counter()
        mine = lm.lm.score(ids)
        middle = time.perf_counter()
        score = theirs.score(" ".join(lm.lm.tokens[i] for i in ids))
        seconds = [seconds[0] + middle - start, seconds[1] + time.perf_counter() - middle]
        worst = max(worst, abs(mine - score))
    start = time.perf_counter()
    lm.perplexity("\n".join(lines[:1000]))
    together = time.perf_counter() - start
    print(f"largest difference in log10: {worst:.2e}; seconds line by line {seconds[0]:.2f}, KenLM {seconds[1]:.2f}, "
          f"all at once with tokenization {together:.2f}")  # fmt: skip


def models(options: argparse.Namespace) -> None:
    from minillama.evaluate.perplexity import perplexity
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

    english, work = Pipeline.load("english").with_sources(tuple(options.texts)), options.work
    pipelines = {"raw": replace(english, name="raw", steps=(Extract(),)), "cleaned": english}
    for name, pipeline in pipelines.items():
        if not (work / name).exists():
            made = Cleaning(pipeline, work / name).run()
            print(f"{name}: {made['documents']} documents", flush=True)
    text, results = options.held_out.read_text(encoding="utf-8")[: options.characters], dict[str, list[float]]()
    tokenizer = work / f"cleaned-{options.seeds[0]}" / "model"
    for seed in options.seeds:
        for name in ("cleaned", "raw"):
            out = work / f"{name}-{seed}"
            words = ["--data.sources", work / name, "--train.steps", options.steps, "--seed", seed, "--out", out]
            words += ["--data.cache", work / "cache", "--checkpoint.every", options.steps, *options.more]
            words += ["--tokenizer.path", tokenizer] if tokenizer.exists() else []
            if not (out / "model").exists():
                subprocess.run([sys.executable, "train.py", *map(str, words)], check=True)
            model = Decoder.from_pretrained(out / "model")
            score = perplexity(model, Tokenizer.load(out / "model"), text)
            results.setdefault(name, []).append(score.bits_per_byte)
            print(f"{name}, seed {seed}: {score.bits_per_byte:.4f} bits per byte", flush=True)
    for name, values in results.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name}: {np.mean(values):.4f} +- {spread:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "near", "memory", "one", "kenlm", "models"])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--kenlm", type=Path, help="folder of the kenlm module")
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--characters", type=int, default=200_000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further arguments of train.py")
    options = parser.parse_args()
    parts = {"steps": steps, "near": near, "memory": memory, "one": one, "kenlm": kenlm, "models": models}
    parts[options.what](options)


if __name__ == "__main__":
    main()
