"""Tokenizers: loading, encoding, decoding, streaming, and training of every kind. No torch here."""

from minillama.tokenizer.hf_json import END_OF_TEXT
from minillama.tokenizer.stream import StreamDecoder
from minillama.tokenizer.tokenizer import Tokenizer
from minillama.tokenizer.train import TokenizerTrainer, byte_tokenizer, char_tokenizer, train_byte_bpe

__all__ = [
    "END_OF_TEXT",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerTrainer",
    "byte_tokenizer",
    "char_tokenizer",
    "train_byte_bpe",
]
