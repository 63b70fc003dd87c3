"""The decoder: embedding, blocks, final norm, head. It reads from top to bottom.

Shapes: B batch, T time, V vocabulary, D model width, H query heads, K key/value heads, E head width,
F feed-forward width. Parameters carry Hugging Face's names for LLaMA, so that saving is a copy.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.formats import hf
from minillama.formats.model_file import ModelFile
from minillama.formats.opening import open_model
from minillama.layers.attention import Attention
from minillama.layers.mask import KernelMask, Mask
from minillama.layers.mlp import SwiGLU
from minillama.layers.norm import RMSNorm
from minillama.layers.rope import Rope
from minillama.state import LayerState, Span, State

__all__ = ["Block", "Decoder"]


class Block(nn.Module):
    """y = x + attention(norm(x)); out = y + mlp(norm(y)). LLaMA, arXiv 2302.13971, §2.2."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: KernelMask,
        state: LayerState | None = None,
        span: Span | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D); see `Attention.forward` for the rest."""
        x = x + self._drop(self.self_attn(self.input_layernorm(x), rope, mask, state, span))
        return x + self._drop(self.mlp(self.post_attention_layernorm(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Backbone(nn.Module):
    """Everything but the head; what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, dropout) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.rope = Rope(config)


class Decoder(nn.Module):
    """A LLaMA language model.

    Args:
        config: its shape.
        dropout: probability for the embedding and both residual branches, while training. LLaMA has none.

    Attributes:
        stop_ids: tokens that end a text besides the tokenizer's own, as the model's folder says.
        checkpointing: recompute each block in the backward pass instead of keeping its activations.

    A tied head is one Parameter, `model.embed_tokens.weight`; then `lm_head` is None.
    """

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = dropout
        self.checkpointing = False
        self.stop_ids: frozenset[int] = frozenset()
        self.model = Backbone(config, dropout)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew.

        | parameter                    | distribution                          |
        |------------------------------|---------------------------------------|
        | embed_tokens, lm_head        | normal, 0.02                          |
        | q, k, v, gate, up            | normal, 0.02                          |
        | o_proj, down_proj            | normal, 0.02 / sqrt(2 n_layers)       |
        | every norm                   | 1                                     |

        The two scaled matrices write to the residual stream, 2 n_layers times in all, so that its variance
        does not grow with depth (GPT-2, §2.3). Fresh logits are small and the loss starts near ln V.

        Args:
            generator: source of the random numbers; torch's global one unless given.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                parameter.normal_(0.0, std, generator=generator)

    @property
    def device(self) -> torch.device:
        """Where the parameters lie."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.model.embed_tokens.weight.dtype

    @property
    def blocks(self) -> list[Block]:
        """The layers, in order."""
        return [cast(Block, layer) for layer in self.model.layers]

    @property
    def output_weight(self) -> Tensor:
        """(V, D), the head's matrix; the embedding's when tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Tokens (B, T) -> the final norm's output (B, T, D), from which any head starts.

        Args:
            tokens: ids.
            positions: (T,) or (B, T) position ids; 0..T-1, or onwards from what the state has read.
            mask: who sees whom; causal unless given.
            state: the decode state, which takes the tokens in. Rows are padded on the right and
                `mask.lengths` says how much of each is real.
        """
        mask = mask or Mask()
        span = state.span(tokens.shape[1]) if state is not None else Span(0, tokens.shape[1], tokens.shape[1])
        if positions is None:
            positions = span.slots(tokens.device)
        rope = self.model.rope(positions, self._product_dtype())
        kernel_mask = mask.for_kernel(span, tokens.device)
        x = self.model.embed_tokens(tokens)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        for i, layer in enumerate(self.blocks):
            if self.checkpointing and self.training:
                x = checkpoint(layer, x, rope, kernel_mask, use_reentrant=False)
            else:
                x = layer(x, rope, kernel_mask, state.layers[i] if state is not None else None, span)
        if state is not None:
            state.advance([span.count] * len(tokens) if mask.lengths is None else mask.lengths.tolist())
        return self.model.norm(x)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        mask: Mask | None = None,
        state: State | None = None,
    ) -> Tensor:
        """Tokens (B, T) -> logits (B, T, V). The arguments are those of `hidden`."""
        return self.head(self.hidden(tokens, positions, mask, state))

    def head(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V)."""
        return F.linear(hidden, self.output_weight) if self.lm_head is None else self.lm_head(hidden)

    def state(self, batch_size: int, max_len: int | None = None) -> State:
        """An empty decode state for `batch_size` rows of at most `max_len` tokens."""
        return State(self.config, batch_size, max_len, self.dtype, self.device)

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
            InputError: fewer rows than there are, or an unknown `init`.
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

    def compile_blocks(self) -> None:
        """Compile each block in place: names stay, and all blocks share one piece of compiled code."""
        for layer in self.blocks:
            layer.compile(dynamic=False)

    def fuse(self) -> Decoder:
        """Merge products of one input for decoding. There is no way back; a fused model is not saved."""
        for layer in self.blocks:
            layer.self_attn.fuse()
            layer.mlp.fuse()
        return self

    def _product_dtype(self) -> torch.dtype:
        """The type that queries and keys will have."""
        kind = self.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.dtype

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str] | ModelFile,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Decoder:
        """Read a model: a Hugging Face or Meta folder, a GGUF file or a llama2.c binary.

        Args:
            path: the folder or file, or what `open_model` gave for it.
            dtype: convert the weights. As they are stored unless given, but float32 for quantised ones and
                for float16 on a CPU.
            device: where to put them.

        Raises:
            InputError: a file is missing or damaged, or its tensors are not those of its configuration.
        """
        source = path if isinstance(path, ModelFile) else open_model(path)
        with torch.device("meta"):
            model = cls(source.config)
        dtype = dtype or source.default_dtype(device)
        weights = {name: tensor.to(device=device, dtype=dtype) for name, tensor in source.tensors.items()}
        model.load_state_dict(weights, assign=True)
        model.model.rope = Rope(source.config).to(device)
        model.stop_ids = source.stop_ids
        return model

    def save_pretrained(self, path: str | os.PathLike[str], max_shard_size: int | str = "5GB") -> None:
        """Write config.json and the weights into a folder, which is made if need be.

        Args:
            path: the folder.
            max_shard_size: of one file, in bytes or as "500MB".

        Raises:
            InputError: after `fuse`, when the tensors no longer have their names; a size that is none.
        """
        if any(layer.self_attn.fused for layer in self.blocks):
            raise InputError("a fused model cannot be saved", fix="save it before calling fuse()")
        hf.write(Path(path), self.config, self.state_dict(), max_shard_size=hf.parse_size(max_shard_size))
