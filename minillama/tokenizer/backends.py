"""Tokenizer backends: normalization, pre-tokenization and model of each kind of vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minillama.tokenizer.hf_json import END_OF_TEXT
from minillama.tokenizer.pre import BYTE_TO_CHAR, byte_level_bpe
from minillama.tokenizer.reference.splitting import LOSSLESS_PATTERNS, PATTERNS
from minillama.tokenizer.reference.wordpiece import CONTINUATION
from minillama.tokenizer.sentencepiece_vocab import BYTES, SPACE, ModelKind, Pieces, space_decoder

UNKNOWN, WORDPIECE_UNKNOWN = "<unk>", "[UNK]"
RESERVED = 2 + len(BYTES)  # special tokens and bytes of a character-based vocabulary


def splitter(pattern: str) -> Any:
    """Regex pre-tokenizer for a pattern of `reference/splitting.py`."""
    if pattern in LOSSLESS_PATTERNS:
        return pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    return pre_tokenizers.Split(Regex(PATTERNS[pattern]), "removed", invert=True)


def escape_spaces() -> Any:
    """SentencePiece's normalizer: dummy prefix, and U+2581 for every space."""
    return normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def word(words: Iterable[str]) -> Backend:
    """Word-level model: words and punctuation; whitespace is lost, all other words are unknown."""
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([END_OF_TEXT, UNKNOWN, *words]))}
    backend = Backend(models.WordLevel(vocab=vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = splitter("words")
    backend.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return backend


def chars(characters: Iterable[str]) -> Backend:
    """Character-level model, all other characters unknown."""
    vocab = {piece: i for i, piece in enumerate([END_OF_TEXT, UNKNOWN, *characters])}
    # BPE without merges is three times as fast here as WordLevel behind a Split, and lines keep its words short.
    backend = Backend(models.BPE(vocab=vocab, merges=[], unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_previous")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return backend


def bpe(alphabet: Iterable[str], merges: Sequence[tuple[str, str]]) -> Backend:
    """BPE on characters, with byte fallback."""
    pieces = dict.fromkeys([END_OF_TEXT, UNKNOWN, *BYTES, *alphabet, *(left + right for left, right in merges)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocab, merges=list(merges), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    backend.normalizer, backend.pre_tokenizer = escape_spaces(), splitter("sentencepiece")
    backend.decoder = space_decoder()
    backend.add_special_tokens([END_OF_TEXT, UNKNOWN])
    return backend


def byte_bpe(merges: Sequence[tuple[str, str]], pattern: str) -> Backend:
    """Byte-level BPE; nothing is unknown."""
    alphabet = sorted(BYTE_TO_CHAR)
    pieces = dict.fromkeys([END_OF_TEXT, *alphabet, *(left + right for left, right in merges)])
    return byte_level_bpe(pieces, merges, pattern, [END_OF_TEXT])


def wordpiece(pieces: Iterable[str]) -> Backend:
    """WordPiece: BERT's greedy longest match from the left; whitespace is lost."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(models.WordPiece(vocab=vocab, unk_token=WORDPIECE_UNKNOWN))
    backend.pre_tokenizer = splitter("bert")
    backend.decoder = decoders.WordPiece(CONTINUATION, cleanup=False)
    backend.add_special_tokens([WORDPIECE_UNKNOWN, END_OF_TEXT])
    return backend


def unigram(scores: Mapping[str, float]) -> Backend:
    """Unigram model, with byte fallback."""
    return Pieces.with_bytes([UNKNOWN, END_OF_TEXT], scores, ModelKind.UNIGRAM).backend()
