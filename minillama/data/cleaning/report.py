"""Report of a cleaning: one HTML file without scripts and links: funnel, distributions with thresholds, examples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from minillama.data.cleaning.document import Step
from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.tally import READ, Counts, Tally
from minillama.files import replace_file

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.15em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child,td.t{text-align:left}.bar{background:#4a7;height:.8em;display:inline-block}
figure{display:inline-block;margin:.5em 1em .5em 0}figcaption{font-size:13px}pre{white-space:pre-wrap;
overflow-wrap:anywhere;background:#f6f6f6;padding:.6em;margin:.3em 0 1em;max-height:14em;overflow:auto}
summary{cursor:pointer}.why{color:#a22}@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}
pre{background:#262626}td,th{border-color:#444}.why{color:#f88}}"""
_BINS, _WIDTH, _HEIGHT = 30, 240, 70


def write_report(path: Path, pipeline: Pipeline, tally: Tally, decisions: Mapping[str, Any]) -> None:
    """Write the report."""
    rows = tally.funnel(pipeline.steps)
    parts = [f"<h1>Cleaning: {escape(pipeline.name)}</h1>", _funnel(rows), _counts("Languages", tally.languages)]
    parts += [_counts("Hosts", dict(sorted(tally.hosts.items(), key=lambda item: (-item[1], item[0]))[:30]))]
    parts += [_decision(name, found) for name, found in decisions.items() if found]
    for number, step in enumerate([None, *pipeline.steps], READ):
        if number in tally.steps:
            parts.append(_step(step, tally.steps[number]))
    page = f"<!doctype html><meta charset=utf-8><title>{escape(pipeline.name)}</title><style>{_STYLE}</style>"
    replace_file(path, lambda file: file.write_text(page + "\n".join(parts), encoding="utf-8", errors="replace"))


def _table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{name}" for name in headers)
    return f"<table><tr>{head}{''.join('<tr>' + ''.join(f'<td>{cell}' for cell in row) for row in rows)}</table>"


def _funnel(rows: Sequence[Mapping[str, Any]]) -> str:
    documents, size = max(rows[0]["documents"], 1), max(rows[0]["bytes"], 1)
    lines = []
    for row in rows:
        share = row["documents"] / documents
        bar = f'<span class=bar style="width:{200 * share:.0f}px"></span>'
        removed = ", ".join(f"{count:,} {escape(reason)}" for reason, count in row["removed"].items())
        cells = [escape(row["step"]), f"{row['seen']:,}", f"{row['documents']:,}", f"{share:.1%}", bar]
        lines.append([*cells, f"{row['bytes']:,}", f"{row['bytes'] / size:.1%}", removed])
    headers = ["step", "seen", "documents left", "share", "", "bytes left", "share", "removed"]
    return "<h2>Funnel</h2>" + _table(headers, lines)


def _counts(title: str, counts: Mapping[str, int]) -> str:
    rows = [[escape(name), f"{count:,}"] for name, count in sorted(counts.items(), key=lambda item: -item[1])]
    return f"<h2>{title}</h2>" + _table(["", "documents kept"], rows) if rows else ""


def _decision(name: str, found: Mapping[str, Any]) -> str:
    """What was found over all documents; of clusters of near duplicates the largest."""
    said = ", ".join(f"{key} {_json(value)}" for key, value in found.items() if key != "largest")
    rows = [[escape(first), f"{size:,}"] for first, size in found.get("largest", ())]
    clusters = _table(["largest clusters: document kept", "documents"], rows) if rows else ""
    return f"<h2>{escape(name)} over all documents</h2><p>{said}</p>{clusters}"


def _step(step: Step | None, counts: Counts) -> str:
    parts = [f"<h2>{escape(step.key if step else 'read')}</h2>"]
    bounds = step.limits if step else ()
    measures = sorted({name for _, _, figures in counts.figures.items for name in figures})
    for measure in measures:
        values = [figures[measure] for _, _, figures in counts.figures.items if measure in figures]
        parts.append(_histogram(measure, values, [limit for name, limit, _ in bounds if name == measure]))
    for title, sample in ("kept", counts.kept_examples), ("removed", counts.removed_examples):
        shown = "".join(_example(item) for _, _, item in sample.items)
        parts += [f"<details><summary>{len(sample.items)} examples {title}</summary>{shown}</details>"] * bool(shown)
    return "".join(parts)


def _example(item: Mapping[str, Any]) -> str:
    reason, value, limit = (str(part) for part in item["removal"] or ("", "", ""))
    why = f"<span class=why>{escape(' '.join(filter(None, (reason, value, limit and f'(limit {limit})'))))}</span>"
    figures, text = _json(item["figures"]), escape(item["text"])
    return f"<div>{escape(item['where'])} {why}<br><small>{figures}</small></div><pre>{text}</pre>"


def _json(table: Any) -> str:
    return escape(json.dumps(table, ensure_ascii=False)[:4000], quote=False)


def _histogram(name: str, values: Sequence[float], bounds: Sequence[float]) -> str:
    """Histogram between the 1st and 99th percentiles, as SVG, with the thresholds that lie near."""
    low, high = np.percentile(values, [1, 99]).tolist()
    near = [bound for bound in bounds if low - 2 * (high - low) <= bound <= high + 2 * (high - low)]
    low, high = min([low, *near]), max([high, *near])
    width = (high - low) or 1.0
    bins = np.histogram(values, _BINS, (low, low + width))[0].tolist()
    step, top = _WIDTH / _BINS, max(*bins, 1)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT * (1 - count / top):.1f}" width="{step - 0.5:.1f}" '
        f'height="{_HEIGHT * count / top:.1f}" fill="#4a7"/>'
        for i, count in enumerate(bins)
        if count
    )
    lines = "".join(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{_HEIGHT}" stroke="#c33" stroke-width="2"/>'
        for x in ((bound - low) / width * _WIDTH for bound in near)
    )
    limit = f"; limit {', '.join(f'{bound:g}' for bound in bounds)}" if bounds else ""
    label = f"{escape(name.replace('_', ' '))}: {low:.4g} to {high:.4g}{limit}"
    svg = f'<svg width="{_WIDTH}" height="{_HEIGHT}">{bars}{lines}</svg>'
    return f"<figure>{svg}<figcaption>{label}</figcaption></figure>"
