"""LLaMA decode step in C++ (`decode.cpp`) over a snapshot of a model's weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_float, c_int32, c_int64, c_size_t, c_void_p
from threading import Lock
from typing import Any, ClassVar, cast
from weakref import ref

import torch
from torch import Tensor, nn

from minillama.layers.attention import Attention
from minillama.layers.cache import KVCache, State
from minillama.layers.hooks import changed
from minillama.layers.lora import LoRALayer
from minillama.layers.mask import Mask
from minillama.layers.mlp import SwiGLU
from minillama.layers.nope import NopeAttention
from minillama.layers.norm import RMSNorm
from minillama.layers.qk_norm import QKNormAttention
from minillama.layers.quantized_linear import Int4Linear, Int8Linear
from minillama.layers.rope import Rope
from minillama.model import Block, Decoder
from minillama.native.build import load_library
from minillama.threads import free_threads

FLOAT32, BFLOAT16, INT8, INT4 = range(4)
FLOATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}
WIDTH = 16  # floats of the widest vector of decode.cpp
GROUP = 32  # columns that share a scale there
CHUNK = 512  # tokens of a pass: for more, products are no faster, and buffers larger
SPARE = 32  # numbers that are read behind the last scales
LARGEST = 2**13 - 1  # int4 weight there, in units of its row's scale
SHAPE = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")
LAYERS = (Attention, NopeAttention, QKNormAttention, SwiGLU, RMSNorm)
# Sums may be taken in any order, as vectors need it; everything else is as IEEE 754 says, NaN included.
REORDERED = ("-fassociative-math", "-fno-signed-zeros")


def _fields(kind: Any, *names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names]


class _Matrix(ctypes.Structure):
    _fields_: ClassVar = _fields(c_int32, "kind", "rows", "columns") + _fields(
        c_void_p, "weights", "scale", "grid", "bias"
    )


class _Layer(ctypes.Structure):
    _fields_: ClassVar = [
        *_fields(c_void_p, "attention_norm", "mlp_norm", "q_norm", "k_norm"),
        ("rotates", c_int64),
        *_fields(_Matrix, "qkv", "output", "gate_up", "down"),
    ]


class _Model(ctypes.Structure):
    _fields_: ClassVar = [
        *_fields(c_int32, *SHAPE, "max_rows", "threads"),
        ("eps", c_float),
        *_fields(c_void_p, "frequencies", "norm"),
        *_fields(_Matrix, "embedding", "head"),
        ("layer", ctypes.POINTER(_Layer)),
        ("memory", c_void_p),
    ]


class _Token(ctypes.Structure):
    _fields_: ClassVar = _fields(c_int64, "id", "sequence", "slot", "position", "last")


def unsupported(model: Decoder) -> str | None:
    """Reason why `NativeStep` does not support a model, or None; it needs LLaMA's layers on a CPU, after `fuse`."""
    config = model.config
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if reason := changed(model):
        return reason
    if any(isinstance(part, LoRALayer) for part in model.modules()):
        return "it has adapters"
    if not all(type(block) is Block for block in model.blocks) or type(model.model.rope) is not Rope:
        return "its layers are not LLaMA's"
    parts = [part for block in model.blocks for part in block.children()]
    if not all(getattr(part, "fused", True) and type(part) in LAYERS for part in parts):
        return "its products are not fused, or its layers are not LLaMA's"
    widths = {config.dim, config.head_dim, config.hidden_dim, config.n_heads * config.head_dim}
    if config.rotary_width != config.head_dim or any(width % WIDTH for width in widths):
        return f"its widths are no multiples of {WIDTH}"
    if config.logit_scale != 1 or model.model.embed_norm is not None or model.dtype not in FLOATS:
        return "its embedding or head is not LLaMA's"
    return None


def _integer_grid(product: Int4Linear) -> tuple[Tensor, Tensor]:
    """Scales and zero points in 16 bits, (O, I / 32, 2), and a scale per output channel S: see matrix.h.

    Of w = u s + z, u in 0..15, the first is round(16 s / S) and the second round(z / S), where S is such that no w of
    the row has more than 13 bits and a sign.
    """
    grid = product.grid.float().transpose(0, 1).repeat_interleave(product.group // GROUP, dim=1)
    scale, offset = grid[..., 0], grid[..., 1]
    bound = offset.abs() + 8 * scale.abs()
    unit = bound.amax(1).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    steps = torch.stack((16 * scale, offset - 8 * scale), dim=-1) / unit[:, None, None]
    padded = torch.zeros(steps.numel() + SPARE, dtype=torch.int16)
    padded[: steps.numel()] = steps.round().flatten()
    return padded, unit


def _versions(model: Decoder) -> list[tuple[Tensor, int, int]]:
    """Tensors of a model, their addresses, and torch's version counters of changes in place."""
    held = [t for t in (*model.parameters(), *model.buffers()) if not t.is_inference()]  # no version is counted there
    return [(tensor, tensor.data_ptr(), tensor._version) for tensor in held]


class NativeStep:
    """Decode step in C++, for `Decoder.step`: one token per sequence, or a few of short prompts, to logits.

    Sums and the residual stream are in float32 whatever the weights' type, so that bfloat16 weights give what they
    give in float32 arithmetic; keys and values are kept in the state's type.

    Args:
        model: a fused decoder for which `unsupported` is None. Its matrices are shared, its norms, biases and int4
            grids are copied: the step is a snapshot of the weights, see `refresh`. A change is seen and refused, except
            one through `parameter.data`, which torch does not count.
        say: called before compilation, which happens once per machine.

    Raises:
        CannotBuild: no compiler, or failed compilation.
    """

    def __init__(self, model: Decoder, say: Callable[[str], None] = lambda text: None) -> None:
        self.library = load_library("decode.cpp", say, REORDERED)
        self.library.minillama_floats.restype = c_size_t
        self.model = ref(model)  # which has the step: no circle, so that its memory is free when it goes
        self.memory = torch.empty(0)
        self.slots = self.threads = 0
        self.lock = Lock()
        self.refresh()

    @property
    def reads_prompts(self) -> bool:
        """Whether it reads prompts of any length faster than the layers."""
        return self.at_once > CHUNK

    def unsupported(self) -> str | None:
        """Reason why the layers are to decode now: what was changed by hand since; see `unsupported`."""
        model = self.model()
        return "the model is gone" if model is None else unsupported(model)

    def refresh(self) -> None:
        """Take the model's weights as they are now, after any change of them."""
        model = self.model()
        assert model is not None
        self.kept: list[object] = []  # what the pointers below point to
        self.versions = _versions(model)
        config, backbone = model.config, model.model
        self.window = config.sliding_window
        layers = [self._layer(cast(Any, block)) for block in model.blocks]
        head = backbone.embed_tokens if model.lm_head is None else model.lm_head
        assert backbone.rope is not None
        self.native = _Model(
            *(getattr(config, name) for name in SHAPE),
            eps=config.norm_eps,
            frequencies=self._floats(backbone.rope.frequencies),
            norm=self._floats(cast(RMSNorm, backbone.norm).weight),
            embedding=self._matrix(backbone.embed_tokens),
            head=self._matrix(head),
            layer=(_Layer * len(layers))(*layers),
        )
        self.at_once: int = self.library.minillama_at_once(ctypes.byref(self.native))
        self.slots = self.threads = 0  # the work memory is made anew

    def __call__(self, tokens: Sequence[Sequence[int]], state: State, mask: Mask) -> Tensor | None:
        """Logits (B, V) after each row's new tokens, float32; None where the layers are needed, or faster.

        Args:
            tokens: of B rows; the logits of one without tokens are zeros.
            state: KV cache, which they are appended to.
            mask: causal, with a window or without.

        Raises:
            ValueError: no slot is left, or the state is another model's or of another number of rows.
            RuntimeError: weights have changed since `refresh`.
            IndexError: a token that the vocabulary does not have.
        """
        counts = [len(row) for row in tokens]
        if sum(counts) > max(len(counts), self.at_once):
            return None
        described = (mask.prefix, mask.documents, mask.lengths)
        if not mask.causal or described != (None, None, None) or mask.window == 0:
            return None
        layers = [layer for layer in state.layers if isinstance(layer, KVCache)]
        stored = [tensor for layer in layers for tensor in layer.tensors]
        kinds = {part.dtype for part in stored}
        if len(kinds) != 1 or not kinds <= set(FLOATS):
            return None
        state.span(max(counts))  # refuses what does not fit
        native, mask = self.native, mask.within(self.window)
        shape = (len(tokens), native.n_kv_heads, state.max_len, native.head_dim)
        if len(layers) != native.n_layers or any(part.shape != shape or not part.is_contiguous() for part in stored):
            raise ValueError(f"the decode state is not one of {len(tokens)} rows of this model")
        ids = [token for row in tokens for token in row]
        if not all(0 <= token < native.vocab_size for token in ids):
            raise IndexError(f"a token id that is not in 0..{native.vocab_size - 1}: {min(ids)} to {max(ids)}")
        starts = zip(tokens, state.lengths, state.dropped, strict=True)
        read = [
            _Token(token, sequence, slot, slot + dropped, slot == start + len(row) - 1)
            for sequence, (row, start, dropped) in enumerate(starts)
            for slot, token in enumerate(row, start)
        ]
        ends = [count > 0 for count in counts]
        logits = torch.empty(sum(ends), native.vocab_size, dtype=torch.float32, device="cpu")
        if any(t._version != version or t.data_ptr() != address for t, address, version in self.versions):
            raise RuntimeError("the model's weights have changed since this step read them: call its refresh()")
        with self.lock:  # ctypes lets other threads run, and the work memory is one
            self._make_room(min(len(ids), CHUNK), state.max_len)
            self.library.minillama_step(
                ctypes.byref(native),
                c_int32(len(ids)),
                (_Token * len(read))(*read),
                (c_void_p * len(stored))(*(part.data_ptr() for part in stored)),
                c_int32(state.max_len),
                c_int32(kinds == {torch.bfloat16}),
                *map(c_int32, (mask.window or 0, mask.sinks)),
                c_void_p(logits.data_ptr()),
            )
        state.advance(counts)
        if all(ends):
            return logits
        everywhere = torch.zeros(len(counts), native.vocab_size, dtype=torch.float32, device="cpu")
        everywhere[torch.tensor(ends)] = logits
        return everywhere

    def __deepcopy__(self, memo: object) -> None:
        """None: it reads its model's weights, and a copy of the model would go on with those."""

    def _make_room(self, rows: int, slots: int) -> None:
        """Work memory for all of torch's threads, of which those run that have a processor for themselves."""
        native, threads = self.native, torch.get_num_threads()
        if rows > native.max_rows or slots > self.slots or threads != self.threads:
            self.slots, self.threads = max(slots, self.slots), threads
            native.max_rows, native.threads = max(rows, native.max_rows), threads
            count = self.library.minillama_floats(ctypes.byref(native), c_int32(self.slots))
            self.memory = torch.empty(count, dtype=torch.float32, device="cpu")
            native.memory = self.memory.data_ptr()
        native.threads = free_threads(threads)

    def _layer(self, block: Block) -> _Layer:
        attention, mlp = block.self_attn, cast(Any, block.mlp)
        norms: list[nn.Module | None] = [block.input_layernorm, block.post_attention_layernorm, None, None]
        if isinstance(attention, QKNormAttention):
            norms[2:] = attention.q_norm, attention.k_norm
        pointers = [None if norm is None else self._floats(cast(Any, norm).weight) for norm in norms]
        matrices = (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj)
        return _Layer(*pointers, not isinstance(attention, NopeAttention), *map(self._matrix, matrices))

    def _pointer(self, tensor: Tensor) -> int:
        tensor = tensor.detach().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor) -> int:
        return self._pointer(tensor.float())

    def _matrix(self, product: nn.Module) -> _Matrix:
        bias = getattr(product, "bias", None)
        found = _Matrix(bias=None if bias is None else self._floats(bias))
        if isinstance(product, Int8Linear):
            found.kind, (found.rows, found.columns) = INT8, product.quantized.shape
            found.weights, found.scale = self._pointer(product.quantized), self._floats(product.scale)
        elif isinstance(product, Int4Linear):
            found.kind, found.rows, found.columns = INT4, product.out_features, product.in_features
            grid, scale = _integer_grid(product)
            found.weights, found.grid, found.scale = map(self._pointer, (product.nibbles, grid, scale))
        else:
            weight = cast(Tensor, product.weight)
            found.kind, (found.rows, found.columns) = FLOATS[weight.dtype], weight.shape
            found.weights = self._pointer(weight)
        return found
