"""SentencePiece training by its library."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from minillama.errors import InputError, optional_import

RULES = ("nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity")
SPECIAL = ("<unk>", "<s>", "</s>")
RESERVED = len(SPECIAL) + 256
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
    library = optional_import("sentencepiece", "this kind of tokenizer", "sentencepiece")
    written = io.BytesIO()
    try:
        library.SentencePieceTrainer.train(
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
    if high := re.search(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        what, expected = "the vocabulary is larger than the text allows", f"at most {int(high[1]) + rest}"
    elif small := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        what = "the characters of the text alone do not fit into the vocabulary"
        expected = f"at least {max(int(small[1]), int(small[2])) + rest}"
    elif "sentences_.empty()" in message:
        return InputError("there is no text to train a tokenizer on")
    else:
        return InputError("sentencepiece cannot train on this text", found=message)
    return InputError(what, where="vocab_size", found=vocab_size + rest, expected=expected)
