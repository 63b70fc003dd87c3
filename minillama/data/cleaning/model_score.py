"""Model score: the loss of a language model on a document, by which Ziya's data is put into buckets."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Literal

from minillama.data.cleaning.document import Draft, Figures, Step

if TYPE_CHECKING:
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelScore(Step):
    """Cross-entropy of the first tokens of a document, in bits per byte, which compare between tokenizers."""

    made_by = "name the folder of a model, as runs/NAME/model"

    name: Literal["model-score"] = "model-score"
    path: str = ""
    """A model of any format that opens."""
    tokenizer: str = ""
    """Its tokenizer, if that is not with it."""
    tokens: int = field(default=1024, metadata={"min": 2})
    min_bits_per_byte: float = 0.0
    max_bits_per_byte: float = 1e9

    def measure(self, draft: Draft) -> Figures:
        import torch

        from minillama.layers.cross_entropy import log_probabilities

        model, tokenizer = _load(self.path, self.tokenizer)
        ids = tokenizer.encode(draft.text, bos=True)[: min(self.tokens, model.config.max_seq_len) + 1]
        if len(ids) < 2:
            return {}
        row = torch.tensor([ids])
        with torch.inference_mode():
            nats = -log_probabilities(model(row[:, :-1])[0], row[0, 1:]).sum().item()
        size = max(len(tokenizer.decode(ids[1:]).encode()), 1)
        return {"nats_per_token": nats / (len(ids) - 1), "bits_per_byte": nats / 0.6931471805599453 / size}


@cache
def _load(path: str, tokenizer: str) -> tuple[Decoder, Tokenizer]:
    from minillama.formats.open import open_model
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

    file = open_model(path)
    return Decoder.from_pretrained(file), Tokenizer.load(tokenizer or file.tokenizer_path())
