"""SentencePiece .model files: the tokenizers of Llama 1, Llama 2 and derived models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.tokenizer.sentencepiece_vocab import ModelKind, Pieces, PieceType
from minillama.tokenizer.spec import Parts, read_bytes


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
    """Whether the bytes start as a ModelProto with a first token piece."""
    return data[:1] == b"\x0a" and data[2:3] == b"\x0a"


def message(data: bytes, where: object) -> Any:
    """ModelProto of a file.

    Raises:
        InputError: not a SentencePiece model, or truncated.
    """
    proto = _proto().ModelProto()
    try:
        proto.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError, whose package may be absent
        raise InputError("not a SentencePiece model, or truncated", where=where, found=error) from None
    if not proto.pieces or not proto.IsInitialized():
        raise InputError("not a SentencePiece model, or truncated", where=where, found="no token pieces")
    return proto


def pieces_of(proto: Any, where: object) -> Pieces:
    """Vocabulary of a ModelProto.

    Raises:
        InputError: a model that a tokenizer.json cannot express.
    """
    _refuse(where, proto)
    rules = proto.normalizer_spec
    pieces = Pieces(
        [piece.piece for piece in proto.pieces],
        [piece.score for piece in proto.pieces],
        [piece.type for piece in proto.pieces],
        ModelKind(proto.trainer_spec.model_type),
        dummy_prefix=rules.add_dummy_prefix,
        charsmap=rules.precompiled_charsmap,
        squeeze=rules.remove_extra_whitespaces,
    )
    if pieces.kind == ModelKind.UNIGRAM and pieces.unknown is None:
        raise InputError("the vocabulary has no unknown token", where=where)
    return pieces


def _refuse(where: object, proto: Any) -> None:
    """Refuse models that a tokenizer.json cannot express."""
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


def read(file: Path) -> Parts:
    """Read a .model file. Generation starts with its bos token, as LLaMA's models were trained."""
    return parse(read_bytes(file), file)


def parse(data: bytes, where: object) -> Parts:
    """Tokenizer parts from the bytes of a .model file."""
    proto = message(data, where)
    pieces, spec = pieces_of(proto, where), proto.trainer_spec
    count = len(pieces.names)
    if not 0 <= spec.eos_id < count:
        field = f"{where}, trainer_spec.eos_id"
        raise InputError("the vocabulary has no end-of-text token", where=field, found=spec.eos_id)
    bos = pieces.names[spec.bos_id] if 0 <= spec.bos_id < count else None
    backend = _backend(pieces, where)
    encoder = None if pieces.is_exact else SentencePieceEncoder(data)
    return Parts(backend, pieces.names[spec.eos_id], bos, bos is not None, model=data, encoder=encoder)


class SentencePieceEncoder:
    """SentencePiece's own encoder, for models that a tokenizer.json only approximates."""

    def __init__(self, data: bytes) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor: Any = SentencePieceProcessor(model_proto=data)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Token ids per text."""
        ids: list[list[int]] = self._processor.encode(texts)
        return ids

    def surfaces(self, text: str) -> list[tuple[int, str]]:
        """Id and surface form of each token; an unknown token has the text that it covers."""
        return list(zip(self([text])[0], self._processor.encode(text, out_type=str), strict=True))

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and the range of characters that each covers."""
        from sentencepiece import sentencepiece_pb2

        protos: Any = sentencepiece_pb2
        found = protos.SentencePieceText()
        found.ParseFromString(self._processor.encode(text, out_type="serialized_proto"))
        places = [0]  # of a byte: the character that it belongs to
        for number, character in enumerate(text, 1):
            places += [number] * len(character.encode())
        return [p.id for p in found.pieces], [(places[p.begin], places[p.end]) for p in found.pieces]

    def normalize(self, text: str) -> str:
        """The normalized text, with U+2581 for spaces."""
        normal: str = self._processor.normalize(text)
        return normal


def _backend(pieces: Pieces, where: object) -> Backend:
    try:
        backend = pieces.backend()
        backend.encode("a")  # a damaged normalization fails only in use
    except InputError:
        raise
    except BaseException as error:
        # the library's panic is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        raise InputError("the vocabulary or its normalization is damaged", where=where, found=error) from None
    return backend


def serialize(pieces: Pieces, bos_id: int, eos_id: int) -> bytes:
    """Bytes of a .model file."""
    proto = _proto().ModelProto()
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
