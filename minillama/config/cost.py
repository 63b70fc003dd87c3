"""Memory and training time by arithmetic, in bytes and days, in the notation of `config/shape.py`. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from minillama.config.lora import HEAD, LoRAConfig
from minillama.config.model import ModelConfig
from minillama.config.parameters import KV_HEADS, Parameter, block

# per value of a block's matrices; int4 has a bfloat16 scale and zero point per group of 32
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.625}
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
        weights: parameters, those of adapters among them.
        gradients: of the trained parameters.
        optimizer: optimizer state, two moments per trained parameter.
        casts: copy of the parameters in a lower precision, or what is gathered or dequantized for a layer; else 0.
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


@lru_cache
def _split(config: ModelConfig, tensor: int) -> tuple[int, int, int]:
    """Parameters per tensor-parallel rank: of one block, of its largest matrix, and of all that is outside."""

    def share(row: Parameter) -> int:
        axis = row.split_axis
        parts = 1 if axis is None else min(tensor, config.n_kv_heads) if row.axes[axis] == KV_HEADS else tensor
        return -(-math.prod(row.shape(config)) // parts)

    inside = [share(row) for row in block(config).values()]
    outside = (share(row) for name, row in config.parameters().items() if not name.startswith("model.layers."))
    return sum(inside), max(inside), sum(outside)


def weight_bytes(config: ModelConfig, kind: str, other_bytes: int = 2, tensor: int = 1) -> int:
    """Bytes of the weights per tensor-parallel rank.

    Args:
        kind: float32, bfloat16, int8 or int4, of the blocks.
        other_bytes: per parameter of embedding, head and last norm, where the blocks are quantized.
        tensor: tensor-parallel ranks.
    """
    inside, _, outside = _split(config, tensor)
    width = WEIGHT_BYTES[kind]
    return int(config.n_layers * inside * width + outside * max(other_bytes, width))


def training_memory(
    config: ModelConfig,
    batch: int,
    seq_len: int,
    *,
    parameter_bytes: int = 4,
    optimizer_bytes: int = 8,
    activation_bytes: int = 4,
    checkpointing: bool = False,
    lora: LoRAConfig | None = None,
    quantize: str = "none",
    fused_norm: bool = False,
    shard: int = 1,
    tensor: int = 1,
) -> TrainingMemory:
    """Training memory of one step per device.

    Activations are those of `_kept`. Of the loss (`layers/cross_entropy.py`) there are the gradients of its input and,
    unless it is frozen, of the head's matrix, in float32, and a chunk of logits. Rotary tables, attention masks,
    allocator fragmentation and workspaces of kernels in C++ are left out.

    Fully sharded data parallelism (FSDP; Rajbhandari et al. 2020, arXiv 1910.02054, §5.3) divides parameters,
    gradients and optimizer state. Two blocks and what is outside of them are gathered at a time, and the gradients of
    the larger of these are whole until they are reduced. Tensor parallelism (`config/parameters.py`) with sequence
    parallelism (Korthikanti et al. 2022, arXiv 2205.05198, §4.2.2) divides matrices, and activations but for the
    gathered inputs of linear layers; adapters are counted whole.

    Args:
        batch: B, sequences in memory at once (the micro-batch).
        parameter_bytes: per parameter, and per gradient.
        optimizer_bytes: state per parameter; AdamW has two float32 moments, 8.
        activation_bytes: per value of a matrix product: 4 in float32, 2 in bfloat16.
        checkpointing: each block is recomputed in the backward pass.
        lora: adapters in float32 on frozen weights in `activation_bytes`; None trains all weights.
        quantize: int8 or int4, of the blocks' weights under adapters.
        fused_norm: as torch has it on CUDA.
        shard: devices that parameters, gradients and optimizer state are divided by.
        tensor: tensor-parallel ranks, which share the batch.
    """
    width, tokens = activation_bytes, batch * seq_len
    inside, largest, outside = _split(config, tensor)
    count = config.n_layers * inside + outside
    sites = {} if lora is None else lora.sites(config)
    trained = count if lora is None else lora.num_params(config)
    if lora is None:
        weights, casts = count * parameter_bytes, count * width if width < parameter_bytes else 0
    else:
        kind = quantize if quantize != "none" else "float32" if width == 4 else "bfloat16"
        weights, casts = weight_bytes(config, kind, width, tensor) + 4 * trained, largest * width
        casts = 0 if quantize == "none" else casts
    if shard > 1:
        reduced = 0 if sites else parameter_bytes * max(inside, outside)
        weights, trained, casts = weights // shard, trained // shard, width * (2 * inside + outside) + reduced

    low_rank = len(sites) * (lora.rank if lora else 0) // config.n_layers
    kept = _kept(config, width, low_rank, checkpointing, fused_norm, tensor)
    rows, vocab = min(tokens, loss_rows(config.vocab_size, width)), config.vocab_size / tensor
    has_grad = lora is None or HEAD in sites or HEAD in lora.whole(config)
    return TrainingMemory(
        weights=weights,
        gradients=trained * (parameter_bytes if lora is None else 4),
        optimizer=trained * optimizer_bytes,
        casts=casts,
        activations=int(tokens * kept),
        logits=int(width * (vocab * rows + tokens * config.dim) + 4 * vocab * config.dim * has_grad),
    )


def _kept(
    config: ModelConfig,
    width: int,
    low_rank: int,
    checkpointing: bool,
    fused_norm: bool,
    tensor: int,
) -> float:
    """Bytes per token that autograd keeps for `model.Decoder`, with a fused attention kernel (no T x T matrix).

    Values per block, of `width` bytes unless another type is named:

    - each of two norms: input D and normalized input D in float32, the reciprocal root 1; fused: its input D as it is,
      and the root
    - the inputs of q, k and v, D, and of gate and up, D
    - queries HE, keys KE, values KE, the kernel's output HE, and in float32 its log-sum-exp H
    - gate F, up F, silu(gate) F, their product F
    - r for each adapter, `low_rank` in all
    - with qk_norm of every query and key head the norm's input and output, 2E in float32, and its reciprocal root 1;
      the queries once more, HE

    Around the blocks token ids and the final norm. With checkpointing the inputs of all blocks are kept, and one block
    at a time in full. Compiled blocks recompute more, and SwiGLU in C++ (`native/swiglu.py`) keeps none of its four.
    The attention weights that bfloat16 keeps on a CPU where attention is not C++ (`layers/attend.py`, HT to 2HT bytes
    per block, below a context of 1024) are left out.
    """
    norm = (width if fused_norm else 8) * config.dim + 4
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    split = 4 * config.n_heads + width * (2 * q + 4 * config.hidden_dim)
    if config.qk_norm:
        split += (config.n_heads + config.n_kv_heads) * (8 * config.head_dim + 4) + width * q
    kv_parts = min(tensor, config.n_kv_heads)
    per_block = split / tensor + width * (2 * kv / kv_parts + 2 * config.dim + low_rank) + 2 * norm / tensor
    stream = width * config.dim / tensor
    blocks = config.n_layers * stream + per_block - stream if checkpointing else config.n_layers * per_block
    return blocks + 8 + norm / tensor


def inference_memory(
    config: ModelConfig, batch: int, seq_len: int, weights: str = "bfloat16", kv_bytes: float = 2, tensor: int = 1
) -> InferenceMemory:
    """Inference memory per device, without the activations of the decode step, which are small beside it.

    Args:
        batch: sequences at once.
        seq_len: tokens of each, prompt included.
        weights: float32, bfloat16, int8 or int4, see `weight_bytes`.
        kv_bytes: per value of the KV cache.
        tensor: tensor-parallel ranks.
    """
    state = batch * config.state_bytes(seq_len, kv_bytes) // min(tensor, config.n_kv_heads)
    return InferenceMemory(weight_bytes(config, weights, tensor=tensor), state)


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
