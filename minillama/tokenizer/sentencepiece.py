"""SentencePiece .model files: the tokenizer of Llama 1, Llama 2 and their kin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.tokenizer.parts import Parts, read_bytes
from minillama.tokenizer.pieces import Pieces, PieceType

__all__ = ["is_sentencepiece", "read", "read_pieces", "write"]

_UNIGRAM, _BPE = 1, 2


def _proto() -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise InputError(
            "SentencePiece .model files need the sentencepiece and protobuf packages, which are not installed",
            fix="pip install 'minillama[sentencepiece]'",
        ) from None
    return sentencepiece_model_pb2


def is_sentencepiece(data: bytes) -> bool:
    """Whether the bytes start as a ModelProto with a first piece."""
    return data[:1] == b"\x0a" and data[2:3] == b"\x0a"


def read_pieces(file: Path) -> tuple[Pieces, Any]:
    """The vocabulary, and the whole message for what else it says.

    Raises:
        InputError: not such a file, cut short, or of a kind (word, char) that the decoder's tokenizers are not.
    """
    data = read_bytes(file)
    proto = _proto().ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, whose package may be absent
        raise InputError("not a SentencePiece model, or cut short", where=file, found=error) from None
    if not proto.pieces or not proto.IsInitialized():
        raise InputError("not a SentencePiece model, or cut short", where=file, found="no pieces")
    kind, rules = proto.trainer_spec.model_type, proto.normalizer_spec
    if kind not in (_UNIGRAM, _BPE):
        where = f"{file}, trainer_spec.model_type"
        raise InputError(
            "this kind of SentencePiece model is not supported", where=where, found=kind, expected="1 or 2"
        )
    pieces = Pieces(
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        is_unigram=kind == _UNIGRAM,
        dummy_prefix=rules.add_dummy_prefix,
        charsmap=rules.precompiled_charsmap,
        squeeze=rules.remove_extra_whitespaces,
    )
    if pieces.is_unigram and pieces.unknown is None:
        raise InputError("the vocabulary has no unknown piece", where=file)
    return pieces, proto


def read(file: Path) -> Parts:
    """Read a .model file. Generation starts with its bos piece, as LLaMA's models were trained."""
    pieces, proto = read_pieces(file)
    spec, count = proto.trainer_spec, len(pieces.names)
    if not 0 <= spec.eos_id < count:
        where = f"{file}, trainer_spec.eos_id"
        raise InputError("the vocabulary has no end-of-text piece", where=where, found=spec.eos_id)
    bos = pieces.names[spec.bos_id] if 0 <= spec.bos_id < count else None
    return Parts(_backend(pieces, file), pieces.names[spec.eos_id], bos, add_bos=bos is not None)


def _backend(pieces: Pieces, file: Path) -> Backend:
    try:
        backend = pieces.backend()
        backend.encode("a")  # a damaged normalisation shows only in use
    except InputError:
        raise
    except BaseException as error:
        # what the library raises for it is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise InputError("the vocabulary or its normalisation is damaged", where=file, found=error) from None
    return backend


def write(file: Path, pieces: Pieces, bos_id: int, eos_id: int) -> None:
    """Write a .model file that SentencePiece reads."""
    proto = _proto().ModelProto()
    for name, score, kind in zip(pieces.names, pieces.scores, pieces.types, strict=True):
        proto.pieces.add(piece=name, score=score, type=int(kind))
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    spec.model_type = _UNIGRAM if pieces.is_unigram else _BPE
    spec.vocab_size = len(pieces.names)
    spec.byte_fallback = PieceType.BYTE in pieces.types
    spec.unk_id, spec.bos_id, spec.eos_id = pieces.unknown or 0, bos_id, eos_id
    rules.name = "identity"
    rules.add_dummy_prefix, rules.remove_extra_whitespaces = pieces.dummy_prefix, pieces.squeeze
    rules.precompiled_charsmap = pieces.charsmap
    file.write_bytes(proto.SerializeToString())
