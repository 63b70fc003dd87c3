"""Tokenizer comparison: fertility, compression and coverage."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import decoders

from minillama.errors import InputError, optional_import
from minillama.files import replace_file
from minillama.tokenizer.pre import piece_bytes
from minillama.tokenizer.reference.byte_fallback import BYTE
from minillama.tokenizer.sentencepiece_vocab import SPACE
from minillama.tokenizer.tokenizer import Tokenizer

WHITESPACE = 0.05  # per character; a text with less has no spaces between words


@dataclass(frozen=True)
class Figures:
    """Measures of one tokenizer on one text."""

    tokens: int  # of the text, its documents encoded one by one
    tokens_per_word: float | None  # fertility, over whitespace-separated words; None for a text without spaces
    tokens_per_character: float  # fertility where there are no words
    bytes_per_token: float  # compression, in UTF-8 bytes
    unknown: float  # share of unknown tokens
    coverage: float  # share of the characters in tokens of whole characters, neither unknown nor byte tokens


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> Figures:
    """The measures on a text, given as documents.

    Raises:
        InputError: there is no text.
    """
    documents = [text for text in texts if text]
    characters, words = sum(map(len, documents)), sum(len(text.split()) for text in documents)
    if not characters:
        raise InputError("there is no text to compare tokenizers on")
    whitespace = sum(map(str.isspace, "".join(documents))) / characters
    tokens = unknown = uncovered = 0
    for text in documents:
        surfaces = tokenizer.surfaces(text)
        tokens += len(surfaces)
        unknown += sum(token == tokenizer.unknown_id for token, _ in surfaces)
        uncovered += _uncovered(tokenizer, surfaces)
    return Figures(
        tokens=tokens,
        tokens_per_word=tokens / words if words and whitespace > WHITESPACE else None,
        tokens_per_character=tokens / characters,
        bytes_per_token=sum(len(text.encode()) for text in documents) / max(1, tokens),
        unknown=unknown / max(1, tokens),
        coverage=1 - uncovered / characters,
    )


def _uncovered(tokenizer: Tokenizer, surfaces: Sequence[tuple[int, str]]) -> int:
    """Number of characters in unknown tokens or in runs of byte tokens."""
    is_byte_level = isinstance(tokenizer.backend.decoder, decoders.ByteLevel)
    uncovered, run = 0, b""
    for token, surface in [*surfaces, (-1, "")]:
        part = b""
        if token == tokenizer.unknown_id:
            uncovered += len(surface.replace(SPACE, ""))
        elif is_byte_level and surface:
            data = piece_bytes(surface)
            part = data if "\ufffd" in data.decode(errors="replace") else b""
        elif byte := BYTE.fullmatch(surface):
            part = bytes([int(byte[1], 16)])
        if not part and run:
            uncovered, run = uncovered + len(run.decode(errors="replace")), b""
        run += part
    return uncovered


def plot(path: Path, table: dict[str, dict[str, Figures]]) -> None:
    """Bar charts of bytes per token and of coverage.

    Args:
        path: image file; its suffix is the format.
        table: tokenizer -> text -> figures.

    Raises:
        InputError: matplotlib is not installed, or does not know the format.
    """
    texts = list(next(iter(table.values())))
    library = optional_import("matplotlib.figure", "a plot", "plot")
    figure = library.Figure(figsize=(max(6.0, 1.2 * len(texts) + 2), 7), layout="constrained")
    width = 0.8 / len(table)
    fields = {"bytes per token": "bytes_per_token", "characters covered": "coverage"}
    for axes, (label, field) in zip(figure.subplots(2, 1), fields.items(), strict=True):
        for number, (name, row) in enumerate(table.items()):
            positions = [i + (number - (len(table) - 1) / 2) * width for i in range(len(texts))]
            axes.bar(positions, [getattr(row[text], field) for text in texts], width, label=name)
        axes.set_xticks(range(len(texts)), texts, rotation=20)
        axes.set_ylabel(label)
    figure.axes[0].legend()
    try:
        path = path if path.suffix else path.with_suffix(".png")
        replace_file(path, lambda file: figure.savefig(file, format=path.suffix[1:]))
    except ValueError as error:
        raise InputError("cannot write the plot", where=path, found=error) from None
