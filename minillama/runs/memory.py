"""Memory and disk requirements of a run, before it starts and when they run out."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minillama.config.cost import TrainingMemory, training_memory
from minillama.errors import InputError
from minillama.runs.config import RunConfig
from minillama.runs.parallel import Sizes
from minillama.runs.report import Report

GIB = 2**30
ONE = Sizes()


def needed_memory(config: RunConfig, dtype: torch.dtype, rows: int, sizes: Sizes = ONE) -> TrainingMemory:
    """Training memory of `minillama plan` for a micro-batch of `rows` sequences, per process.

    With the reference, the copy that decodes rollouts, whole, and a value model that is trained beside.
    """
    objective = config.objective
    one = partial(
        training_memory,
        config.model,
        rows * objective.texts,
        config.context,
        activation_bytes=dtype.itemsize,
        checkpointing=config.train.checkpointing,
        shard=sizes.shard,
        tensor=sizes.tensor,
    )
    found = one(lora=config.lora, quantize=config.train.quantize)
    model = dtype.itemsize * config.model.num_params()
    reference = model // sizes.parts if objective.has_reference and config.lora is None else 0  # adapters are left out
    copy = model if objective.has_rollouts and config.train.quantize == "none" else 0  # quantized, it decodes itself
    found = replace(found, weights=found.weights + reference + copy)
    if objective.has_critic:
        critic, parts = one(), ("weights", "gradients", "optimizer", "casts", "activations")
        found = replace(found, **{part: getattr(found, part) + getattr(critic, part) for part in parts})
    return found


def rows_at_once(config: RunConfig, sizes: Sizes = ONE) -> int:
    """Sequences of a micro-batch of one process."""
    return min(config.micro_batch_size, config.train.batch_size // sizes.readers)


def checkpoint_copy(config: RunConfig, device: torch.device, sizes: Sizes = ONE) -> int:
    """Bytes of the first process's copy of a checkpoint while it is written, beside a GPU's memory none.

    It is of the model, and of its part of the optimizer state.
    """
    if device.type != "cpu":
        return 0
    state, model = _state_bytes(config), _trained_bytes(config)
    return model + (state - model) // sizes.parts


def peak_memory(config: RunConfig, dtype: torch.dtype, device: torch.device, sizes: Sizes = ONE) -> int:
    """Bytes that a run needs of the device's memory per process, a checkpoint's copy among them."""
    found = needed_memory(config, dtype, rows_at_once(config, sizes), sizes).total
    return max(_start_bytes(config, sizes), found + checkpoint_copy(config, device, sizes))


def _start_bytes(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of the float32 models that every process builds whole before it keeps its part."""
    objective, frozen = config.objective, config.lora is None
    if sizes.parts == 1 or not (objective.has_reference or objective.has_critic or config.lora):
        return 0
    models = 1 + (objective.has_reference and frozen) + objective.has_critic
    return 4 * config.model.num_params() * models + (_trained_bytes(config) if objective.has_average else 0)


def available_memory(device: torch.device) -> int | None:
    """Available memory in bytes: of the GPU, or of the machine within its control group; None where unknown.

    Processes that torchrun started on one machine share its memory.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        found.append(1024 * _entry(Path("/proc/meminfo"), "MemAvailable:"))
    with contextlib.suppress(OSError, StopIteration, ValueError):
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text(encoding="ascii"))
        used -= _entry(group / "memory.stat", "inactive_file")  # file pages, which the kernel reclaims
        found.append(int((group / "memory.max").read_text(encoding="ascii")) - used)
    return min(found) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if found else None


def _entry(path: Path, name: str) -> int:
    """Value of a name in a file of the kernel's."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return int(next(line[1] for line in lines if line[0] == name))


def largest_micro_batch(
    config: RunConfig, dtype: torch.dtype, available: int, below: int, sizes: Sizes = ONE
) -> int | None:
    """Micro-batch size, halved until it fits, at most `below`; None where not even one sequence does."""
    rows = below
    while rows and needed_memory(config, dtype, rows, sizes).total > available:
        rows //= 2
    return rows or None


def warn_of_memory(
    config: RunConfig, dtype: torch.dtype, device: torch.device, report: Report, sizes: Sizes = ONE
) -> None:
    """Warn of too little memory before anything is built. Linux kills such a process without a message."""
    free = available_memory(device)
    if free is None:
        return
    free -= checkpoint_copy(config, device, sizes)
    rows = rows_at_once(config, sizes)
    need = needed_memory(config, dtype, rows, sizes).total
    if need > free:
        fits = largest_micro_batch(config, dtype, free, rows, sizes)
        largest = f"--train.micro_batch_size {fits} fits"
        advice = largest if fits else "not one sequence fits; take a smaller model or context"
        report.say(f"warning: about {need / GIB:.2f} GiB of memory are needed and {free / GIB:.2f} are free: {advice}")


def _trained_bytes(config: RunConfig) -> int:
    return 4 * (config.model.num_params() if config.lora is None else config.lora.num_params(config.model))


def _state_bytes(config: RunConfig) -> int:
    """Bytes of a checkpoint: the weights and the optimizer's moments in float32, two per weight, with Muon one.

    Of a value model of its own too; and an average of the weights.
    """
    objective = config.objective
    more = 12 * config.model.num_params() if objective.has_critic else 0
    more += _trained_bytes(config) if objective.has_average else 0
    if config.lora is not None:  # the adapter alone
        return 12 * config.lora.num_params(config.model) + more
    shapes = config.model.tensors()
    muon = sum(math.prod(s) for n, s in shapes.items() if len(s) > 1 and ".layers." in n) if config.optim.muon_lr else 0
    return 4 * (3 * config.model.num_params() - muon) + more


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is what torch raises when there is no memory left, on a GPU or on the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "out of memory")  # Linux, Windows, MPS
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def explain(
    error: Exception, config: RunConfig, dtype: torch.dtype, device: torch.device, phase: str, sizes: Sizes = ONE
) -> InputError:
    """Out-of-memory error with the memory needed, and the setting that fits.

    Args:
        error: as torch raised it.
        phase: of the run, as "training".
    """
    rows = rows_at_once(config, sizes)
    need = needed_memory(config, dtype, rows, sizes)
    parts = "weights", "gradients", "optimizer", "casts", "activations", "logits"
    listed = ", ".join(f"{part} {getattr(need, part) / GIB:.2f}" for part in parts if getattr(need, part))
    if rows > 1:
        free = available_memory(device)
        fits = largest_micro_batch(config, dtype, free, rows // 2, sizes) if free is not None else None
        half, batch = fits or rows // 2, config.train.batch_size
        less = needed_memory(config, dtype, half, sizes).total / GIB
        fix = (
            f"add --train.micro_batch_size {half}: {less:.2f} GiB, and the same batch of {batch} "
            f"in {-(-batch // half)} micro-batches; then --resume"
        )
    elif not config.train.checkpointing:
        fix = "add --train.checkpointing true, or take a smaller model or --train.context; then --resume"
    else:
        fix = "take a smaller model, or a shorter --train.context"
    return InputError(
        f"out of memory while {phase}",
        where=f"train.micro_batch_size = {rows}, on {device}",
        found=f"{str(error).splitlines()[0]}; {need.total / GIB:.2f} GiB are needed (GiB: {listed})",
        fix=fix,
    )


def check_disk(config: RunConfig, folder: Path) -> None:
    """Disk-space check for the checkpoints and the model that the run will write.

    There are as many checkpoints as are kept, the best, and the one that is being written; fewer in a short
    run. What lies in the folder counts as free: it is replaced, or is there already.

    Raises:
        InputError: they do not.
    """
    steps = config.train.steps
    every = min(config.checkpoint.every, config.validate.interval(steps))
    count = min(config.checkpoint.keep + 2, steps // every + 2)
    trained = config.model.num_params() if config.lora is None else config.lora.num_params(config.model)
    one, model = _state_bytes(config), 4 * trained
    present = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if count * one + model > free + present:
        raise InputError(
            "the disk is too small for this run",
            where=folder,
            found=f"{free / GIB:.2f} GiB free",
            expected=f"{(count * one + model) / GIB:.2f} GiB: {count} checkpoints of {one / GIB:.2f} and a model of "
            f"{model / GIB:.2f}",
            fix="free disk space, choose another --out, or lower --checkpoint.keep",
        )
