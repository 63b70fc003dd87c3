"""Cleaning beside datatrove and KenLM, its memory, and what it does to a model.

    python benchmarks/cleaning.py steps TEXTS...              documents per second per step; datatrove's where it has it
    python benchmarks/cleaning.py pages FOLDER                token 4-grams of marked articles, beside the library's
    python benchmarks/cleaning.py languages FILES...          share of the lines of FLORES-200 whose language is found
    python benchmarks/cleaning.py near TEXTS...               MinHash beside exact Jaccard, at most 2,000 documents
    python benchmarks/cleaning.py memory TEXTS...             peak memory on TEXTS twice and twenty times
    python benchmarks/cleaning.py kenlm TEXT [--kenlm DIR]    scores of 1,000 lines beside KenLM's, for one ARPA file
    python benchmarks/cleaning.py models SOURCES... --held-out TEXT --work DIR [--steps N] [--seeds 0 1 2]

TEXTS are training sources. datatrove counts the words of our splitter unless spaCy is installed, which it asks for.
`models` trains on the sources as they are read (pages extracted, nothing removed) and on what the english pipeline
keeps: tokens are bytes, as many for both, and the result is bits per byte of a clean text that is in neither.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minillama.data.cleaning.c4 import C4, MC4
from minillama.data.cleaning.document import Draft
from minillama.data.cleaning.extraction import Extract
from minillama.data.cleaning.fineweb import FineWeb
from minillama.data.cleaning.gopher import GopherQuality, GopherRepetition
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.language import Language, identify
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
    "mc4": "c4_filters.C4ParagraphFilter",
    "fineweb": "fineweb_quality_filter.FineWebQualityFilter",
}
FORMATTERS = {"repair": "FTFYFormatter", "personal-data": "PIIFormatter"}


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


def rates(functions: list[Callable[[str], Any]], texts: list[str], repeats: int = 5) -> list[float]:
    """Documents per second of CPU time of each function, in turn; the best of some passes."""
    best = [0.0] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.process_time()
            for text in texts:
                words.cache_clear()
                function(text)
            best[i] = max(best[i], len(texts) / (time.process_time() - start))
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
    ours = [Repair(), Language(), GopherQuality(), GopherRepetition(), C4(), MC4(), FineWeb(),
            PersonalData(kinds=("email", "ip")), NearDuplicates()]  # fmt: skip
    for step in ours:
        is_minhash, theirs = isinstance(step, NearDuplicates), None
        call = step.signature if is_minhash else lambda text, step=step: step(Draft(text))
        if step.name in THEIRS:
            module, _, name = THEIRS[step.name].partition(".")
            filter = getattr(import_module(f"datatrove.pipeline.filters.{module}"), name)()

            def theirs(text: str, filter: Any = filter) -> None:
                datatrove.utils.text.split_into_parts.cache_clear()
                filter.filter(Document(text=text, id=""))

        elif step.name in FORMATTERS:
            theirs = getattr(import_module("datatrove.pipeline.formatters"), FORMATTERS[step.name])().format
        elif is_minhash:
            signer = minhash.MinhashDedupSignature(tempfile.mkdtemp())
            signer._hash_func = lambda text: xxhash.xxh64_intdigest(text.encode())  # its own fails with xxhash 4

            def theirs(text: str, signer: Any = signer) -> None:
                signer.get_signature(signer.get_shingles(text))

        mine, *other = rates([call, theirs] if theirs else [call], texts)
        print(f"{step.name:20} {mine:9,.0f} " + "".join(f"{one:9,.0f} {mine / one:6.2f}" for one in other), flush=True)


def pages(options: argparse.Namespace) -> None:
    import trafilatura

    folder = Path(options.texts[0])  # of article-extraction-benchmark
    truth = json.loads((folder / "ground-truth.json").read_text(encoding="utf-8"))
    found = dict[str, list[tuple[float, float, float]]]()
    for path in sorted(folder.glob("*.html.gz")):
        (page,) = Input(str(folder)).documents(path)
        article = truth[path.name.partition(".")[0]]["articleBody"]
        theirs = trafilatura.extract(gzip.decompress(path.read_bytes())) or ""
        found.setdefault("trafilatura", []).append(agreement(article, theirs))
        Extract()(page)
        found.setdefault("extract", []).append(agreement(article, page.text))
    for name, values in found.items():
        precision, recall, f1 = np.mean(values, 0)
        print(f"{name}: {len(values)} pages, precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}")


def agreement(truth: str, text: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of token 4-grams."""
    want, have = (Counter(zip(*(re.findall(r"\w+", one)[i:] for i in range(4)), strict=False)) for one in (truth, text))
    hits = (want & have).total()
    precision, recall = hits / have.total() if have else 1.0, hits / want.total()
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


def languages(options: argparse.Namespace) -> None:
    for path in map(Path, options.texts):
        lines = path.read_text(encoding="utf-8").splitlines()
        code, count = Counter(identify(line)[0] for line in lines).most_common(1)[0]
        print(f"{path.name}: {code} {count / len(lines):.4f} of {len(lines)} lines")


def near(options: argparse.Namespace) -> None:
    texts = [edited(text, i) for text in texts_of(options.texts) for i in range(options.edited + 1)][:2000]
    sets = [set(shingles(text, options.near.get("ngram", 5)).tolist()) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        step = NearDuplicates(**options.near)
        made = Cleaning(Pipeline("near", (Input(str(path)),), (step,)), Path(folder) / "out").run()
        kept = {json.loads(line)["id"] for line in _lines(Path(folder) / "out")}
    found = {i for i in range(len(texts)) if f"00000-0000-{i}" not in kept}
    best = [0.0] * len(sets)  # similarity to the most similar one before
    for i, one in enumerate(sets):
        for other in sets[:i]:
            smaller, larger = sorted((len(one), len(other)))
            if smaller > max(best[i], 0.3) * larger:
                shared = len(one & other)
                best[i] = max(best[i], shared / (smaller + larger - shared))
    true = {i for i, similarity in enumerate(best) if similarity >= step.similarity}
    hits = len(found & true)
    print(f"{len(texts)} documents: {len(true)} with an earlier one of Jaccard similarity {step.similarity} or more")
    print(f"removed {len(found)}: precision {hits / max(len(found), 1):.3f}, recall {hits / max(len(true), 1):.3f}")
    for name, wrong in ("removed in error", found - true), ("missed", true - found):
        shown = sorted(best[i] for i in wrong) or [0.0]
        print(f"{len(wrong)} {name}, of similarities from {shown[0]:.3f} to {shown[-1]:.3f}")
    print(made["decisions"])


def edited(text: str, percent: int) -> str:
    """Text of which some percent of the words, drawn at random, are replaced."""
    draw = random.Random(f"{percent} {text[:50]}")
    return " ".join("edited" if 100 * draw.random() < percent else word for word in text.split(" "))


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
        for times in (2, 20):
            path = Path(folder) / f"{times}.jsonl"
            with path.open("w", encoding="utf-8") as file:
                for copy in range(times):
                    file.writelines(json.dumps({"text": shuffled(text, copy)}) + "\n" for text in texts)
            call = [sys.executable, __file__, "one", str(path), "--work", str(Path(folder) / f"out{times}")]
            output = subprocess.run(call, check=True, capture_output=True, text=True).stdout
            print(f"{path.stat().st_size / 1e6:.1f} MB in parts of 256 KiB: {output.strip()}", flush=True)


def shuffled(text: str, seed: int) -> str:
    """Text with the words of each line in another order: no duplicate, and not worse by the rules; 0: as it is."""
    draw = random.Random(f"{seed} {text[:50]}")
    lines = [line.split(" ") for line in text.split("\n")]
    return "\n".join(" ".join(draw.sample(line, len(line)) if seed else line) for line in lines)


def one(options: argparse.Namespace) -> None:
    pipeline = replace(Pipeline.load("english").with_sources(tuple(options.texts)), name="memory")
    made = Cleaning(pipeline, options.work, 2**18).run()
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
        if not (work / name / "cleaned.json").exists():
            made = Cleaning(pipeline, work / name).run()
            print(f"{name}: {made['documents']} documents", flush=True)
    text, results = options.held_out.read_text(encoding="utf-8")[: options.characters], dict[str, list[float]]()
    for seed in options.seeds:
        for name in ("cleaned", "raw"):
            out = work / f"{name}-{seed}"
            words = ["--data.sources", work / name, "--train.steps", options.steps, "--seed", seed, "--out", out]
            words += ["--data.cache", work / "cache", "--checkpoint.every", options.steps, "--tokenizer.kind", "bytes"]
            words += ["--model.dim", 64, "--model.n_layers", 2, "--model.hidden_dim", 176, "--train.compile", "false"]
            words += ["--train.batch_size", 8, "--train.context", 128, "--validate.tokens", 1000, *options.more]
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
    parser.add_argument("what", choices=["steps", "pages", "languages", "near", "memory", "one", "kenlm", "models"])
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--near", type=json.loads, default={}, help='settings of near-duplicates, {"ngram": 3}')
    parser.add_argument(
        "--edited", type=int, default=0, help="copies of each text with 1, 2, 3 ... percent of other words"
    )
    parser.add_argument("--kenlm", type=Path, help="folder of the kenlm module")
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--characters", type=int, default=20_000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further arguments of train.py")
    options = parser.parse_args()
    parts = [steps, pages, languages, near, memory, one, kenlm, models]
    {part.__name__: part for part in parts}[options.what](options)


if __name__ == "__main__":
    main()
