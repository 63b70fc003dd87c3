"""SentencePiece .model files: the tokenizers of Llama 1, Llama 2 and derived models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError, optional_import
from minillama.files import read_bytes
from minillama.tokenizer import charsmap
from minillama.tokenizer.sentencepiece_vocab import ModelKind, Pieces, PieceType
from minillama.tokenizer.spec import FIX, LARGEST, Parts, library


def is_sentencepiece(data: bytes) -> bool:
    """Whether the bytes start as a ModelProto with a first token piece."""
    return data[:1] == b"\x0a" and data[2:3] == b"\x0a"


def message(data: bytes, where: object) -> Any:
    """ModelProto of a file.

    Raises:
        InputError: not a SentencePiece model, or truncated.
    """
    proto = _model_proto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, whose package may be absent
        raise InputError("not a SentencePiece model, or truncated", where=where, found=error) from None
    if not proto.pieces or not proto.IsInitialized():
        raise InputError("not a SentencePiece model, or truncated", where=where, found="no token pieces")
    return proto


def _model_proto() -> Any:
    module = "sentencepiece.sentencepiece_model_pb2"
    return optional_import(module, "a SentencePiece .model file", "sentencepiece").ModelProto()


def pieces_of(proto: Any, where: object) -> Pieces:
    """Vocabulary of a ModelProto.

    Raises:
        InputError: a model that a tokenizer.json cannot express.
    """
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    kinds = ", ".join(f"{kind.value} ({kind.name.lower()})" for kind in ModelKind)
    for field, value, expected, accepted in (
        ("trainer_spec.model_type", spec.model_type, kinds, spec.model_type in list(ModelKind)),
        ("trainer_spec.treat_whitespace_as_suffix", True, "false", not spec.treat_whitespace_as_suffix),
        ("normalizer_spec.escape_whitespaces", False, "true", rules.escape_whitespaces),
        ("denormalizer_spec", "rules", "none", not proto.denormalizer_spec.precompiled_charsmap),
    ):
        if not accepted:
            what = "this kind of SentencePiece model is not supported"
            raise InputError(what, where=f"{where}, {field}", found=value, expected=expected)
    pieces = Pieces(
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        ModelKind(spec.model_type),
        dummy_prefix=rules.add_dummy_prefix,
        charsmap=rules.precompiled_charsmap,
        squeeze=rules.remove_extra_whitespaces,
    )
    charsmap.check(pieces.charsmap, where)
    if pieces.kind == ModelKind.UNIGRAM and pieces.unknown is None:
        raise InputError("the vocabulary has no unknown token", where=where)
    return pieces


def read(file: Path) -> Parts:
    """Read a .model file."""
    return parse(read_bytes(file, FIX, LARGEST), file)


def parse(data: bytes, where: object) -> Parts:
    """Tokenizer of a .model file's bytes. Generation starts with its bos token, as LLaMA's models were trained."""
    proto = message(data, where)
    pieces, spec = pieces_of(proto, where), proto.trainer_spec
    names = dict(enumerate(pieces.names))
    if spec.eos_id not in names:
        field = f"{where}, trainer_spec.eos_id"
        raise InputError("the vocabulary has no end-of-text token", where=field, found=spec.eos_id)
    bos, backend, encoder = names.get(spec.bos_id), _backend(pieces, where), None
    if not pieces.is_exact:
        module = optional_import("sentencepiece", "a SentencePiece .model file", "sentencepiece")
        with library(where):
            encoder = module.SentencePieceProcessor(model_proto=data)
            encoder.encode("a")
    return Parts(backend, names[spec.eos_id], bos, bos is not None, model=data, encoder=encoder)


def with_offsets(encoder: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids by a SentencePieceProcessor, and the range of characters that each covers."""
    module = optional_import("sentencepiece.sentencepiece_pb2", "a SentencePiece .model file", "sentencepiece")
    found = module.SentencePieceText()
    found.ParseFromString(encoder.encode(text, out_type="serialized_proto"))
    places = [0]  # of a byte: the character that it belongs to
    for number, character in enumerate(text, 1):
        places += [number] * len(character.encode())
    return [p.id for p in found.pieces], [(places[p.begin], places[p.end]) for p in found.pieces]


def _backend(pieces: Pieces, where: object) -> Backend:
    with library(where):
        backend = pieces.backend()
        backend.encode("a")  # some damage fails only in use
    return backend


def serialize(pieces: Pieces, bos_id: int, eos_id: int) -> bytes:
    """Bytes of a .model file."""
    proto = _model_proto()
    for name, score, kind in zip(pieces.names, pieces.scores, pieces.types, strict=True):
        proto.pieces.add(piece=name, score=score, type=int(kind))
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    spec.model_type = int(pieces.kind)
    spec.vocab_size = len(pieces.names)
    spec.byte_fallback = PieceType.BYTE in pieces.types
    spec.unk_id, spec.bos_id, spec.eos_id = pieces.unknown or 0, bos_id, eos_id
    rules.name = "user_defined" if pieces.charsmap else "identity"
    rules.add_dummy_prefix, rules.remove_extra_whitespaces = pieces.dummy_prefix, pieces.squeeze
    rules.precompiled_charsmap = pieces.charsmap
    return bytes(proto.SerializeToString())
