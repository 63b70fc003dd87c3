"""HTML report of a comparison: figures, and the answers of both models side by side. Text alone, no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from minillama.evaluate.judge import Question, Verdict, outcome

_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.pair{display:grid;grid-template-columns:1fr 1fr;gap:1em}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f6f6f4;padding:.8em;margin:.3em 0;font:inherit}"
    "h2{margin-top:2em;border-top:2px solid #ddd;padding-top:.6em}.win{outline:2px solid #4a7}summary{color:#666}"
    "@media(prefers-color-scheme:dark){body{background:#1b1b1b;color:#ddd}pre{background:#262626}}"
)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_cells(headers, "th"), *(_cells(row, "td") for row in rows)]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cells(texts: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{escape(text)}</{tag}>" for text in texts)


def page(
    names: tuple[str, str],
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]],
    notes: Sequence[str],
    questions: Sequence[Question],
    answers: tuple[Sequence[Sequence[str]], Sequence[Sequence[str]]],
    verdicts: Mapping[str, Verdict],
) -> str:
    """The page.

    Args:
        names: of the models A and B.
        tables: headers and rows.
        notes: lines below them.
        questions: in the order in which they are shown.
        answers: of A and of B.
        verdicts: by key, see `pairwise_prompts`.
    """
    found = {key.rsplit("/", 1)[0]: verdict for key, verdict in verdicts.items()}
    parts = [f"<h1>{escape(names[0])} and {escape(names[1])}</h1>", *(_table(*one) for one in tables)]
    parts += [f"<p>{escape(note)}</p>" for note in notes]
    for question, a, b in zip(questions, *answers, strict=True):
        parts.append(f"<h2>{escape(question.id)}, {escape(question.category)}</h2>")
        for turn, said in enumerate(question.turns):
            both = [found.get(f"{question.id}/{turn}/{order}") for order in (0, 1)]
            result = outcome(*(one.value if one is not None else None for one in both)) if any(both) else ""
            parts.append(f"<pre>{escape(said)}</pre><div class=pair>")
            for name, text, side in ((names[0], a[turn], "A"), (names[1], b[turn], "B")):
                mark = " class=win" if result == side else ""
                parts.append(f"<div><b>{escape(name)}</b><pre{mark}>{escape(text) or '(empty)'}</pre></div>")
            parts.append("</div>")
            texts = [f"{label}\n{one.text}" for label, one in zip(("A first:", "B first:"), both, strict=True) if one]
            if texts:
                shown = "</pre><pre>".join(map(escape, texts))
                parts.append(f"<details><summary>verdict: {escape(result)}</summary><pre>{shown}</pre></details>")
    head = "<!doctype html><html><head><meta charset=utf-8><title>Comparison of two models</title>"
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    return f"{head}{policy}<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
