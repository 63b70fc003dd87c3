"""Known answers of CCNet; MinHash beside exact Jaccard, and on real near duplicates."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from minillama.data.cleaning.ccnet import normalized_for_duplicates, replace_punctuation
from minillama.data.cleaning.grouping import Rows, Verdicts, groups, hash64
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.minhash import NearDuplicates, shingles


def test_ccnets_normalization_and_hash() -> None:
    assert normalized_for_duplicates("０２３´∶：\x10 | ;012 hèllo") == "000 | ;000 hèllo"
    assert hash64(normalized_for_duplicates("Hello, World! 1234")) == 11674755562747009314
    signs = "，。、„”“«»１」「《》´∶：？！（）；–—．～’…━〈〉【】％"
    assert replace_punctuation(signs) == ',.,""""""""""\'::?!();- - . ~\'...-<>[]%'


def test_groups_do_not_depend_on_the_size_of_chunks(tmp_path: Path) -> None:
    rng, paths = random.Random(0), []
    for part in range(3):
        rows = Rows()
        for i in range(50):
            rows.add_row(hash64(str(rng.randrange(60))), i, i % 3)
        rows.save(tmp_path / f"{part}.rows")
        paths.append(tmp_path / f"{part}.rows")
    whole = [sorted(zip(*(part.tolist() for part in group[:2]), strict=True)) for group in groups(paths)]
    pieces = [pair for group in groups(paths, 7) for pair in zip(*(part.tolist() for part in group[:2]), strict=True)]
    assert len(whole) == 1 and sorted(pieces) == whole[0] and len(pieces) > 100
    for group in groups(paths, 7):
        assert (group.first <= np.arange(len(group.first))).all() and (group.sizes > 1).all()


def test_verdicts_come_back_by_part(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path)
    verdicts.add(np.array([2 << 32 | 5, 7, 2 << 32 | 1], np.uint64), np.array([1, 2, 3], np.uint64), 0.5)
    assert verdicts.read(2)["document"].tolist() == [1, 5] and verdicts.read(1).size == 0
    assert verdicts.read(0)["other"].tolist() == [2]


def test_minhash_estimates_jaccard() -> None:
    rng, step, errors = random.Random(1), NearDuplicates(), []
    vocabulary = [f"w{i}" for i in range(5000)]
    for _ in range(150):
        one = rng.choices(vocabulary, k=300)
        other = [rng.choice(vocabulary) if rng.random() < 0.05 else word for word in one]
        texts = " ".join(one), " ".join(other)
        sets = [set(shingles(text, 5).tolist()) for text in texts]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        errors.append((step.signature(texts[0]) == step.signature(texts[1])).mean() - exact)
    assert abs(np.mean(errors)) < 0.01 and np.sqrt(np.mean(np.square(errors))) < 0.05


def test_real_near_duplicates(clean: Any, shared: Path) -> None:
    source = Input(str(shared / "web/dedup/demo-dataset-deduplication.jsonl"))
    kept, removed = clean([source], NearDuplicates())
    pairs = {(line["removed"]["value"].rpartition("-")[2], line["id"].rpartition("-")[2]) for line in removed}
    assert pairs == {("6", "11"), ("7", "8"), ("9", "10"), ("12", "13")} and len(kept) == 10


def test_two_editions_of_the_tang_poems(clean: Any, shared: Path) -> None:
    """Of the 168 poems of three volumes 153 have a 3-gram Jaccard similarity over 0.6 to one of the other edition."""
    files = [shared / "text" / "zh" / f"{name}.json" for name in ("poet.tang.0", *(f"yuding.00{i}" for i in (1, 2, 3)))]
    _, removed = clean(map(Input, map(str, files)), NearDuplicates(ngram=3, bands=28, rows=4, similarity=0.6))
    found = {line["where"] for line in removed if line["source"] == "yuding"}
    first, *volumes = (
        [set(shingles("\n".join(poem["paragraphs"]), 3).tolist()) for poem in json.loads(path.read_text())]
        for path in files
    )
    near = [
        {f"{path}, record {i}" for i, a in enumerate(volume, 1) if any(len(a & b) > 0.6 * len(a | b) for b in first)}
        for path, volume in zip(files[1:], volumes, strict=True)
    ]
    assert [len(poems) for poems in near] == [78, 12, 63]  # as shared/data/README.md counts them
    assert len(found ^ set().union(*near)) <= 6, found ^ set().union(*near)
