"""Memory and disk that a run needs, before it starts and when they run out."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from minillama.cost import TrainingMemory, training_memory
from minillama.errors import InputError
from minillama.training.config import RunConfig
from minillama.training.report import Report

__all__ = [
    "available_memory",
    "check_disk",
    "explain",
    "is_out_of_memory",
    "largest_micro_batch",
    "needed_memory",
    "warn_of_memory",
]

GIB = 2**30


def needed_memory(config: RunConfig, dtype: torch.dtype, rows: int) -> TrainingMemory:
    """What `minillama plan` says for so many rows at once."""
    width = dtype.itemsize
    checkpointing = config.train.checkpointing
    return training_memory(config.model, rows, config.context, activation_bytes=width, checkpointing=checkpointing)


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be had: of the GPU, or of the machine within its control group; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def largest_micro_batch(config: RunConfig, dtype: torch.dtype, available: int, below: int) -> int | None:
    """The batch halved until it fits, at most `below`; None where not even one row does."""
    rows = below
    while rows >= 1:
        if needed_memory(config, dtype, rows).total <= available:
            return rows
        rows //= 2
    return None


def warn_of_memory(config: RunConfig, dtype: torch.dtype, device: torch.device, report: Report) -> None:
    """Say before the start that memory will not do, and what would: Linux ends such a process without a word."""
    need, there = needed_memory(config, dtype, config.micro_batch_size).total, available_memory(device)
    if there is None or need <= there:
        return
    fits = largest_micro_batch(config, dtype, there, config.micro_batch_size)
    advice = (
        f"--train.micro_batch_size {fits} fits" if fits else "not even one row fits; take a smaller model or context"
    )
    report.say(f"warning: about {need / GIB:.2f} GiB of memory are needed and {there / GIB:.2f} are free: {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises when there is no memory left, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def explain(
    error: BaseException, config: RunConfig, dtype: torch.dtype, device: torch.device, doing: str
) -> InputError:
    """What was needed, and the setting that fits.

    Args:
        error: what was raised.
        config: the run.
        dtype: of the products.
        device: where they ran.
        doing: what the run was at, as "training".
    """
    rows = config.micro_batch_size
    need = needed_memory(config, dtype, rows)
    parts = "weights", "gradients", "optimizer", "casts", "activations", "logits"
    sizes = ", ".join(f"{part} {getattr(need, part) / GIB:.2f}" for part in parts if getattr(need, part))
    if rows > 1:
        half = rows // 2
        less, parts_now = needed_memory(config, dtype, half).total / GIB, -(-config.train.batch_size // half)
        fix = (
            f"add --train.micro_batch_size {half}: {less:.2f} GiB, and the same batch of {config.train.batch_size} "
            f"in {parts_now} parts; then --resume"
        )
    elif not config.train.checkpointing:
        fix = "add --train.checkpointing true, or take a smaller model or --train.context; then --resume"
    else:
        fix = "take a smaller model, or a shorter --train.context"
    return InputError(
        f"out of memory while {doing}",
        where=f"train.micro_batch_size = {rows}, on {device}",
        found=f"{str(error).splitlines()[0]}; {need.total / GIB:.2f} GiB are needed (GiB: {sizes})",
        fix=fix,
    )


def check_disk(config: RunConfig, folder: Path) -> None:
    """Whether the checkpoints and the model that the run will write fit on the disk.

    A checkpoint holds the weights and two moments in float32. There are as many as are kept, the best, and
    the one that is being written, and the final model.

    Raises:
        InputError: they do not.
    """
    weights = 4 * config.model.num_params()
    count = config.checkpoint.keep + 2
    needed = 3 * weights * count + weights
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if needed > free + there:
        raise InputError(
            "the disk is too small for this run",
            where=folder,
            found=f"{free / GIB:.2f} GiB free",
            expected=f"{needed / GIB:.2f} GiB: {count} checkpoints of {3 * weights / GIB:.2f} and a model of "
            f"{weights / GIB:.2f}",
            fix="make room, choose another --out, or lower --checkpoint.keep",
        )
