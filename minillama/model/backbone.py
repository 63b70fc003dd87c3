"""Backbone: embedding, positions, blocks, final norm; everything but the head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.layers.alibi import Alibi
from minillama.layers.block_positions import BlockPositions
from minillama.layers.long_rope import LongRope
from minillama.layers.mask import Mask
from minillama.layers.norm import make_norm
from minillama.layers.rope import Rope, Rope2D
from minillama.model.block import make_block


class Backbone(nn.Module):
    """Everything but the head; what Hugging Face calls `model`."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0) -> None:
        super().__init__()
        # `init_weights` draws it; what nn.Embedding draws would import torch's compiler on meta, a second
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim), freeze=False)
        self.embed_positions = BlockPositions(config) if config.position == "learned-2d" else None
        self.embed_norm = make_norm(config) if config.embedding_norm else None
        self.layers = nn.ModuleList(make_block(config, dropout, i) for i in range(config.n_layers))
        self.norm = make_norm(config)
        self.reset_position_tables(config)

    def reset_position_tables(self, config: ModelConfig) -> None:
        """Make the position tables that hold no parameter, on the device of the surrounding context."""
        with torch.device("cpu"):  # arithmetic on meta would import torch's compiler, a second
            kind = LongRope if config.is_longrope else Rope
            self.rope = {"rope": kind, "rope-2d": Rope2D}.get(config.position, lambda config: None)(config)
            self.alibi = Alibi(config.n_heads) if config.position == "alibi" else None
        for table in (self.rope, self.alibi):
            if table is not None:
                table.to(torch.get_default_device())

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (B, T) -> (B, T, D), with learned positions and a norm where the model has them."""
        try:
            x = self.embed_tokens(tokens)
        except IndexError:  # of a CPU; a GPU says less
            found = f"{int(tokens.min())} to {int(tokens.max())}"
            expected = f"0 to {self.embed_tokens.num_embeddings - 1}"
            raise InputError("a token id lies outside the vocabulary", found=found, expected=expected) from None
        if self.embed_positions is not None:
            x = x + self.embed_positions(positions)
        return x if self.embed_norm is None else self.embed_norm(x)


def check_inputs(tokens: Any, positions: Any, mask: Any, state: Any) -> None:
    """Refuse what is no batch of token ids, position ids, attention mask or decode state."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        is_tensor = isinstance(tokens, Tensor)
        found = f"{tokens.dtype} of shape {tuple(tokens.shape)}" if is_tensor else type(tokens).__name__
        expected, fix = "a tensor (B, T) of ids", "torch.tensor([tokenizer.encode(text)]) makes one"
        raise InputError("these are no token ids", where="tokens", found=found, expected=expected, fix=fix)
    for name, value, is_right, expected in (
        ("positions", positions, isinstance(positions, Tensor), "a tensor (T,) or (B, T)"),
        ("mask", mask, isinstance(mask, Mask), "a Mask"),
        ("state", state, hasattr(state, "span"), "what Decoder.state gives"),
    ):
        if value is not None and not is_right:
            what = f"{name} has a value of the wrong type"
            raise InputError(what, where=name, found=type(value).__name__, expected=expected)
