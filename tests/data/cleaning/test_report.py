"""Report and tally: counts add up, samples do not depend on the order, nothing from a document becomes markup."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from minillama.data.cleaning.duplicates import ExactDuplicates
from minillama.data.cleaning.gopher import GopherQuality
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.minhash import NearDuplicates
from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.run import Cleaning
from minillama.data.cleaning.tally import Sample, Tally


def test_samples_do_not_depend_on_the_order() -> None:
    items = [(random.Random(i).randrange(10**6), str(i), i) for i in range(100)]
    results = []
    for seed in range(3):
        random.Random(seed).shuffle(items)
        parts = [Sample(7), Sample(7)]
        for i, (key, name, item) in enumerate(items):
            if parts[i % 2].wants(key):
                parts[i % 2].add(key, name, item)
        for entry in parts[1].items:
            parts[0].add(*entry)
        results.append(parts[0].items)
    assert results[0] == results[1] == results[2] and len(results[0]) == 7


def test_report_has_every_step_and_escapes(tmp_path: Path) -> None:
    text = "the <script>alert(1)</script> and of to be with that have <b>bold</b> \ud800".encode(
        errors="replace"
    ).decode()
    lines = [text + " word" * 60, text, text + " word" * 60, "短", text + " word" * 61]
    (tmp_path / "a.jsonl").write_text(
        "".join(f'{{"text": "{line}", "url": "http://x.org/{i}"}}\n' for i, line in enumerate(lines))
    )
    steps = (GopherQuality(), ExactDuplicates(), NearDuplicates(similarity=0.5))
    made = Cleaning(Pipeline("p<q", (Input(str(tmp_path / "a.jsonl")),), steps), tmp_path / "out").run()
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert (
        "<script" not in page and "<b>" not in page and "p&lt;q" in page and "href" not in page and "src=" not in page
    )
    assert all(f"<h2>{step.name}</h2>" in page for step in steps) and page.count("<svg") >= 8 and "x.org" in page
    assert "<td>00000-0000-0<td>2" in page and "duplicates 1" in page
    assert re.search(r"limit 50", page) and "&lt;script&gt;" in page
    funnel = {row["step"]: row for row in made["steps"]}
    assert funnel["read"]["documents"] == 5 and funnel["gopher-quality"]["removed"] == {"words": 2}
    assert [row["documents"] for row in made["steps"]] == [5, 3, 2, 1] and made["documents"] == 1
    assert made["steps"][-1]["bytes"] == len(lines[0].encode())


def test_an_empty_tally_makes_a_funnel() -> None:
    assert Tally().funnel([])[0]["documents"] == 0


def test_datatroves_executors_give_the_same_bytes(tmp_path: Path, shared: Path) -> None:
    from minillama.data.cleaning.datatrove import executors

    source = Input(str(shared / "web/dedup"), "d", suffixes=(".jsonl",))
    pipeline = Pipeline(
        "p", (source,), (GopherQuality(min_words=1, min_stop_words=0), ExactDuplicates(), NearDuplicates())
    )
    Cleaning(pipeline, tmp_path / "one", 4096).run()
    for executor in executors(Cleaning(pipeline, tmp_path / "two", 4096), tasks=2, workers=1):
        executor.run()
    found: list[dict[str, Any]] = [
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("one", "two")
    ]
    assert found[0] == found[1] and len(found[0]) > 4
