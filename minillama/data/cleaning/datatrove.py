"""Cleaning on many machines: a pipeline's stages as datatrove executors (local, Slurm, Ray); extra `scale`.

    for executor in executors(Cleaning(Pipeline.load("english"), Path("/shared/out")), SlurmPipelineExecutor, 100,
                              time="20:00:00", partition="cpu"):
        executor.run()

Each executor depends on the one before it; the last leaves the result. A part that is done is not done again,
whoever did it, so that a failed job is simply submitted again, also with another number of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minillama.data.cleaning.parts import read_table
from minillama.data.cleaning.run import Cleaning
from minillama.data.sources import UNFINISHED
from minillama.errors import optional_import


@dataclass(frozen=True)
class Work:
    """Pipeline step of datatrove: a rank's share of a stage, or a decision over all parts.

    Args:
        cleaning: pipeline and output folder, which all machines see.
        stage: number of the stage; 0 reads.
        decides: whether this names the parts (0) or decides (n), in one task.
    """

    cleaning: Cleaning
    stage: int
    decides: bool = False

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        """Work as one of `world_size` ranks."""
        cleaning = self.cleaning
        if self.stage == 0:
            tasks = cleaning.start()
            if self.decides:
                cleaning.name_parts(tasks)
            for task in [] if self.decides else tasks[rank::world_size]:
                cleaning.read(task)
            return data
        if not self.decides:
            parts = list(enumerate(read_table(cleaning.output / UNFINISHED / "parts.json")))
            for position, part in parts[rank::world_size]:
                cleaning.clean(self.stage, part, position)
            return data
        cleaning.decide(self.stage)
        if self.stage == len(cleaning.pipeline.stages):
            cleaning.finish(cleaning.start())
        return data


def executors(cleaning: Cleaning, kind: Callable[..., Any] | None = None, tasks: int = 1, **options: Any) -> list[Any]:
    """Executors of a cleaning, in order.

    Args:
        cleaning: pipeline and output folder.
        kind: executor class of datatrove, LocalPipelineExecutor unless given.
        tasks: tasks per stage.
        options: arguments of the executor, such as workers, or time and partition.
    """
    kind = kind or optional_import("datatrove.executor", "an executor", "scale").LocalPipelineExecutor
    cleaning.start()
    made: list[Any] = []
    for stage in range(len(cleaning.pipeline.stages) + 1):
        for decides in (False, True):
            logs = str(cleaning.output.parent / f"{cleaning.output.name}-logs" / f"{stage}-{int(decides)}")
            work, before = Work(cleaning, stage, decides), {"depends": made[-1]} if made else {}
            made.append(kind(pipeline=[work], tasks=1 if decides else tasks, logging_dir=logs, **before, **options))
    return made
