"""Memory and training time by arithmetic, in bytes and days, in the notation of `config/shape.py`. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minillama.config.model import ModelConfig

SPARE = 256  # minimum slots beside a window's: the chunk of chunked prefill


def loss_rows(vocab_size: int, number_bytes: int) -> int:
    """Tokens per chunk of logits in the loss, as many as 128 MiB hold.

    Every chunk reads the head and writes its gradient, (V, D): with fewer than some hundred tokens that takes longer
    than the matrix products.
    """
    return max(512, 2**27 // (vocab_size * number_bytes))


class _Parts:
    @property
    def total(self) -> int:
        """The sum. Of training an upper bound: the logits are gone before the last gradients appear."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class TrainingMemory(_Parts):
    """Training memory in bytes, by part.

    Attributes:
        weights: parameters.
        gradients: of the parameters.
        optimizer: optimizer state, two moments per parameter.
        casts: low-precision copies of the matrices, which autograd keeps; 0 in float32.
        activations: tensors saved for the backward pass, the logits aside.
        logits: a chunk of logits, and the gradients of the head computed with it.
    """

    weights: int
    gradients: int
    optimizer: int
    casts: int
    activations: int
    logits: int


@dataclass(frozen=True)
class InferenceMemory(_Parts):
    """Inference memory in bytes, by part.

    Attributes:
        weights: parameters.
        state: KV cache.
    """

    weights: int
    state: int


def training_memory(
    config: ModelConfig,
    batch: int,
    seq_len: int,
    *,
    weight_bytes: int = 4,
    grad_bytes: int = 4,
    optimizer_bytes: int = 8,
    activation_bytes: int = 4,
    checkpointing: bool = False,
) -> TrainingMemory:
    """Training memory of one step on one device.

    Activations are the tensors that autograd keeps for `model.Decoder`, with a fused attention kernel (no
    T x T matrix). Values per token and block, in `activation_bytes` unless another type is named:

    - each of two norms, in the weights' type: its input D and the normalized input D; in float32 the
      reciprocal root 1
    - the input of q, k and v: D, or 3D where each of these linear layers casts its own. The same for gate and
      up: D or 2D
    - queries HE, keys KE, values KE, the kernel's output HE, and in float32 its log-sum-exp H
    - gate F, up F, silu(gate) F, their product F
    - with qk_norm of every query and key head the norm's input and output, 2E in float32, and its reciprocal root 1;
      the queries once more, HE

    Around the blocks: token ids, the final norm, and of the loss (`layers/cross_entropy.py`) the gradients of its
    input and of the head's matrix, in float32, and a chunk of logits. With checkpointing the
    inputs of all blocks are kept, and one block at a time in full. CUDA's fused norm does not keep the normalized
    input, compiled blocks recompute more, and SwiGLU in C++ (`native/swiglu.py`) keeps none of its four. Rotary
    tables, attention masks, allocator fragmentation, workspaces of kernels in C++, and the attention weights that
    bfloat16 keeps on a CPU where attention is not C++ (`layers/attend.py`, HT to 2HT bytes per token and block, below
    a context of 1024) are left out.

    Args:
        batch: B, sequences in memory at once (the micro-batch).
        weight_bytes: per parameter.
        grad_bytes: per gradient.
        optimizer_bytes: state per parameter; AdamW has two float32 moments, 8.
        activation_bytes: per value of a matrix product: 4 in float32, 2 in bfloat16.
        checkpointing: each block is recomputed in the backward pass.
    """
    count, tokens = config.num_params(), batch * seq_len
    cast = activation_bytes < weight_bytes
    uncast = (2 * config.n_layers + 1) * config.dim  # norms, biases
    uncast += sum(math.prod(row.shape(config)) for row in config.parameters().values() if row.role == "bias")
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    values = (5 if cast else 2) * config.dim + 2 * q + 2 * kv + 4 * config.hidden_dim
    block = 2 * (2 * config.dim * weight_bytes + 4) + 4 * config.n_heads + activation_bytes * values
    inputs = weight_bytes * config.dim  # the residual stream, which is not cast
    kept = config.n_layers * inputs + block - inputs if checkpointing else config.n_layers * block
    if config.qk_norm:
        block += (config.n_heads + config.n_kv_heads) * (8 * config.head_dim + 4) + activation_bytes * q
    ends = 8 + 2 * weight_bytes * config.dim + 4
    return TrainingMemory(
        weights=count * weight_bytes,
        gradients=count * grad_bytes,
        optimizer=count * optimizer_bytes,
        casts=(config.num_params(embedding=False) - uncast) * activation_bytes if cast else 0,
        activations=tokens * (kept + ends),
        logits=activation_bytes * config.vocab_size * min(tokens, loss_rows(config.vocab_size, activation_bytes))
        + tokens * activation_bytes * config.dim
        + 4 * config.vocab_size * config.dim,
    )


def inference_memory(
    config: ModelConfig, batch: int, seq_len: int, weight_bytes: float = 2, kv_bytes: float = 2
) -> InferenceMemory:
    """Inference memory, without the activations of the decode step, which are small beside it.

    Args:
        batch: sequences at once.
        seq_len: tokens of each, prompt included.
        weight_bytes: per parameter, on average: 4 float32, 2 bfloat16, 1 int8, 0.5 int4 (scales not counted).
        kv_bytes: per value of the KV cache.
    """
    return InferenceMemory(
        weights=int(config.num_params() * weight_bytes),
        state=batch * config.state_bytes(seq_len, kv_bytes),
    )


def cache_slots(config: ModelConfig, seq_len: int, window: int = 0, sinks: int = 0) -> int:
    """Slots of the KV cache per sequence.

    With a window those of the sinks and twice the window, at least 256 more than it: when no slot is left, tokens
    outside every window are evicted. Only with RoPE: ALiBi counts slots, and GLM attends to its whole prefix.

    Args:
        seq_len: tokens, prompt included.
        window: tokens attended to at most, its own included; 0: all.
        sinks: attention sinks, first tokens that are attended to as well.
    """
    if not window or config.position != "rope":
        return seq_len
    return min(seq_len, sinks + window + max(window, SPARE))


def training_days(
    config: ModelConfig,
    tokens: float,
    seq_len: int,
    flops_per_second: float,
    devices: int = 1,
    utilization: float = 1.0,
) -> float:
    """Training days = tokens * FLOPs per token / (devices * FLOP/s * utilization) / 86400.

    Args:
        tokens: training tokens.
        seq_len: T of a training sequence.
        flops_per_second: per device.
        utilization: share of `flops_per_second` that training achieves; 1 where it is the achieved rate.
    """
    return tokens * config.flops_per_token(seq_len) / (devices * flops_per_second * utilization) / 86400
