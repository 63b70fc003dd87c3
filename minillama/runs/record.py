"""Recorded run: configuration, provenance, metrics and checkpoints of a run folder, read-only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillama.config.loader import read_toml
from minillama.errors import InputError
from minillama.files import parsing
from minillama.runs.checkpoint import steps
from minillama.runs.folder import lock_owner, read_lines, read_metrics

PYTHON_OBJECTIVE = "Python objective"  # name of the function that made it, where the configuration's was replaced
DAMAGED = "this is not the folder of a run, or files of it are damaged"


@dataclass(frozen=True)
class RecordedRun:
    """Contents of a run folder.

    Args:
        config: config.toml, as nested values.
        starts: one provenance record per start, the newest last.
        records: the lines of metrics.jsonl.
        checkpoints: steps of the complete ones.
    """

    path: Path
    config: dict[str, Any]
    starts: list[dict[str, Any]]
    records: list[dict[str, Any]]
    checkpoints: list[int]

    @classmethod
    def open(cls, path: Path) -> RecordedRun:
        """Read a folder; nothing is changed or locked.

        Raises:
            InputError: it holds no run, or files of it are damaged.
        """
        if not (path / "config.toml").is_file():
            found = "no config.toml" if path.is_dir() else "no such folder"
            fix = f"minillama runs {path} lists the runs in it" if any(path.glob("*/config.toml")) else None
            expected = "such as runs/tiny"
            raise InputError("this is not the folder of a run", where=path, found=found, expected=expected, fix=fix)
        config, _ = read_toml(path / "config.toml")
        starts, records = read_lines(path / "provenance.jsonl"), read_metrics(path / "metrics.jsonl")
        run = cls(path, config, starts, records, steps(path / "checkpoints"))
        with parsing(path, DAMAGED):
            run.figures()
        return run

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of every line that has the value."""
        return [(line["step"], line[key]) for line in self.records if line.get(key) is not None]

    @property
    def accuracies(self) -> list[str]:
        """Names of the accuracies on evaluation sets that were measured."""
        names = self.config.get("validate", {}).get("tasks", ())
        keys = dict.fromkeys(key for line in self.records for key in line)
        return [key for key in keys if any(key.startswith(f"{name}_acc") for name in names)]

    @property
    def step(self) -> int:
        """The last step that was taken: that of a checkpoint is recorded when the run goes on."""
        return max([*self.checkpoints[-1:], *(int(line["step"]) for line in self.records[-1:]), 0])

    @property
    def is_finished(self) -> bool:
        """Whether all steps were taken and the model was written."""
        return self.step >= int(self.config["train"]["steps"]) and (self.path / "model").is_dir()

    @property
    def state(self) -> str:
        """Running, finished, or stopped with the step at which it would resume."""
        owner = lock_owner(self.path)
        if owner is not None:
            return f"running (process {owner})"
        if self.is_finished:
            return "finished"
        behind = self.checkpoints[-1] if self.checkpoints else 0
        return f"stopped after step {self.step}; --resume continues at step {behind}"

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Records of skipped steps."""
        return [line for line in self.records if "skipped" in line]

    def summary(self) -> dict[str, Any]:
        """State and figures, which `show` and `compare` print, as plain values."""
        return {"run": str(self.path), "state": self.state, **self.figures()}

    def figures(self) -> dict[str, Any]:
        """The last and the best of what was measured."""
        last = self.records[-1] if self.records else {}
        speeds = sorted(value for _, value in self.curve("tokens_per_second"))
        losses, val_losses = self.curve("loss"), self.curve("val_loss")
        best = min((point for point in val_losses if point[0]), key=lambda point: point[1], default=(None, None))
        return {
            "steps": f"{self.step} of {int(self.config['train']['steps'])}",
            "tokens": last.get("tokens", 0),
            "seconds": round(last.get("seconds", 0.0), 1),
            "tokens_per_second": round(speeds[len(speeds) // 2], 1) if speeds else None,
            "loss": losses[-1][1] if losses else None,
            "val_loss": val_losses[-1][1] if val_losses else None,
            "best_val_loss": best[1],
            "best_step": best[0],
            **{name: self.curve(name)[-1][1] for name in self.accuracies},
            "skipped_steps": len(self.skipped),
            "checkpoints": self.checkpoints,
            "starts": len(self.starts),
        }
