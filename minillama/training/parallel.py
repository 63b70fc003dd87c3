"""Several processes that train one model: data parallelism, FSDP and tensor parallelism on one mesh.

torchrun starts them. Each replica of the model is divided over `shard` x `tensor` processes: matrices over `tensor`
(`tensor_parallel.py`), then every parameter, its gradient and its optimizer state over `shard` (FSDP2: a block is
gathered while it is computed). A batch is shared out over `data` x `shard`. Weights are drawn whole before they are
divided, a batch is a function of (seed, step), and every process divides its loss by the totals of the whole batch, so
that gradients are summed and equal those of one process but for rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed, nn

from minillama.config import ModelConfig
from minillama.config.lora import EMBEDDING, HEAD
from minillama.device import choose_device, choose_dtype
from minillama.errors import InputError
from minillama.formats.peft_config import CONFIG, read_config
from minillama.formats.shape import model_config
from minillama.model import Decoder
from minillama.runs.config import RunConfig, to_table
from minillama.runs.diff import flat
from minillama.runs.feedback import PPOConfig
from minillama.runs.memory import available_memory, peak_memory
from minillama.runs.parallel import Sizes, meshes
from minillama.training.process_group import process_group
from minillama.training.ranks import Ranks
from minillama.training.sharded import is_sharded
from minillama.training.watch import Watch

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def sizes(config: RunConfig, processes: int, free: float = math.inf) -> Sizes:
    """Mesh of a run.

    Args:
        processes: that there are.
        free: bytes per process, for `parallel.auto`.

    Raises:
        InputError: it has another number of processes, does not divide the batch or the model, or is not supported for
            these settings.
    """
    wanted = config.parallel
    if wanted.auto and processes > 1:
        return _smallest(config, processes, free)
    data = wanted.data or max(1, processes // (wanted.shard * wanted.tensor))
    return _checked(config, Sizes(data, wanted.shard, wanted.tensor), processes)


def _smallest(config: RunConfig, processes: int, free: float) -> Sizes:
    """The mesh with the least division that fits: sharding first, tensor parallelism within a machine beyond it.

    Where none fits, the one that needs the least.
    """
    device, near = choose_device(config.train.device), _neighbors(processes)
    errors, needs = [], dict[Sizes, int]()
    for found in meshes(processes, near):
        try:
            _checked(config, found, processes)
        except InputError as error:
            errors.append(error)
            continue
        needs[found] = peak_memory(config, choose_dtype(config.train.dtype, device), device, found)
        if needs[found] <= free:
            return found
    if not needs:
        raise errors[0]
    return min(needs, key=needs.__getitem__)


def _neighbors(processes: int) -> int:
    """Processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def _checked(config: RunConfig, found: Sizes, processes: int) -> Sizes:
    if found.processes != processes:
        started = f"{processes} processes" if processes > 1 else "one process"
        fix = f"start it with torchrun --nproc-per-node {found.processes} train.py ..., or change [parallel]"
        what = f"{found} is not {started}"
        raise InputError(what, where="parallel", found=started, expected=found.processes, fix=fix)
    if config.train.batch_size % found.readers:
        what, expected = "the processes do not divide the batch", f"a multiple of {found.readers}, data x shard"
        raise InputError(what, where="train.batch_size", found=config.train.batch_size, expected=expected)
    if found.parts > 1:
        _refuse(config, found)
    return found


def _refuse(config: RunConfig, found: Sizes) -> None:
    """Refuse what works on whole models or matrices alone."""
    odd = {
        "optim.optimizer": (config.optim.optimizer != "adamw", "Adafactor reads whole matrices"),
        "train.quantize": (config.train.quantize != "none", "quantized weights are not divided"),
        "train.compile": (config.train.compile == "true", "blocks are compiled whole"),
        "stages.trainable": (any(s.trainable != ("*",) for s in config.stages), "frozen parameters stay frozen"),
    }
    if found.tensor > 1:
        lora = config.lora
        for where, shape in _shapes(config).items():
            _check_divides(shape, found.tensor, where)
            odd[f"{where}.mixer"] = (shape.mixer != "attention", "a recurrence has no heads to divide")
        sites = () if lora is None else (*lora.sites(config.model), *lora.whole(config.model))
        odd |= {
            "lora.use_dora": (lora is not None and lora.use_dora, "DoRA's norms are of whole rows"),
            "lora.dropout": (lora is not None and lora.dropout > 0, "the processes of a layer would draw other masks"),
            "lora.targets": (bool({EMBEDDING, HEAD} & {*sites}), "the vocabulary's adapters are not divided"),
        }
    for where, (is_odd, reason) in odd.items():
        if is_odd:
            what = f"this is not supported with shard {found.shard} and tensor {found.tensor}: {reason}"
            fix = "use data parallelism: leave parallel.shard and parallel.tensor at 1"
            raise InputError(what, where=where, fix=fix)


def _shapes(config: RunConfig) -> dict[str, ModelConfig]:
    """Shapes of the models that are divided, by the setting that gives them."""
    found, objective = {"model": config.model}, config.objective
    if isinstance(objective, PPOConfig) and objective.critic_from:
        path = Path(objective.critic_from)
        is_adapter = (path / CONFIG).exists()
        base = read_config(path / CONFIG).base_model_name_or_path if is_adapter else path
        found["objective.critic_from"] = model_config(base, "objective.critic_from")
    return found


def _check_divides(model: ModelConfig, tensor: int, where: str) -> None:
    for name in ("n_heads", "n_kv_heads"):
        if model.mixer == "attention" and getattr(model, name) % tensor:
            what, found = f"parallel.tensor = {tensor} does not divide the heads", getattr(model, name)
            raise InputError(what, where=f"{where}.{name}", found=found, expected=f"a multiple of {tensor}")
    for name in ("hidden_dim", "vocab_size"):
        size = getattr(model, name)
        if -(-size // tensor) * (tensor - 1) >= size:
            what = f"parallel.tensor = {tensor} leaves a process without a part"
            raise InputError(what, where=f"{where}.{name}", found=size, expected="more")


@dataclass(frozen=True)
class Parallel:
    """Mesh of a run, with this process's place in it.

    Args:
        sizes: of the axes.
        ranks: this process among those that read a batch.
        mesh: of all processes; None for one.
        free: bytes of memory per process, where the sizes were chosen by it.
        watch: over the steps of the processes; None for one, and for code that may be compiled anew at any step.
    """

    sizes: Sizes = field(default_factory=Sizes)
    ranks: Ranks = field(default_factory=Ranks)
    mesh: DeviceMesh | None = None
    free: float = math.inf
    watch: Watch | None = None

    def step(self) -> AbstractContextManager[None]:
        """Passes and sums of a training step, which end the run if they hang; see `Watch.step`."""
        return nullcontext() if self.watch is None else self.watch.step()

    @property
    def casts(self) -> bool:
        """Whether FSDP casts the weights to the dtype of the passes, so that no working copy is needed."""
        return self.sizes.shard > 1

    @property
    def divides(self) -> bool:
        """Whether each process has a part of the model."""
        return self.sizes.parts > 1

    def divide(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Divide a model in place, of which every process has the whole, or which is on the meta device.

        Args:
            model: a decoder, in float32 or, under adapters, frozen in `dtype`; or a head on one's hidden states.
            dtype: of the passes.
        """
        if self.mesh is None or any(map(is_sharded, model.parameters())):
            return
        if self.sizes.tensor > 1:
            from minillama.training.tensor_parallel import divide, replicate

            if isinstance(model, Decoder):
                divide(model, self.mesh["tensor"])
            else:
                replicate(model, self.mesh["tensor"])
        if self.sizes.shard > 1:
            _shard(model, self.mesh["shard"], dtype)
        if next(model.parameters()).device.type != "meta":
            self.gather_once(model)

    def gather_once(self, model: nn.Module) -> None:
        """Make the tensors that FSDP gathers into; in inference mode they would be none that training can write to."""
        if self.sizes.shard > 1:
            from torch.distributed.fsdp import FSDPModule

            for part in model.modules():
                if isinstance(part, FSDPModule):
                    part.unshard()
                    part.reshard()


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """FSDP2 of each block and of the rest, with sums in the place of means."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*(model.blocks if isinstance(model, Decoder) else ()), model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that multiplies
    if isinstance(model, Decoder):
        register_fsdp_forward_method(model, "hidden")


@contextmanager
def processes(config: RunConfig) -> Iterator[Parallel]:
    """Mesh over the process group, which is made from torchrun's environment if need be; of one process without it.

    Raises:
        InputError: as `sizes`; where a process fails, see `process_group`.
    """
    timeout = timedelta(seconds=config.parallel.timeout)
    with process_group(config.train.device, timeout) as watch:
        if watch is None:
            yield Parallel(sizes(config, 1))
            return
        _check_same_settings(config)
        device, free = choose_device(config.train.device), math.inf
        if config.parallel.auto:  # all decide by the least
            free = -Ranks.current().most(-(available_memory(device) or math.inf))
        found, kind = sizes(config, watch.count, free), "cuda" if device.type == "cuda" else "cpu"
        made = _parallel(found, kind, free, timeout)
        if config.train.compile != "true":
            made = replace(made, watch=watch)
        with made.ranks.enter():
            yield made


def _check_same_settings(config: RunConfig) -> None:
    """Refuse processes that were started with other settings, each of which would train another model."""
    tables = [flat(table) for table in Ranks.current().collect(to_table(config))]
    for index, table in enumerate(tables):
        others = [key for key in {**tables[0], **table} if table.get(key) != tables[0].get(key)]
        for key in [key for key in others if key != "data.cache"]:  # which every machine may have elsewhere
            what, found = "the processes have other settings", f"{table.get(key)} in process {index}"
            fix = "start all with the same command and configuration"
            raise InputError(what, where=key, found=found, expected=f"{tables[0].get(key)}, as in process 0", fix=fix)


def _parallel(found: Sizes, kind: str, free: float, timeout: timedelta) -> Parallel:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(kind, found, mesh_dim_names=found._fields)
    index, grid = distributed.get_rank(), mesh.mesh
    readers: Any = None
    for tensor in range(found.tensor):
        group = distributed.new_group(grid[:, :, tensor].flatten().tolist())
        readers = group if index in grid[:, :, tensor] else readers
    for group in (None, readers, *mesh.get_all_groups()):  # new ones have torch's own timeout
        distributed.distributed_c10d._set_pg_timeout(timeout, group)
    rank = mesh.get_local_rank("data") * found.shard + mesh.get_local_rank("shard")
    own = Ranks(rank, found.readers, index, found.processes, found.parts, readers, mesh.get_group("data"))
    return Parallel(found, own, mesh, free)
