"""Small models whose head counts would expose a swapped or missing permutation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from minillama import Decoder, ModelConfig, Tokenizer
from minillama.tokenizer import train_byte_bpe

# written for these tests
STORY = (
    "The miller kept two donkeys and a clock. Every morning the clock struck six, the donkeys ate, and the wheel "
    "began to turn. One winter the river froze and the wheel stood still; the miller sat by the fire, 17 days long, "
    "and mended sacks. 'Wait,' he told the donkeys, 'ice is only water that rests.'\n"
)


def _make(tied: bool = False, **changes: object) -> Decoder:
    """GQA: 6 query heads over 2 key/value heads, a head width of its own; widths fit Q4_0's blocks of 32."""
    shape = {"dim": 96, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "hidden_dim": 128, "vocab_size": 320}
    config = ModelConfig(**(shape | {"max_seq_len": 128, "tie_embeddings": tied} | changes))  # type: ignore[arg-type]
    model = Decoder(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def make() -> Callable[..., Decoder]:
    return _make


@pytest.fixture(scope="session")
def story() -> str:
    return STORY


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train_byte_bpe([STORY * 3], 320)
