"""Report of a cleaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minillama.data.cleaning.pipeline import Pipeline
from minillama.data.cleaning.tally import Tally


def write_report(path: Path, pipeline: Pipeline, tally: Tally, summaries: dict[str, Any]) -> None:
    """Write the report."""
