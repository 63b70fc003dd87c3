"""Several processes that train one model: data parallelism, FSDP and tensor parallelism on one mesh.

torchrun starts them. Each replica of the model is divided over `shard` x `tensor` processes: matrices over `tensor`
(`tensor_parallel.py`), then every parameter, its gradient and its optimizer state over `shard` (FSDP2: a block is
gathered while it is computed). A batch is shared out over `data` x `shard`. Weights are drawn whole before they are
divided, a batch is a function of (seed, step), and every process divides its loss by the totals of the whole batch, so
that gradients are summed and equal those of one process but for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed, nn

from minillama.config.lora import EMBEDDING, HEAD
from minillama.device import choose_device
from minillama.errors import InputError
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.runs.feedback import FeedbackConfig
from minillama.training.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Sizes(NamedTuple):
    """Axes of the mesh; their product is the number of processes."""

    data: int = 1
    shard: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in self._asdict().items())


def sizes(config: RunConfig, processes: int) -> Sizes:
    """Mesh of a run.

    Raises:
        InputError: it has another number of processes, does not divide the batch or the model, or is not supported for
            these settings.
    """
    wanted = config.parallel
    data = wanted.data or max(1, processes // (wanted.shard * wanted.tensor))
    found = Sizes(data, wanted.shard, wanted.tensor)
    if data * wanted.shard * wanted.tensor != processes:
        count = data * wanted.shard * wanted.tensor
        started = f"{processes} processes" if processes > 1 else "one process"
        fix = f"start it with torchrun --nproc-per-node {count} train.py ..., or change [parallel]"
        raise InputError(f"{found} is not {started}", where="parallel", found=started, expected=count, fix=fix)
    readers = found.data * found.shard
    if config.train.batch_size % readers:
        what, expected = "the processes do not divide the batch", f"a multiple of {readers}, data x shard"
        raise InputError(what, where="train.batch_size", found=config.train.batch_size, expected=expected)
    if found.shard * found.tensor > 1:
        _refuse(config, found)
    return found


def _refuse(config: RunConfig, found: Sizes) -> None:
    """Refuse what works on whole models or matrices alone."""
    odd = {
        "objective.name": (isinstance(config.objective, FeedbackConfig), "rollouts decode with a whole model"),
        "optim.muon_lr": (config.optim.muon_lr > 0, "Muon orthogonalizes whole matrices"),
        "optim.optimizer": (config.optim.optimizer != "adamw", "Adafactor reads whole matrices"),
        "train.quantize": (config.train.quantize != "none", "quantized weights are not divided"),
        "train.compile": (config.train.compile == "true", "blocks are compiled whole"),
        "stages.trainable": (any(s.trainable != ("*",) for s in config.stages), "frozen parameters stay frozen"),
    }
    if found.tensor > 1:
        _check_divides(config, found.tensor)
        lora = config.lora
        sites = () if lora is None else (*lora.sites(config.model), *lora.whole(config.model))
        odd |= {
            "model.mixer": (config.model.mixer != "attention", "a recurrence has no heads to divide"),
            "lora.use_dora": (lora is not None and lora.use_dora, "DoRA's norms are of whole rows"),
            "lora.dropout": (lora is not None and lora.dropout > 0, "the processes of a layer would draw other masks"),
            "lora.targets": (bool({EMBEDDING, HEAD} & {*sites}), "the vocabulary's adapters are not divided"),
        }
    for where, (is_odd, reason) in odd.items():
        if is_odd:
            what = f"this is not supported with shard {found.shard} and tensor {found.tensor}: {reason}"
            raise InputError(
                what, where=where, fix="use data parallelism: leave parallel.shard and parallel.tensor at 1"
            )


def _check_divides(config: RunConfig, tensor: int) -> None:
    model = config.model
    for name in ("n_heads", "n_kv_heads"):
        if model.mixer == "attention" and getattr(model, name) % tensor:
            what, where = f"parallel.tensor = {tensor} does not divide the heads", f"model.{name}"
            raise InputError(what, where=where, found=getattr(model, name), expected=f"a multiple of {tensor}")
    for name in ("hidden_dim", "vocab_size"):
        size = getattr(model, name)
        if -(-size // tensor) * (tensor - 1) >= size:
            what = f"parallel.tensor = {tensor} leaves a process without a part"
            raise InputError(what, where=f"model.{name}", found=size, expected="more")


@dataclass(frozen=True)
class Parallel:
    """Mesh of a run, with this process's place in it.

    Args:
        sizes: of the axes.
        ranks: this process among those that read a batch.
        mesh: of all processes; None for one.
    """

    sizes: Sizes = Sizes()
    ranks: Ranks = Ranks()
    mesh: DeviceMesh | None = None

    @property
    def casts(self) -> bool:
        """Whether FSDP casts the weights to the dtype of the passes, so that no working copy is needed."""
        return self.sizes.shard > 1

    @property
    def divides(self) -> bool:
        """Whether each process has a part of the model."""
        return self.sizes.shard * self.sizes.tensor > 1

    def divide(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Divide a model in place; every process has the whole of it before.

        Args:
            model: a decoder, in float32 or, under adapters, frozen in `dtype`.
            dtype: of the passes.
        """
        if self.mesh is None or not isinstance(model, Decoder):
            return
        if self.sizes.tensor > 1:
            from minillama.training.tensor_parallel import divide

            divide(model, self.mesh["tensor"])
        if self.sizes.shard > 1:
            _shard(model, self.mesh["shard"], dtype)


def _shard(model: Decoder, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 of each block and of the rest, with sums in the place of means."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies
            part.unshard()  # once outside of inference mode, whose tensors the passes of training cannot write to
            part.reshard()
    register_fsdp_forward_method(model, "hidden")


@contextmanager
def processes(config: RunConfig) -> Iterator[Parallel]:
    """Mesh over the process group, which is made from torchrun's environment if need be; of one process without it.

    Raises:
        InputError: as `sizes`.
    """
    is_there = distributed.is_available() and distributed.is_initialized()
    count = distributed.get_world_size() if is_there else int(os.environ.get("WORLD_SIZE", "1"))
    found = sizes(config, count)
    if count == 1:
        yield Parallel()
        return
    device = choose_device(config.train.device)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)
    if not is_there:
        timeout = timedelta(seconds=config.parallel.timeout)
        distributed.init_process_group("cpu:gloo,cuda:nccl" if is_gpu else "gloo", timeout=timeout)
    try:
        made = _parallel(found, "cuda" if is_gpu else "cpu")
        with made.ranks.enter():
            yield made
    finally:
        if not is_there:
            distributed.destroy_process_group()


def _parallel(found: Sizes, kind: str) -> Parallel:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(kind, found, mesh_dim_names=found._fields)
    index, grid = distributed.get_rank(), mesh.mesh
    readers: Any = None
    for tensor in range(found.tensor):
        group = distributed.new_group(grid[:, :, tensor].flatten().tolist())
        readers = group if index in grid[:, :, tensor] else readers
    rank = mesh.get_local_rank("data") * found.shard + mesh.get_local_rank("shard")
    own = Ranks(rank, found.data * found.shard, index, grid.numel(), readers, mesh.get_group("data"))
    return Parallel(found, own, mesh)
