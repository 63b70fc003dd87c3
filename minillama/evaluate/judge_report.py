"""Report of a comparison: win rates and the judge's biases, ratings, and an HTML page of text alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, Literal, NamedTuple

from minillama.evaluate.comparison import estimate, wilson
from minillama.evaluate.judge import Answers, Question, Verdict

CLOSE = 0.1  # ratings that differ by this are a tie
Values = Mapping[str, str | None]
"""Values of verdicts by question/turn/order, or question/turn/side."""
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd}"
    ".pair{display:grid;grid-template-columns:1fr 1fr;gap:1em}summary{color:#666}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.8em;margin:.3em 0;font:inherit}"
    "h2{margin-top:2em;border-top:2px solid #ddd;padding-top:.6em}"
    "@media(prefers-color-scheme:dark){body{background:#1b1b1b;color:#ddd}pre{background:#262626}}"
)


class Table(NamedTuple):
    """Rows under headers, notes below, and the figures for a file."""

    headers: list[str]
    rows: list[list[str]]
    notes: list[str]
    figures: dict[str, Any]


def values_of(verdicts: Mapping[str, Verdict]) -> dict[str, str | None]:
    """Values by the keys without their hashes."""
    return {key.rpartition("/")[0]: verdict.value for key, verdict in verdicts.items()}


def outcome(first: str | None, second: str | None) -> Literal["A", "B", "tie", "disagree", "error"]:
    """Outcome of both orders, A being shown first in the first one: a win counts only if both agree."""
    if first is None or second is None:
        return "error"
    if (first, second) in (("A", "B"), ("B", "A"), ("C", "C")):
        return "tie" if first == "C" else "A" if first == "A" else "B"
    return "disagree"


def tally(pairs: Sequence[tuple[str | None, str | None, int, int]]) -> dict[str, Any]:
    """Counts of turns, and the biases of the judge.

    Args:
        pairs: verdicts of both orders, and the lengths of the answers of A and B.

    Returns:
        Counts of A, B, tie, disagree, error; `rate`, (wins of A + half of ties and disagreements) / all without errors;
        `first` and `longer`, the share of single verdicts, no ties, for the answer shown first and for the longer one.
        Each share is followed by its Wilson interval and the number of cases.
    """
    found = [outcome(first, second) for first, second, _, _ in pairs]
    counts: dict[str, Any] = {name: found.count(name) for name in ("A", "B", "tie", "disagree", "error")}
    first_shown, longer = [], []
    for one, other, a, b in pairs:
        for value, shown, hidden in ((one, a, b), (other, b, a)):
            first_shown += [value == "A"] if value in ("A", "B") else []
            longer += [(value == "A") == (shown > hidden)] if value in ("A", "B") and shown != hidden else []
    n = len(found) - counts["error"]
    rate = (counts["A"] + (counts["tie"] + counts["disagree"]) / 2) / n if n else 0.5
    return counts | {"rate": (rate, *wilson(rate, n), n), "first": _share(first_shown), "longer": _share(longer)}


def _share(values: Sequence[bool]) -> tuple[float, float, float, int]:
    share = sum(values) / len(values) if values else 0.5
    return share, *wilson(share, len(values)), len(values)


def _groups(questions: Sequence[Question], pair: Callable[[int, int], Any]) -> dict[str, list[Any]]:
    """Pairs of turns by category, by kind and by turn where there are several, and of all."""
    groups: dict[str, list[Any]] = {}
    kinds: dict[str, list[Any]] = {}
    turns: dict[str, list[Any]] = {}
    for i, question in enumerate(questions):
        for turn in range(len(question.turns)):
            groups.setdefault(question.category, []).append(pair(i, turn))
            turns.setdefault(f"turn {turn + 1}", []).append(pair(i, turn))
            if question.kind:
                kinds.setdefault(f"{question.category}: {question.kind}", []).append(pair(i, turn))
    return groups | kinds | (turns if len(turns) > 1 else {}) | {"all": [one for own in turns.values() for one in own]}


def pairwise(questions: Sequence[Question], ours: Answers, theirs: Answers, values: Values) -> Table:
    """Win rates by category, with length and order beside them."""

    def pair(i: int, turn: int) -> tuple[str | None, str | None, int, int]:
        orders = (values.get(f"{questions[i].id}/{turn}/{order}") for order in (0, 1))
        return *orders, len(ours[i][turn]), len(theirs[i][turn])  # type: ignore[return-value]

    tallies = {name: tally(pairs) for name, pairs in _groups(questions, pair).items()}
    rows = [
        [name, *(str(one[key]) for key in ("A", "B", "tie", "disagree", "error")), *map(_percent, map(one.get, SHARES))]
        for name, one in tallies.items()
    ]
    notes = [
        "win rate: wins and half of ties and disagreements, errors left out; first shown, longer: share of the "
        "verdicts for the answer shown first, and for the longer one; with 95 % intervals"
    ]
    for key, name in (("first", "the answer shown first"), ("longer", "the longer answer")):
        share, low, high, n = tallies["all"][key]
        if low > 0.5 or high < 0.5:
            way = "for" if low > 0.5 else "against"
            notes.append(f"the judge decides {way} {name}: {share:.0%} of {n} verdicts")
    if errors := tallies["all"]["error"]:
        notes.append(f"{errors} turns lack a verdict, or have several, and count neither as a win nor as a tie")
    headers = ["category", "A wins", "B wins", "ties", "disagree", "errors", "A's win rate", "first shown", "longer"]
    return Table(headers, rows, notes, tallies)


SHARES = ("rate", "first", "longer")


def _percent(share: Any) -> str:
    if not share[3]:
        return "-"
    return "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * value for value in share[:3]))


def single(questions: Sequence[Question], values: Values) -> Table:
    """Mean ratings by category, and which of the two is higher."""
    rows, figures = [], {}

    def pair(i: int, turn: int) -> tuple[str | None, ...]:
        return tuple(values.get(f"{questions[i].id}/{turn}/{side}") for side in "ab")

    for name, found in _groups(questions, pair).items():
        pairs = [tuple(v if v is not None and 1 <= float(v) <= 10 else None for v in both) for both in found]
        cells, entry = [name, str(len(pairs))], dict[str, Any]()
        for side, own in zip("ab", zip(*pairs, strict=True), strict=True):
            ratings = [float(value) for value in own if value is not None]
            mean = estimate(ratings) if ratings else None
            cells += [f"{mean.mean:.2f} ±{mean.error:.2f}" if mean else "-", str(len(own) - len(ratings))]
            entry[side] = {
                "rating": mean and mean.mean,
                "stderr": mean and mean.error,
                "errors": len(own) - len(ratings),
            }
        gaps = [float(a) - float(b) for a, b in pairs if a is not None and b is not None]
        higher = [sum(gap > CLOSE for gap in gaps), sum(gap < -CLOSE for gap in gaps)]
        gap = estimate(gaps) if gaps else None
        shown = "{:+.2f} [{:+.2f}, {:+.2f}]".format(gap.mean, *gap.interval) if gap else "-"
        rows.append([*cells, shown, *map(str, higher), str(len(gaps) - sum(higher))])
        entry["difference"] = gap and {"mean": gap.mean, "stderr": gap.error, "interval": gap.interval}
        figures[name] = entry | {"a_higher": higher[0], "b_higher": higher[1], "ties": len(gaps) - sum(higher)}
    headers = ["category", "turns", "A's rating", "no rating", "B's rating", "no rating", "A - B"]
    notes = [
        "ratings from 1 to 10 ± standard error; A - B with a 95 % interval, turn by turn; up to 0.1 apart is a tie"
    ]
    return Table([*headers, "A higher", "B higher", "ties"], rows, notes, figures)


def page(
    names: Sequence[str],
    table: Table,
    questions: Sequence[Question],
    answers: Sequence[Answers],
    texts: Mapping[str, str],
) -> str:
    """HTML page: the table, and for every turn both answers side by side with the texts of the verdicts.

    Args:
        names: of A and B.
        table: of the figures.
        questions: in the order in which they are shown.
        answers: of A and of B.
        texts: of verdicts, by the keys without their hashes.
    """
    lines = [("th", table.headers), *(("td", row) for row in table.rows)]
    cells = ("".join(f"<{tag}>{escape(text)}</{tag}>" for text in row) for tag, row in lines)
    parts = [f"<h1>{escape(' and '.join(names))}</h1><table>", *(f"<tr>{row}</tr>" for row in cells), "</table>"]
    parts += [f"<p>{escape(note)}</p>" for note in table.notes]
    for i, question in enumerate(questions):
        parts.append(f"<h2>{escape(question.id)}, {escape(question.category)}</h2>")
        for turn, said in enumerate(question.turns):
            shown = [
                f"<div><b>{escape(n)}</b><pre>{escape(a[i][turn])}</pre></div>"
                for n, a in zip(names, answers, strict=True)
            ]
            parts.append(f"<pre>{escape(said)}</pre><div class=pair>{''.join(shown)}</div>")
            for key in (f"{question.id}/{turn}/{place}" for place in "01ab"):
                label = {"0": "A shown first", "1": "B shown first", "a": "A", "b": "B"}[key[-1]]
                if key in texts:
                    parts.append(
                        f"<details><summary>verdict, {label}</summary><pre>{escape(texts[key])}</pre></details>"
                    )
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    head = f"<!doctype html><html><head><meta charset=utf-8><title>Comparison</title>{policy}<style>{_STYLE}</style>"
    return f"{head}</head><body>{''.join(parts)}</body></html>\n"
