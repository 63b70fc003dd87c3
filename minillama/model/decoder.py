"""The decoder: embedding, blocks, final norm, head. It reads from top to bottom.

Shapes: B batch, T time, V vocabulary, D model width, H query heads, K key/value heads, E head width,
F feed-forward width. Parameters carry Hugging Face's names for LLaMA, so that saving is a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minillama.config import ModelConfig
from minillama.config.arguments import Fraction, Positive, checked
from minillama.config.mup import Mup
from minillama.device import choose_device
from minillama.errors import InputError
from minillama.formats import generation_config, hf
from minillama.formats.layout import check_writable
from minillama.formats.model_file import ModelFile
from minillama.formats.open import open_model
from minillama.layers.attention import AttentionInputs
from minillama.layers.cache import CacheRange, State
from minillama.layers.cross_entropy import SoftmaxGrad, cross_entropy, linear_cross_entropy
from minillama.layers.dropout import dropout
from minillama.layers.hooks import is_changed
from minillama.layers.lora import effective_weight
from minillama.layers.mask import Mask
from minillama.layers.quantized_linear import Int4Linear, Int8Linear
from minillama.model.backbone import Backbone, check_inputs
from minillama.model.compile import compile_frugally
from minillama.model.init import initialize
from minillama.model.linears import fuse, is_fused, refuse_others


class Decoder(nn.Module):
    """A LLaMA language model.

    Args:
        config: its shape.
        dropout: probability for the embedding and both residual branches, while training. LLaMA has none.

    Attributes:
        stop_ids: tokens that end a text besides the tokenizer's own, as the model's folder says.
        sampling: sampling defaults of the model's folder, which a saved model keeps.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.
        loss_kernel: what computes the loss's `softmax_grad`; that itself unless one is set, see `native`.
        step: reads more tokens per row into a state and returns logits (B, V) behind the last, or None where it
            cannot; a faster way than the layers, see `native` and `graph_step`. There is none unless one is set.

    A tied head is one Parameter, `model.embed_tokens.weight`; then `lm_head` is None. With a scalar head instead
    (`heads.py`) there is `score`.
    """

    @checked
    def __init__(self, config: ModelConfig, dropout: Fraction = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.checkpointing = False
        self.stop_ids: frozenset[int] = frozenset()
        self.sampling: Mapping[str, Any] = {}
        self.step: Callable[[Sequence[Sequence[int]], State, Mask], Tensor | None] | None = None
        self.loss_kernel: SoftmaxGrad | None = None
        self.model = Backbone(config, dropout)
        writes = config.head == "lm"
        has_head = writes and not config.tie_embeddings
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False) if has_head else None
        self.score = None if writes else nn.Linear(config.dim, 1, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, mup: Mup | None = None) -> None:
        """Draw all weights anew, as `model/init.py` says.

        Args:
            generator: source of the random numbers; torch's global one unless given.
            mup: maximal update parametrization; the standard one unless given.
        """
        if not self.model.embed_tokens.weight.is_meta:
            initialize(self.config, dict(self.named_parameters()), generator, mup)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.model.embed_tokens.weight.dtype

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The layers, in order; `model.layers[i] = ...` replaces one."""
        return tuple(self.model.layers)

    @property
    def output_weight(self) -> Tensor:
        """(V, D), the head's matrix with its active adapter; the embedding's when tied.

        Raises:
            InputError: a model with a scalar head, which predicts no tokens.
        """
        if self.score is not None:
            raise InputError(
                "this model gives scores, and no tokens", fix="take the language model that it was made from"
            )
        return self.model.embed_tokens.weight if self.lm_head is None else effective_weight(self.lm_head)

    def hidden(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Tokens (B, T) -> the final norm's output (B, T, D), from which any head starts.

        Args:
            tokens: ids.
            positions: (T,) or (B, T) position ids; 0..T-1, or onwards from what the state has read. Models
                with two places a token take (2, T) or (B, 2, T), and 0 for the second unless given.
            mask: attention mask; causal unless given.
            state: the decode state, which takes the tokens in. Rows are padded on the right and
                `mask.lengths` says how much of each is real.
        """
        check_inputs(tokens, positions, mask, state)
        mask = (mask or Mask()).within(self.config.sliding_window)
        count = tokens.shape[1]
        span = state.span(count) if state is not None else CacheRange(0, count, count, length=count)
        if positions is None:
            positions = self._positions(span, tokens.device)
        kind = self._product_dtype()
        rope = self.model.rope(positions, kind, span.length) if self.model.rope is not None else None
        kernel_mask = mask.for_kernel(span, tokens.device)
        if self.model.alibi is not None:
            kernel_mask = self.model.alibi(kernel_mask, span, kind)
        inputs = AttentionInputs(rope, kernel_mask, span)
        x = self.model.embed(tokens, positions)
        x = dropout(x, self.dropout, self.training)
        for i, layer in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, inputs, use_reentrant=False)
            elif state is None:
                x = layer(x, inputs)
            else:  # not through compiled code, which would be made anew for every length of the state
                x = layer._call_impl(x, inputs, state.layers[i])
        if state is None:
            return self.model.norm(x)
        state.advance([span.count] * len(tokens) if mask.lengths is None else mask.lengths.tolist())
        return cast(Tensor, self.model.norm._call_impl(x))  # for the same reason

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V). The arguments are those of `hidden`."""
        return self.head(self.hidden(tokens, positions=positions, mask=mask, state=state))

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        return F.linear(hidden, self.output_weight) if self.lm_head is None else self.lm_head(hidden)

    @checked
    def loss(self, hidden: Tensor, targets: Tensor, weights: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """Sum of nats of the head's predictions, as `cross_entropy` of `head(hidden)`, in little memory.

        Args:
            hidden: (..., D) what `hidden` gave.
            targets: (...) ids.
            weights: (...); 1 unless given.
            z_loss: weight of PaLM's z-loss.
        """
        if self.lm_head is not None and is_changed(self.lm_head):
            return cross_entropy(self.head(hidden), targets, weights, z_loss)
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        return linear_cross_entropy(hidden, self.output_weight, targets, weights, z_loss, self.loss_kernel)

    @checked
    def state(
        self, batch_size: Positive, max_len: Positive | None = None, cache_dtype: torch.dtype | None = None
    ) -> State:
        """An empty decode state for `batch_size` rows of at most `max_len` tokens; see `State`."""
        return State(self.config, batch_size, max_len, self.dtype, self.device, cache_dtype)

    @torch.no_grad()
    def resize_embeddings(
        self,
        vocab_size: int,
        init: Literal["normal", "mean"] = "normal",
        generator: torch.Generator | None = None,
    ) -> None:
        """Give the embedding and the head more rows. Old rows stay as they are, to the bit.

        Args:
            vocab_size: rows, no fewer than there are.
            init: of the new rows: `normal`, 0.02, as fresh ones (Chinese-LLaMA); `mean` of the old rows, of each
                matrix its own (Stanford Alpaca).
            generator: source of the random numbers; torch's global one unless given.

        Raises:
            InputError: fewer rows than there are, an unknown `init`, a head or embedding with adapters or in int8.
        """
        old = self.config.vocab_size
        if vocab_size < old:
            raise InputError(
                "an embedding cannot lose rows", where="vocab_size", found=vocab_size, expected=f">= {old}"
            )
        if init not in ("normal", "mean"):
            raise InputError("unknown way to fill new rows", where="init", found=init, expected="normal or mean")
        for module in (self.model.embed_tokens, self.lm_head):
            if module is None:
                continue
            if type(module) not in (nn.Embedding, nn.Linear):
                what, fix = "this layer takes no more rows", "resize it before quantize() or adding adapters"
                raise InputError(what, found=type(module).__name__, expected="nn.Embedding or nn.Linear", fix=fix)
            weight = module.weight
            rows = torch.empty(vocab_size - old, weight.shape[1], device=weight.device)
            if init == "mean":
                rows[:] = weight.float().mean(0)
            else:
                rows.normal_(0.0, 0.02, generator=generator)
            grown = torch.cat([weight, rows.to(weight.dtype)])
            module.weight = nn.Parameter(grown, requires_grad=weight.requires_grad)
        self.model.embed_tokens.num_embeddings = vocab_size
        if self.lm_head is not None:
            self.lm_head.out_features = vocab_size
        self.config = replace(self.config, vocab_size=vocab_size)
        self.step = None  # it has the old rows

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module` has it; a faster step has other tensors than those that are assigned, and goes."""
        self.step = None if assign else self.step
        return super().load_state_dict(state_dict, strict, assign)

    def compile_blocks(self) -> None:
        """Compile each block and the last norm in place: names stay, all blocks share one piece of compiled code."""
        for layer in (*self.blocks, self.model.norm):
            layer.compile(dynamic=False, backend=compile_frugally)

    def fuse(self) -> Decoder:
        """Merge products of one input for decoding. There is no way back; a fused model is not saved.

        Raises:
            InputError: after `quantize`, or linear layers that are more than `nn.Linear`, such as an adapter's.
        """
        self._refuse_quantized("fused")
        refuse_others(self, self.config.tensors(), "fused")
        fuse(self)
        self.step = None  # it has the old matrices
        return self

    def _refuse_changed(self) -> None:
        """Refuse layers of another kind or shape than those that a folder's reader makes."""
        with torch.device("meta"):
            found, expected = map(_described, (self, Decoder(self.config)))
        for name in found:
            if found[name] != expected.get(name):
                what, fix = "a folder cannot say that this was changed", "save its state_dict() with torch.save"
                raise InputError(what, where=name, found=found[name], expected=expected.get(name), fix=fix)

    def _refuse_quantized(self, verb: str) -> None:
        if any(isinstance(part, Int8Linear | Int4Linear) for part in self.modules()):
            raise InputError(f"a quantized model cannot be {verb}", fix="do it before quantize()")

    def _positions(self, span: CacheRange, device: torch.device) -> Tensor:
        """The places of a text that is read from left to right."""
        positions = span.positions(device)
        if self.config.position in ("rope-2d", "learned-2d"):
            return torch.stack((positions, torch.zeros_like(positions)), dim=-2)
        return positions

    def _product_dtype(self) -> torch.dtype:
        """The type that queries and keys will have."""
        kind = self.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.dtype

    @classmethod
    @checked
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | ModelFile,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Decoder:
        """Read a model, in evaluation mode: a Hugging Face or Meta folder, a GGUF file or a llama2.c binary.

        Args:
            path: the folder or file, or what `open_model` gave for it.
            dtype: convert the weights. As they are stored unless given, but float32 for quantized ones and
                for float16 on a CPU.
            device: where to put them: auto, cpu, cuda, cuda:N or mps.

        Raises:
            InputError: a file is missing or damaged, or its tensors are not those of its configuration; a device
                that is not there.
        """
        device = choose_device(str(device), "Decoder.from_pretrained, device")
        source = path if isinstance(path, ModelFile) else open_model(path)
        with torch.device("meta"):
            model = cls(source.config)
        return model.fill(source, dtype or source.default_dtype(device), device)

    def fill(self, source: ModelFile, dtype: torch.dtype, device: torch.device | str) -> Decoder:
        """Read the parameters that are still on the meta device, and be ready to decode.

        Args:
            source: an opened model of this shape.
            dtype: of the parameters.
            device: where to put them.
        """
        missing = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        weights = {name: source.tensors[name].to(device=device, dtype=dtype) for name in missing}
        self.load_state_dict(weights, strict=False, assign=True)
        self.model.reset_position_tables(source.config)
        self.to(device)
        self.stop_ids, self.sampling = source.stop_ids, source.sampling
        return self.eval()

    @checked
    def save_pretrained(self, path: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json and the weights into a folder, which is made if need be.

        Args:
            path: the folder.
            max_shard_size: of one file, in bytes or as "500MB".

        Raises:
            InputError: after `fuse` or `quantize`, when the tensors no longer have their names; layers that were
                changed by hand; a size that is none.
        """
        self._refuse_quantized("saved")
        if is_fused(self):
            raise InputError("a fused model cannot be saved", fix="save it before calling fuse()")
        size, tensors = hf.parse_size(max_shard_size), self.state_dict()
        check_writable(tensors, self.config)
        self._refuse_changed()
        hf.write(Path(path), self.config, tensors, max_shard_size=size)
        if self.stop_ids or self.sampling:
            generation_config.write(Path(path), bos_id=None, eos_ids=sorted(self.stop_ids), sampling=self.sampling)


def _described(model: nn.Module) -> dict[str, object]:
    """Kinds of the modules within a model and shapes of its parameters, by name."""
    kinds: dict[str, object] = {name: type(part).__name__ for name, part in model.named_modules() if name}
    return kinds | {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
