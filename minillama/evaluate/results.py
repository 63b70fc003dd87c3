"""Results of an evaluation in a folder: a line per item, from which a stopped one goes on, and the summary."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.evaluate.comparison import Estimate, average, estimate, paired
from minillama.evaluate.multiple_choice import Outcome, fingerprint
from minillama.evaluate.task import Item, Task
from minillama.files import append_lines, complete_records, parsing, read_json, replace_text

ITEMS, MODEL = "items.jsonl", "model.json"
Key = tuple[str, str, str]


class ResultFolder:
    """Folder of one model's outcomes, in any style.

    Args:
        path: the folder; made for the first outcome if it is not there.
        model: what the outcomes depend on besides the items.

    Attributes:
        known: outcomes by set, id and prompt.

    Raises:
        InputError: it has another model's.
    """

    def __init__(self, path: Path, model: Mapping[str, Any]) -> None:
        self.path, self.model = path, dict(model)
        if (path / MODEL).exists():
            saved = read_json(path / MODEL)
            changed = sorted(key for key in saved.keys() | model.keys() if saved.get(key) != model.get(key))
            if changed:
                found = ", ".join(f"{key} {saved.get(key)!r}" for key in changed)
                expected = ", ".join(f"{key} {model.get(key)!r}" for key in changed)
                what = "this folder has the results of another model"
                raise InputError(what, where=path, found=found, expected=expected, fix="give another --output")
        self.known = read_outcomes(path / ITEMS, cuts=True)

    def missing(self, name: str, items: Sequence[Item]) -> list[Item]:
        """Items of a set without an outcome."""
        return [item for item in items if (name, item.id, fingerprint(item)) not in self.known]

    def add(self, outcome: Outcome) -> None:
        """Append an outcome to the file."""
        self.known[outcome.task, outcome.id, outcome.prompt] = outcome
        self.claim()
        append_lines(self.path / ITEMS, [asdict(outcome)])

    def claim(self) -> None:
        """Write down whose results the folder has."""
        if not (self.path / MODEL).exists():
            replace_text(self.path / MODEL, json.dumps(self.model, indent=2) + "\n")

    def of(self, name: str, items: Sequence[Item]) -> list[Outcome]:
        """Outcomes of a set's items that there are."""
        keys = ((name, item.id, fingerprint(item)) for item in items)
        return [self.known[key] for key in keys if key in self.known]


def read_outcomes(path: Path, cuts: bool = False) -> dict[Key, Outcome]:
    """Outcomes of a file; see `complete_records`.

    Raises:
        InputError: a line that is not an outcome.
    """
    outcomes = complete_records(path, Outcome.of, "this line is not an outcome", cuts)
    return {(outcome.task, outcome.id, outcome.prompt): outcome for outcome in outcomes}


def summary(task: Task, style: str, found: Sequence[Outcome], others: Mapping[Key, Outcome] | None) -> dict[str, Any]:
    """Figures of a set: accuracies with standard errors, the best constant answer, and the paired difference.

    Args:
        found: outcomes, at least one.
        others: of another model; no difference is given where it has none of these items.
    """
    own = task.forms[style].metric
    values: dict[str, Any] = {"title": task.title, "items": len(found), "metric": own}
    values["truncated"] = sum(one.truncated for one in found)
    for metric in found[0].metrics:
        accuracy = estimate([one.is_right(metric) for one in found])
        values |= {metric: accuracy.mean, f"{metric}_stderr": accuracy.error}
    golds = [one.gold for one in found]
    values["constant"] = max(map(golds.count, set(golds))) / len(golds)
    subjects: dict[str, list[bool]] = {}
    for one in found:
        subjects.setdefault(one.subject, []).append(one.is_right(own))
    if len(subjects) > 1:
        means = {name: sum(right) / len(right) for name, right in sorted(subjects.items())}
        values |= {"mean_of_subjects": sum(means.values()) / len(means), "subjects": means}
    pairs = [(a, others[key]) for a in found if (key := (a.task, a.id, a.prompt)) in others] if others else []
    if pairs:
        ours, theirs = ([one.is_right(own) for one in side] for side in zip(*pairs, strict=True))
        change = paired(ours, theirs)
        values["against"] = {
            "items": change.n,
            own: sum(theirs) / len(theirs),
            "difference": change.mean,
            "stderr": change.error,
            "interval": change.interval,
        }
    return values


def earlier(path: Path, limit: int, against: str | None) -> dict[str, Any]:
    """Sets of an earlier summary with the same limit, without the differences from another model than `against`."""
    saved = read_json(path) if path.exists() else {}
    if saved.get("limit") != limit:
        return {}
    is_same = saved.get("against") == against
    with parsing(path):
        sets = saved["sets"].items()
        return {name: {k: v for k, v in one.items() if is_same or k != "against"} for name, one in sets}


def mean_of(sets: Mapping[str, Mapping[str, Any]]) -> Estimate:
    """Mean over sets of the accuracies by which the style reports them."""
    return average(
        [Estimate(one[one["metric"]], one[f"{one['metric']}_stderr"], one["items"]) for one in sets.values()]
    )


def table(sets: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows, in percent; the accuracy by which the style reports a set has a star."""
    shown = ["acc", "acc_norm", "acc_bytes", "acc_pmi"]
    if all(one.get("acc_bytes") == one.get("acc_norm") for one in sets.values()):
        shown.remove("acc_bytes")  # in English
    metrics = [metric for metric in shown if any(metric in one for one in sets.values())]
    has_other = any("against" in one for one in sets.values())
    rows = []
    for one in sets.values():
        cells = [one["title"], str(one["items"])]
        for metric in metrics:
            star = "*" if metric == one["metric"] else ""
            cells.append(
                f"{one[metric]:.2%} ±{one[f'{metric}_stderr']:.2%}{star}".replace("%", "") if metric in one else ""
            )
        cells.append(f"{100 * one['constant']:.2f}")
        if "against" in one:
            low, high = one["against"]["interval"]
            of = one["against"]["items"]
            few = f", {of} items" * (of != one["items"])
            cells.append(f"{100 * one['against']['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]{few}")
        elif has_other:
            cells.append("")
        rows.append(cells)
    if len(sets) > 1:
        mean = mean_of(sets)
        blank = [""] * (len(metrics) - 1 + 1 + has_other)
        rows.append(["mean of *", str(mean.n), f"{100 * mean.mean:.2f} ±{100 * mean.error:.2f}", *blank])
    return ["set", "items", *metrics, "constant", *["difference"] * has_other], rows


def markdown(sets: Mapping[str, Mapping[str, Any]], lines: Sequence[str]) -> str:
    """The table in Markdown, and lines below it."""
    headers, rows = table(sets)
    cells = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(["| " + " | ".join(row) + " |" for row in cells] + ["", *lines]) + "\n"
