"""Run of a cleaning: parts through stages on all cores, resumable after a kill.

OUTPUT/.cleaning holds the work: per stage and part the documents kept, those removed, the rows for the next decision
and, written last, the tally: a part with a tally is done. Reading cuts the sources into parts of about `PART` bytes,
whatever their files. Parts depend on the sources alone, so that any number of workers gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from minillama.config.loader import to_dict
from minillama.data.cleaning.document import Draft, Removal
from minillama.data.cleaning.grouping import CorpusStep, Rows, Verdicts
from minillama.data.cleaning.parts import join, read_part, read_table, removed_line, write_part, write_table
from minillama.data.cleaning.pipeline import Pipeline, Stage
from minillama.data.cleaning.report import write_report
from minillama.data.cleaning.tally import READ, Tally
from minillama.data.cleaning.workers import Progress, run_all
from minillama.data.reading import NO_FIELD
from minillama.data.skipped import BadText
from minillama.data.sources import CLEANED, UNFINISHED
from minillama.errors import InputError
from minillama.files import digest, replace_folder

PART = 64 * 2**20
TOGETHER = 32 * 2**20  # bytes of small files that are read as one task
VERSION = 2


class Task(NamedTuple):
    """Files of one source that are read together."""

    number: int
    source: int
    files: list[Path | None]


@dataclass(frozen=True)
class Cleaning:
    """A pipeline, its output folder, and the bytes of a part."""

    pipeline: Pipeline
    output: Path
    part: int = PART

    def stage_folder(self, number: int) -> Path:
        """Folder of a stage; 0 is reading."""
        return self.output / UNFINISHED / f"stage-{number}"

    def marker(self, task: Task) -> Path:
        """File that a reading task writes last."""
        return self.stage_folder(0) / f"{task.number:05d}.json"

    def run(self, workers: int = 1, progress: Progress | None = None) -> dict[str, Any]:
        """Clean, or go on where an earlier run stopped; the manifest, as in cleaned.json, and seconds by step.

        Raises:
            InputError: no documents; a step that cannot work; a worker that died; a folder of something else.
        """
        say = progress or (lambda what, share: None)
        tasks = self.start()
        run_all(self.read, [(task,) for task in tasks], workers, say, "reading")
        parts = self.name_parts(tasks)
        for number, stage in enumerate(self.pipeline.stages, 1):
            names = ", ".join(step.key for step in stage.all) or "copying"
            run_all(self.clean, [(number, part, i) for i, part in enumerate(parts)], workers, say, names)
            if stage.closing:
                say(f"deciding {stage.closing.key}", 0.0)
                self.decide(number)
                say(f"deciding {stage.closing.key}", 1.0)
        return self.finish(tasks)

    def start(self) -> list[Task]:
        """Reading tasks, in the order of the sources.

        Raises:
            InputError: the folder holds something else, or the work of another pipeline or of other sources; a file
                of a step is not there.
        """
        for i, step in enumerate(self.pipeline.steps):
            step.check_files(f"steps.{i}")
        tasks = list(self._tasks())
        files = [(str(path), path.stat()) for task in tasks for path in task.files if path]
        identity = {
            "steps": [self.pipeline.fingerprint, self.part, VERSION],
            "sources": to_dict(self.pipeline)["sources"],
            "files": [[name, status.st_size, status.st_mtime_ns] for name, status in files],
        }
        job, fix = self.output / UNFINISHED / "job.json", "name another --output, or add --overwrite"
        if job.exists():
            if link := next((path for path in self.output.rglob("*") if path.is_symlink()), None):
                raise InputError("this is not a cleaning's own", where=link, expected="no link", fix="remove it")
            if read_table(job) != json.loads(json.dumps(identity)):
                what = "this folder holds an unfinished cleaning by other steps or of other sources"
                raise InputError(what, where=self.output, fix=fix)
        elif self.output.exists() and any(self.output.iterdir()):
            raise InputError("the output folder is not empty", where=self.output, fix=fix)
        else:
            write_table(job, identity)
        return tasks

    def _tasks(self) -> Iterator[Task]:
        number = 0
        for position, source in enumerate(self.pipeline.sources):
            batch: list[Path | None] = []
            size = 0
            files: list[Path | None] = [*source.files()]
            for path in files or [None]:
                length = path.stat().st_size if path else 0
                if batch and size + length > TOGETHER:
                    yield Task(number, position, batch)
                    number, batch, size = number + 1, [], 0
                batch.append(path)
                size += length
            yield Task(number, position, batch)
            number += 1

    def read(self, task: Task) -> None:
        """Read a task's files into parts; what cannot be read is named among the removed documents."""
        if self.marker(task).exists():
            return
        folder, source = self.stage_folder(0), self.pipeline.sources[task.source]
        tally, parts, size, index = Tally(), list[str](), 0, 0
        with contextlib.ExitStack() as part, write_part(self.marker(task).with_suffix(".removed")) as removed:
            for item in (item for path in task.files for item in source.documents(path)):
                if isinstance(item, BadText):
                    name = f"{task.number:05d}-unread-{tally.step(READ).documents}"
                    draft = Draft("", name, source.label, str(item.where))
                    removal = Removal(item.reason, str(item.found or "")[:200])
                    removed.write(removed_line(draft, "read", removal))
                    tally.judged(READ, "read", draft, removal, (0, 0))
                    continue
                if not parts or size >= self.part:
                    part.close()
                    parts.append(f"{task.number:05d}-{len(parts):04d}")
                    kept, size, index = part.enter_context(write_part(folder / f"{parts[-1]}.kept")), 0, 0
                item.id = f"{parts[-1]}-{index}"
                kept.write(item.to_json())
                length = len(item.text.encode())
                tally.judged(READ, "read", item, None, (length, length))
                size, index = size + length, index + 1
        write_table(self.marker(task), {"source": source.label, "parts": parts, "tally": tally.to_table()})

    def name_parts(self, tasks: list[Task]) -> dict[str, str]:
        """Parts in order, with the tags of their sources, once all is read."""
        tables = (read_table(self.marker(task)) for task in tasks)
        parts = {part: table["source"] for table in tables for part in table["parts"]}
        if not parts:
            unread = Tally.total(read_table(self.marker(task))["tally"] for task in tasks).step(READ).removed
            settings = ", ".join(filter(None, dict.fromkeys(source.setting for source in self.pipeline.sources)))
            fix = f"correct {settings}" if settings and NO_FIELD in unread else None
            raise InputError("the sources hold no document", where=self.output, found=dict(unread) or None, fix=fix)
        write_table(self.output / UNFINISHED / "parts.json", parts)
        return parts

    def clean(self, number: int, part: str, position: int) -> None:
        """Take a part through stage `number`, 1 being the first.

        Raises:
            InputError: a step cannot work at all, for instance because a package is missing.
        """
        folder, before = self.stage_folder(number), self.stage_folder(number - 1)
        if not (folder / f"{part}.json").exists():
            stage = self.pipeline.stages[number - 1]
            closing, tally, rows, documents = stage.closing, Tally(), Rows(), 0
            names = list(read_table(self.output / UNFINISHED / "parts.json")) if stage.opening else []
            verdicts = Verdicts(before / "verdicts").read(position)
            with write_part(folder / f"{part}.kept") as kept, write_part(folder / f"{part}.removed") as removed:
                for draft in read_part(before / f"{part}.kept"):
                    gone = _through(draft, stage, verdicts, names, tally)
                    if gone:
                        removed.write(removed_line(draft, *gone))
                        continue
                    kept.write(draft.to_json())
                    documents += 1
                    if closing is None:
                        tally.finished(draft)
                    elif closing.concerns(draft):
                        start = time.perf_counter()
                        closing.collect(rows, draft)
                        tally.step(stage.first + len(stage.all)).seconds += time.perf_counter() - start
            if closing is not None:
                rows.save(folder / f"{part}.rows")
            write_table(folder / f"{part}.json", {"documents": documents, "tally": tally.to_table()})
        (before / f"{part}.kept").unlink(missing_ok=True)

    def decide(self, number: int) -> None:
        """Decide the closing step of stage `number` over all parts."""
        closing, folder = self.pipeline.stages[number - 1].closing, self.stage_folder(number)
        if closing is None or (folder / "verdicts").exists():
            return
        step, parts = closing, read_table(self.output / UNFINISHED / "parts.json")

        def write(temporary: Path) -> None:
            summary = step.decide([folder / f"{part}.rows" for part in parts], Verdicts(temporary))
            write_table(temporary / "summary.json", summary)

        replace_folder(folder / "verdicts", write)

    def finish(self, tasks: list[Task]) -> dict[str, Any]:
        """Move the results to their places, write report and manifest; the work folder goes last."""
        stages = self.pipeline.stages
        folders = [self.stage_folder(number) for number in range(1, len(stages) + 1)]
        parts, counts = read_table(self.output / UNFINISHED / "parts.json"), dict[str, int]()
        shards: list[dict[str, Any]] = []

        def tallies() -> Iterator[dict[str, Any]]:  # one in memory at a time
            yield from (read_table(self.marker(task))["tally"] for task in tasks)
            for path, part in ((folder / f"{part}.json", part) for part in parts for folder in folders):
                made = read_table(path)
                counts[part] = made["documents"]
                yield made["tally"]

        tally = Tally.total(tallies())
        for part, label in parts.items():
            target, source = self.output / f"{label}-{part}.jsonl.zst", folders[-1] / f"{part}.kept"
            join(self.output / "removed" / target.name, [folder / f"{part}.removed" for folder in folders])
            if documents := counts[part]:
                if source.exists():
                    source.replace(target)
                shards.append({"file": target.name, "documents": documents, "sha256": digest(target)})
        unread = [self.marker(task).with_suffix(".removed") for task in tasks]
        join(self.output / "removed" / "unread.jsonl.zst", unread)
        decisions = {
            stage.closing.key: read_table(folder / "verdicts" / "summary.json")
            for stage, folder in zip(stages, folders, strict=True)
            if stage.closing
        }
        manifest = {
            "pipeline": self.pipeline.name,
            "fingerprint": self.pipeline.fingerprint,
            "documents": sum(shard["documents"] for shard in shards),
            "shards": shards,
            "configuration": to_dict(self.pipeline),
            "steps": tally.funnel(self.pipeline.steps),
            "decisions": decisions,
        }
        write_report(self.output / "report.html", self.pipeline, tally, decisions)
        write_table(self.output / CLEANED, manifest)
        shutil.rmtree(self.output / UNFINISHED)
        return manifest | {"seconds": {number: counts.seconds for number, counts in tally.steps.items()}}


def _through(draft: Draft, stage: Stage, verdicts: Any, names: list[str], tally: Tally) -> tuple[str, Removal] | None:
    """Take a document through the steps of a stage; the step that removed it, and the reason."""
    before = len(draft.text.encode(errors="replace"))
    for number, step in enumerate(stage.all, stage.first):
        if not step.concerns(draft):
            continue
        text, start = draft.text, time.perf_counter()
        try:
            if isinstance(step, CorpusStep):
                low, high = verdicts["document"].searchsorted([draft.index, draft.index + 1])
                removal = step.settle(draft, verdicts[low:high], names)
            else:
                removal = step(draft)
        except InputError:
            raise
        except Exception as error:  # a library that stumbles over a document costs this document alone
            removal = Removal("error", f"{type(error).__name__}: {error}"[:200])
        after = before if draft.text is text else len(draft.text.encode(errors="replace"))
        draft.text = text if removal else draft.text
        tally.step(number).seconds += time.perf_counter() - start
        tally.judged(number, step.key, draft, removal, (before, after))
        if removal:
            return step.key, removal
        before = after
    return None
