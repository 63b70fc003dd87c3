"""Metrics of a run in TensorBoard and Weights & Biases, beside metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillama.errors import InputError, optional_import

if TYPE_CHECKING:  # numpy comes with it
    from minillama.runs.sections import LogConfig


class MetricsLog:
    """Writer of step records to the services that were asked for.

    Args:
        config: which.

    Raises:
        InputError: a package is missing.
    """

    def __init__(self, config: LogConfig) -> None:
        self.config = config
        self._board: Any = None
        self._wandb: Any = None
        for name in config.to:
            optional_import(name, f'log.to = ["{name}"]', "log")

    def open(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """Open the services for a run.

        Args:
            folder: of the run; its name is the run's at Weights & Biases.
            settings: the run's configuration.
            step: from which it goes on; later events are dropped.

        Raises:
            InputError: Weights & Biases refuses.
        """
        if "tensorboard" in self.config.to:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if "wandb" in self.config.to:
            import wandb

            name = folder.resolve().name
            try:
                self._wandb = wandb.init(project=self.config.project, name=name, dir=str(folder), config=dict(settings))
            except Exception as error:  # its own kinds of error differ between versions
                fix = "wandb login, or set WANDB_MODE=offline"
                raise InputError("Weights & Biases refuses", where="log.to", found=error, fix=fix) from None

    def add(self, record: Mapping[str, Any]) -> None:
        """Log the numbers of a record of metrics.jsonl at its step."""
        numbers = {
            name: value
            for name, value in record.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=record["step"])

    def close(self) -> None:
        """Write what is buffered."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
