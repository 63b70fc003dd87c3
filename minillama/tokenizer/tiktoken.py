"""tiktoken ranks, Llama 3's tokenizer.model: base64 and rank per line."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.files import read_bytes
from minillama.tokenizer.pre import BYTE_TO_CHAR, byte_level_bpe, pattern_of, piece_bytes
from minillama.tokenizer.sentencepiece_vocab import merges_by_score
from minillama.tokenizer.spec import FIX, LARGEST, Parts, by_id

RANKS = 128000
# Llama 3.1's names for the 256 ids behind the ranks (meta-llama/llama-models, models/llama3/tokenizer.py).
_NAMED = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}
_RESERVED = iter(range(256))
SPECIAL = [f"<|{_NAMED.get(i) or f'reserved_special_token_{next(_RESERVED)}'}|>" for i in range(256)]


def is_tiktoken(data: bytes) -> bool:
    """Whether the first line is base64, a space and a number."""
    token, _, rank = data[:200].split(b"\n")[0].partition(b" ")
    try:
        return rank.strip().isdigit() and len(base64.b64decode(token, validate=True)) > 0
    except binascii.Error:
        return False


def read(file: Path) -> Parts:
    """Read the ranks, and add Llama 3's pre-tokenizer and its 256 special tokens.

    Raises:
        InputError: a malformed line, ranks that are not 0, 1, 2, ..., or as many as only another model has.
    """
    pieces: list[str] = []
    lines = read_bytes(file, FIX, LARGEST).splitlines()
    if len(lines) != RANKS and (len(lines) > RANKS or file.suffix == ".tiktoken"):
        what, fix = "these are not Llama 3's ranks", "give that model's tokenizer.json: ranks do not split texts"
        raise InputError(what, where=file, found=f"{len(lines)} ranks", expected=f"{RANKS} ranks", fix=fix)
    for number, line in enumerate(lines, 1):
        token, _, rank = line.partition(b" ")
        try:
            if int(rank) != len(pieces):
                raise ValueError(f"rank {int(rank)} where {len(pieces)} was expected")
            pieces.append("".join(BYTE_TO_CHAR[byte] for byte in base64.b64decode(token, validate=True)))
        except (ValueError, binascii.Error) as error:
            raise InputError("not a line of tiktoken's ranks", where=f"{file}:{number}", found=error) from None
    if len(set(pieces)) < len(pieces) or "" in pieces:
        raise InputError("a token is duplicated or empty", where=file)
    merges = merges_by_score({piece: -float(rank) for rank, piece in enumerate(pieces)})
    backend = byte_level_bpe([*pieces, *SPECIAL], merges, "llama-3", SPECIAL, ignore_merges=True)
    # where Meta's own code stops
    return Parts(backend, eos="<|end_of_text|>", bos="<|begin_of_text|>", stops=("<|eom_id|>", "<|eot_id|>"))


def write(file: Path, backend: Backend) -> None:
    """Write the ranks of a backend of Llama 3's kind.

    Raises:
        InputError: another pre-tokenizer than Llama 3's, which Meta's code hard-codes, or other special tokens.
    """
    table = by_id(backend)
    names = list(table.values())
    if pattern_of(backend) != "llama-3" or names[-256:] != SPECIAL or max(table) >= len(table):
        raise InputError(
            "this tokenizer is neither Llama 2's nor Llama 3's kind, and Meta's layout has no other",
            fix="convert --to hf or gguf instead, or train with the tokenizer.model of Llama 2 or 3",
        )
    lines = [base64.b64encode(piece_bytes(name)) + b" %d\n" % rank for rank, name in enumerate(names[:-256])]
    file.write_bytes(b"".join(lines))
