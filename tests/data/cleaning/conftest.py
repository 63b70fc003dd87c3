"""Documents and pipelines for the tests of cleaning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from minillama.data.cleaning.document import Draft
from minillama.data.cleaning.inputs import Input
from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.run import Cleaning
from minillama.data.sources import Source, documents

Clean = Callable[..., tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def read(folder: Path, pattern: str = "*.jsonl.zst") -> list[dict[str, Any]]:
    """Lines of all files."""
    from minillama.data.reading import Record, read_records

    items = [item for path in sorted(folder.glob(pattern)) for item in read_records(path)]
    return [item.value for item in items if isinstance(item, Record)]


@pytest.fixture
def clean(tmp_path: Path) -> Clean:
    """Kept and removed documents of texts or files after steps."""

    def run(given: Iterable[Any], *steps: Any, part: int = 2**26, workers: int = 1, name: str = "out") -> Any:
        given = list(given)
        if given and not isinstance(given[0], Input):
            lines = [{"text": item} if isinstance(item, str) else item for item in given]
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
            given = [Input(str(path))]
        output = tmp_path / name
        Cleaning(Pipeline("test", tuple(given), steps), output, part).run(workers)
        return read(output), read(output / "removed")

    return run


@pytest.fixture(scope="session")
def real(shared: Path) -> list[Draft]:
    """Real documents: the web, Wikipedia, code, Chinese."""
    files = ["text/en/c4_demo.jsonl", "web/cc/*.jsonl", "web/dedup/*.jsonl", "web/markup/stack_exchange.jsonl"]
    found = [item.text for name in files for item in documents(Source(str(shared / name)))]
    articles = (shared / "text" / "en" / "wiki_demo.txt").read_text(encoding="utf-8").split("\n")
    return [Draft(text, id=f"0-{i}") for i, text in enumerate(found + articles) if text]
