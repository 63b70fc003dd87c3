"""Tensor and sequence parallelism: heads, feed-forward width, vocabulary and residual stream divided over processes.

Matrices as in Shoeybi et al. 2019, arXiv 1909.08053, §3, by the axes of `config/parameters.py`; the residual stream
over the sequence, as in Korthikanti et al. 2022, arXiv 2205.05198, §4.2.2. Parameters are DTensors, replicated ones
too, so that optimizers and FSDP need to know nothing of it; layers see their own part of each. Norms, dropout and
residual sums are of the own tokens. Attention and feed-forward layer begin with an all-gather over the sequence, whose
gradient is a reduce-scatter, and end with a reduce-scatter, whose gradient is an all-gather; gradients of replicated
parameters are summed. Passes into a decode state, often of a token per sequence, have the whole stream in every
process. The model's code is the same: objects get subclasses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.nn import functional as F

from minillama.layers.cache import State
from minillama.model import Decoder


class _Copy(torch.autograd.Function):
    """Identity; the gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """Sum over the group; the gradient is passed on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Concatenation of the group's parts along an axis; the gradient is the own part's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, axis: int) -> Tensor:
        ctx.axis, ctx.rank, ctx.size = axis, distributed.get_rank(group), x.shape[axis]
        return _gathered(x, group, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(ctx.axis, ctx.rank * ctx.size, ctx.size), None, None


class _GatherSequence(torch.autograd.Function):
    """All-gather over the sequence, (B, T / size, D) -> (B, T, D); the gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gathered(x, group, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scattered(grad, ctx.group), None


class _ScatterSequence(torch.autograd.Function):
    """Reduce-scatter over the sequence, (B, T, D) -> (B, T / size, D); the gradient is an all-gather."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _scattered(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gathered(grad, ctx.group, 1), None


def _gathered(x: Tensor, group: Any, axis: int) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, x, group=group)
    return torch.cat(parts, axis)


def _scattered(x: Tensor, group: Any) -> Tensor:
    """Own part of the sequence of the sum over the group, added in float32."""
    parts = x.unflatten(1, (distributed.get_world_size(group), -1)).movedim(1, 0).contiguous()
    found = torch.empty_like(parts)
    # gloo's reduce-scatter sends the whole to all
    distributed.all_to_all_single(found, parts, group=group)
    return found.sum(0)


@dataclass(eq=False)
class _Stream:
    """Residual stream: the own tokens of T, or all of them while decoding.

    Parts are of equal length. Where `size` does not divide T the last ones end with padding, which attention does not
    see and the loss does not read, so that its gradients are 0.

    Attributes:
        is_divided: false within a pass into a decode state. Else true, also where a block is recomputed.
    """

    group: Any
    size: int
    rank: int
    is_divided: bool = True

    def gather(self, x: Tensor) -> Tensor:
        """Input of a divided layer: all tokens, padding among them; the gradient is summed."""
        if not self.is_divided:
            return cast(Tensor, _Copy.apply(x, self.group))
        whole = getattr(x, "whole", None)
        if whole is None:
            whole = _GatherSequence.apply(x, self.group)
            x.whole = whole  # type: ignore[attr-defined]  # a parallel block has two layers that read it
        return cast(Tensor, whole)

    def sum(self, x: Tensor) -> Tensor:
        """Output of a divided layer, summed."""
        if not self.is_divided:
            return cast(Tensor, _Sum.apply(x, self.group))
        return cast(Tensor, _ScatterSequence.apply(F.pad(x, (0, 0, 0, -x.shape[1] % self.size)), self.group))

    def own(self, positions: Tensor) -> Tensor:
        """Position ids (..., T) of the own tokens."""
        if not self.is_divided:
            return positions
        return F.pad(positions, (0, -positions.shape[-1] % self.size)).chunk(self.size, -1)[self.rank]


class _Share(torch.autograd.Function):
    """Identity; the gradient is divided, for a sum over the group of what each process has whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.size, None


class _VocabularyKernel:
    """Softmax and its gradient over a divided vocabulary, as `cross_entropy.softmax_grad`.

    Args:
        start: first token of the own part.
        count: number of its tokens; further columns of logits are padding.
    """

    def __init__(self, start: int, count: int, group: Any) -> None:
        self.start, self.count, self.group = start, count, group

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __call__(self, scores: Tensor, targets: Tensor, weights: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        shifted, peak = self._shifted(scores)
        chosen, exps = self._chosen(shifted, targets), shifted.exp_()
        z, chosen = self._summed(exps.sum(-1, keepdim=True), chosen)
        log_z = peak + z.log()
        loss = ((log_z - chosen - peak + z_loss * log_z.square()) * weights).sum()
        if z_loss:
            exps.mul_(1 + 2 * z_loss * log_z)
        inside, own = self._own(targets)
        scores.copy_(exps.scatter_add_(-1, own, -z * inside))
        return loss, z

    def log_softmax(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets (rows,) and entropies (rows,) of logits (rows, V)."""
        shifted, _ = self._shifted(scores)
        chosen, exps = self._chosen(shifted, targets[:, None]), shifted.exp()
        mean = shifted.masked_fill_(exps == 0, 0).mul_(exps).sum(-1, keepdim=True)
        z, chosen, mean = self._summed(exps.sum(-1, keepdim=True), chosen, mean)
        return (chosen - z.log())[:, 0], (z.log() - mean / z)[:, 0]

    def _own(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which targets are of the own part, and their columns there."""
        own = targets - self.start
        inside = (own >= 0) & (own < self.count)
        return inside, own.where(inside, 0)

    def _chosen(self, shifted: Tensor, targets: Tensor) -> Tensor:
        """Logits of the targets of the own part, 0 for others."""
        inside, own = self._own(targets)
        return shifted.gather(-1, own).where(inside, 0)

    def _shifted(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Logits less their peak, in the place of those in float32, and the peak."""
        wide = scores.float()
        wide[:, self.count :] = -torch.inf
        peak = wide.amax(-1, keepdim=True)
        distributed.all_reduce(peak, distributed.ReduceOp.MAX, self.group)
        return wide.sub_(peak), peak

    def _summed(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Sums over the group of columns (rows, 1)."""
        sums = torch.cat(columns, -1)
        distributed.all_reduce(sums, group=self.group)
        return sums.split(1, -1)


def divide(model: Decoder, mesh: DeviceMesh) -> None:
    """Divide a decoder in place; each process keeps its part of the parameters, which all must have alike.

    Args:
        model: on its device, with or without adapters.
        mesh: of one axis.
    """
    group, size, rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    stream, table = _Stream(group, size, rank), model.config.parameters()
    for path, module in list(model.named_modules()):
        members: dict[str, object] = {}
        for name, parameter in module.named_parameters(recurse=False):
            axis = _axis(f"{path}.{name}", table)
            placement = Replicate() if axis is None else Shard(axis)
            module.register_parameter(name, nn.Parameter(_divided(parameter, mesh, placement), parameter.requires_grad))
            is_summed = axis is None and not path.startswith("score")  # every process has the scores of all tokens
            is_within = ".self_attn" in path or ".mlp" in path
            # the sum of all processes' outputs has it once
            share = 1 / size if is_summed and is_within and name == "bias" else 1.0
            members[name] = property(_view(name, group if is_summed else None, share))
        if members:
            _become(module, members)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        if path.rpartition(".")[2] in ("self_attn", "mlp"):
            _become(module, {"forward": _between(type(module), stream)})
    rows = -(-model.config.vocab_size // size)
    start, count = rank * rows, min(rows, model.config.vocab_size - rank * rows)
    _become(model.model.embed_tokens, {"forward": _embedding(type(model.model.embed_tokens), start, count, stream)})
    if model.model.embed_positions is not None:
        _become(model.model.embed_positions, {"forward": _positions(type(model.model.embed_positions), stream)})
    if model.model.alibi is not None:
        model.model.alibi.slopes = model.model.alibi.slopes.chunk(size)[rank]
    if model.score is None:
        model.loss_kernel = _VocabularyKernel(start, count, group)
    _become(model, _decoder_members(type(model), rows, stream))


def replicate(head: nn.Module, mesh: DeviceMesh) -> None:
    """Replicate a head on the hidden states of a divided decoder in place: each process computes all of it.

    The decoder sums the gradient of its hidden states, of which each has a part by the vocabulary; of this head's each
    has the whole, and gives its share.
    """
    for module in head.modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        for name in names:
            parameter = module.get_parameter(name)
            replica = nn.Parameter(_divided(parameter, mesh, Replicate()), parameter.requires_grad)
            module.register_parameter(name, replica)
        if names:
            _become(module, {name: property(_view(name, None, 1.0)) for name in names})
    head.register_forward_pre_hook(partial(_shared, mesh.size()))


def _shared(size: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_Share.apply(x, size) for x in inputs)


def _axis(name: str, table: Any) -> int | None:
    """Axis of a parameter that is divided, None for none; an adapter's follow from its layer's."""
    site, adapter, leaf = name.partition(".adapters.")
    axis = table[f"{site}.weight" if adapter else name].split_axis
    kind = leaf.rpartition(".")[2]
    if kind in ("lora_A", "lora_B"):  # (r, I) and (O, r) of a layer (O, I)
        return axis if axis == (1 if kind == "lora_A" else 0) else None
    return axis


def _divided(parameter: Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    own = parameter.detach()
    if isinstance(placement, Shard):
        size = -(-own.shape[placement.dim] // mesh.size())
        start = min(mesh.get_local_rank() * size, own.shape[placement.dim])
        own = own.narrow(placement.dim, start, min(size, own.shape[placement.dim] - start)).clone()
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(own, mesh, [placement], run_check=False, shape=shape, stride=stride)


def _become(module: nn.Module, members: dict[str, object]) -> None:
    """Make a module an object of a subclass of its class."""
    module.__class__ = type(f"Divided{type(module).__name__}", (type(module),), members)


def _view(name: str, group: Any, share: float) -> Any:
    """Getter of the own part of a parameter."""

    def get(self: nn.Module) -> Tensor:
        parameter: Any = self._parameters[name]
        if not isinstance(parameter, DTensor) or parameter.device_mesh.ndim > 1:  # FSDP's part of it, while at rest
            return cast(Tensor, parameter)
        own = parameter.to_local()
        if group is None or not own.requires_grad:
            return own * share if share != 1 else own
        return _Copy.apply(own, group) * share if share != 1 else _Copy.apply(own, group)

    return get


def _between(kind: type[nn.Module], stream: _Stream) -> Any:
    """Forward pass of a layer that reads all tokens and whose outputs are summed."""

    def forward(self: nn.Module, x: Tensor, *others: Any) -> Tensor:
        x = stream.gather(x)
        if others:  # of attention
            x = x[:, : others[0].span.count]
        return stream.sum(kind.forward(self, x, *others))

    return forward


def _embedding(kind: type[nn.Module], start: int, count: int, stream: _Stream) -> Any:
    """Rows of the own part, and zeros for the others, summed."""

    def forward(self: nn.Module, tokens: Tensor) -> Tensor:
        own = tokens - start
        inside = (own >= 0) & (own < count)
        return stream.sum(kind.forward(self, own.where(inside, 0)) * inside[..., None])

    return forward


def _positions(kind: type[nn.Module], stream: _Stream) -> Any:
    """Position embedding of the own tokens."""

    def forward(self: nn.Module, positions: Tensor) -> Tensor:
        return cast(Tensor, kind.forward(self, stream.own(positions)))

    return forward


def _decoder_members(kind: type[Decoder], rows: int, stream: _Stream) -> dict[str, object]:
    """Members of a divided decoder."""
    group, size = stream.group, stream.size

    def output_weight(self: Decoder) -> Tensor:
        weight = cast(Any, kind.output_weight).fget(self)
        return weight if len(weight) == rows else F.pad(weight, (0, 0, 0, rows - len(weight)))

    def hidden(self: Decoder, tokens: Tensor, **options: Any) -> Tensor:
        stream.is_divided = options.get("state") is None
        try:
            found = kind.hidden(self, tokens, **options)
            if self.score is None:
                found = stream.gather(found)
            elif stream.is_divided:
                found = cast(Tensor, _Gather.apply(found, group, 1))
            return found[:, : tokens.shape[1]]
        finally:
            stream.is_divided = True

    def head(self: Decoder, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden * self.config.logit_scale, self.output_weight)
        return cast(Tensor, _Gather.apply(logits, group, -1))[..., : self.config.vocab_size]

    def state(self: Decoder, batch_size: int, max_len: int | None = None, cache_dtype: Any = None) -> State:
        config = replace(self.config, n_heads=self.config.n_heads // size, n_kv_heads=self.config.n_kv_heads // size)
        return State(config, batch_size, max_len, self.dtype, self.device, cache_dtype)

    return {"output_weight": property(output_weight), "hidden": hidden, "head": head, "state": state}
