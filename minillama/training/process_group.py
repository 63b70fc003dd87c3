"""Process group of the processes that torchrun started, in which the failure of one ends all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from minillama.device import choose_device, refuse_one_gpu
from minillama.training.watch import RUN, Advice, Watch, watched


def started() -> int:
    """Processes of this program, by torchrun's environment or a process group that is there already."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return (
        int(os.environ.get("WORLD_SIZE", "1")) if "MASTER_ADDR" in os.environ else 1
    )  # clusters export the first alone


@contextmanager
def process_group(
    device: str, timeout: timedelta = timedelta(minutes=10), where: str = "train.device", advice: Advice = RUN
) -> Iterator[Watch | None]:
    """The default process group in a block, made if need be, and the watch over it; for one process neither.

    Args:
        device: as `choose_device` takes it; on GPUs each process has that of its local rank.
        timeout: of a collective.
        where: the setting of the device, named in an error.
        advice: after a process was lost.

    Raises:
        InputError: where a process fails, see `watched`.
    """
    count = started()
    if count == 1:
        yield None
        return
    refuse_one_gpu(device, where)
    is_there, is_gpu = distributed.is_initialized(), (chosen := choose_device(device, where)).type == "cuda"
    if is_gpu:
        torch.cuda.set_device(chosen)
    if not is_there:
        store, rank, _ = next(rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart, and what the processes before it wrote there
        store = distributed.distributed_c10d.PrefixStore(
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store
        )
        backend = "cpu:gloo,cuda:nccl" if is_gpu else "gloo"
        distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=timeout)
    try:
        with watched(distributed.get_rank(), count, is_gpu, advice) as watch:
            yield watch
    finally:
        if not is_there:
            distributed.destroy_process_group()
