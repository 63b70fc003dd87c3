"""SentencePiece training: its own trainer, or the reference algorithms in its file format."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from minillama.errors import InputError
from minillama.tokenizer import sentencepiece
from minillama.tokenizer.sentencepiece_vocab import BYTES, ModelKind, Pieces, PieceType

RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
MARKS = ("<unk>", "<s>", "</s>")
RESERVED = len(MARKS) + 256
LONGEST_LINE = 2**17  # characters; SentencePiece silently skips lines over a limit


def train(
    texts: Iterable[str],
    vocab_size: int,
    model: Literal["unigram", "bpe"],
    normalization: str,
    coverage: float,
    rest: int = 0,
) -> bytes:
    """SentencePiece library training, line by line. A short text gives fewer token pieces.

    Args:
        texts: documents.
        vocab_size: token pieces, including special tokens and the 256 bytes.
        model: segmentation algorithm.
        normalization: of `RULES`; all but identity collapse runs of spaces.
        coverage: character coverage; the rest falls back to bytes.
        rest: tokens that the caller adds to `vocab_size`, including the bytes; 0: the bytes are trained in.

    Raises:
        InputError: the package is missing, the text is empty, or its characters need more token pieces.
    """
    try:
        from sentencepiece import SentencePieceTrainer
    except ImportError:
        what, fix = "this kind of tokenizer needs the package sentencepiece", "pip install 'minillama[sentencepiece]'"
        raise InputError(what, fix=fix) from None
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=written,
            vocab_size=vocab_size,
            model_type=model,
            normalization_rule_name=normalization,
            remove_extra_whitespaces=normalization != "identity",
            character_coverage=coverage,
            byte_fallback=not rest,
            hard_vocab_limit=False,
            max_sentence_length=4 * LONGEST_LINE,  # bytes
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _input_error(str(error), vocab_size, rest) from None
    return written.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Nonempty lines, long ones split at spaces."""
    for line in (line for text in texts for line in text.split("\n")):
        start = 0
        while start < len(line):
            stop = start + LONGEST_LINE
            stop = (line.rfind(" ", start + 1, stop) if stop < len(line) else stop) or stop
            part = line[start : stop if stop > start else start + LONGEST_LINE]
            if part.strip():
                yield part
            start += len(part)


def _input_error(message: str, vocab_size: int, rest: int) -> InputError:
    high = re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message)
    if high:
        what = "the vocabulary is larger than the text allows"
        return InputError(what, where="vocab_size", found=vocab_size + rest, expected=f"at most {int(high[1]) + rest}")
    if small := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        what = "the characters of the text alone do not fit into the vocabulary"
        needed = max(int(small[1]), int(small[2])) + rest
        return InputError(what, where="vocab_size", found=vocab_size + rest, expected=f"at least {needed}")
    if "sentences_.empty()" in message:
        return InputError("there is no text to train a tokenizer on")
    return InputError("sentencepiece cannot train on this text", found=message)


def from_scores(scores: Mapping[str, float]) -> bytes:
    """Unigram model, without normalization."""
    pieces, types = _with_special(scores)
    return sentencepiece.serialize(Pieces(list(pieces), list(pieces.values()), types, ModelKind.UNIGRAM), 1, 2)


def from_merges(alphabet: Iterable[str], merges: Iterable[tuple[str, str]]) -> bytes:
    """BPE model, without normalization: scores are minus the merge rank, the characters come last."""
    joined = dict.fromkeys(left + right for left, right in merges)
    scores = {piece: -float(rank) for rank, piece in enumerate([*joined, *(a for a in alphabet if a not in joined)])}
    pieces, types = _with_special(scores)
    return sentencepiece.serialize(Pieces(list(pieces), list(pieces.values()), types, ModelKind.BPE), 1, 2)


def _with_special(scores: Mapping[str, float]) -> tuple[dict[str, float], list[int]]:
    types = [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL, *[PieceType.BYTE] * 256]
    pieces = dict.fromkeys([*MARKS, *BYTES], 0.0) | dict(scores)
    return pieces, [int(kind) for kind in [*types, *[PieceType.NORMAL] * len(scores)]]
