"""SentencePiece vocabulary: token pieces with scores and types, and the equivalent backend.

Token pieces of higher score are merged earlier. The `tokenizers` library has ranked merges instead: every split of
a token piece into two others becomes a merge, ranked by the token piece's score.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.files import check_size
from minillama.tokenizer.reference.byte_fallback import BYTE
from minillama.tokenizer.spec import by_id, to_dict

LONGEST = 1000  # characters of a token piece
CHARACTERS = 2**23  # of all; Llama 3's have 0.8 million
SPACE = "▁"  # U+2581, a space inside token pieces
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # byte fallback: an unknown character becomes these
RESERVED_NAMES = frozenset([*BYTES, "<unk>", "<s>", "</s>", "<|endoftext|>"])  # never learned from text


class ModelKind(IntEnum):
    """Segmentation algorithm; SentencePiece's numbers (TrainerSpec.ModelType)."""

    UNIGRAM = 1
    BPE = 2
    CHAR = 4


class PieceType(IntEnum):
    """Token piece type (google/sentencepiece, src/sentencepiece_model.proto); GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Pieces:
    """SentencePiece vocabulary in the order of its ids."""

    names: Sequence[str]  # with U+2581 for a space
    scores: Sequence[float]  # log probabilities (unigram) or minus the merge index (BPE)
    types: Sequence[int]  # of `PieceType`
    kind: ModelKind = ModelKind.BPE
    dummy_prefix: bool = True  # prepend a space to every text
    charsmap: bytes = b""  # the compiled normalization, empty for identity
    squeeze: bool = False  # remove extra whitespace: strip spaces at the ends, collapse runs

    @classmethod
    def with_bytes(cls, special: Sequence[str], scores: Mapping[str, float], kind: ModelKind) -> Pieces:
        """Special tokens, the unknown token first; the 256 bytes; then token pieces with scores."""
        reserved = [*special, *BYTES]
        types = [PieceType.CONTROL] * len(special) + [PieceType.BYTE] * 256 + [PieceType.NORMAL] * len(scores)
        types[0] = PieceType.UNKNOWN
        return cls([*reserved, *scores], [0.0] * len(reserved) + list(scores.values()), types, kind)

    @property
    def unknown(self) -> int | None:
        """Id of the unknown token."""
        return self.types.index(PieceType.UNKNOWN) if PieceType.UNKNOWN in self.types else None

    @cached_property
    def is_exact(self) -> bool:
        """Whether `backend` segments every text as SentencePiece does.

        Not under a normalization: the library ignores rules of more than five bytes, as those for half-width
        kana. Not with user-defined token pieces: the library splits there before it normalizes, so that each part
        loses and gains spaces of its own. Not for a unigram model: it may break ties between segmentations
        otherwise. Not where a character of a token piece is none itself: the library merges token pieces alone,
        SentencePiece any characters. Not where token pieces of a BPE model have equal scores: SentencePiece then
        merges from left to right, the library the smaller id first. Nor where merges lead to an unused token piece,
        which SentencePiece splits again.
        """
        if self.charsmap or self.squeeze or PieceType.USER_DEFINED in self.types or self.kind == ModelKind.UNIGRAM:
            return False
        if self.kind == ModelKind.CHAR:
            return True
        scores = self._normal_scores
        if not self.has_characters or any(splits(name, scores) for name in self.of_type(PieceType.UNUSED)):
            return False
        # Llama 2's runs of spaces have equal scores, but lead to the longest run in either order
        joined = {left + right for left, right in self._merges() if len({*left, *right}) > 1}
        return len({scores[name] for name in joined}) == len(joined)

    @property
    def has_characters(self) -> bool:
        """Whether every character of a normal token piece is one itself, as in all but pruned vocabularies."""
        return self._normal_scores.keys() >= {char for name in self._normal_scores for char in name}

    def backend(self) -> Backend:
        """Equivalent `tokenizers` backend: SentencePiece's ids, if `is_exact`."""
        byte_fallback = PieceType.BYTE in self.types
        if self.kind == ModelKind.UNIGRAM:
            backend = Backend(models.Unigram(self._unigram_scores(), unk_id=self.unknown, byte_fallback=byte_fallback))
            backend.pre_tokenizer = pre_tokenizers.Split(self._split_pattern(), "merged_with_previous")
        else:
            vocab = {name: i for i, name in enumerate(self.names)}
            unknown = None if self.unknown is None else self.names[self.unknown]
            rules = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": byte_fallback}
            backend = Backend(models.BPE(vocab=vocab, merges=self._merges(), **rules))
        backend.normalizer = normalizers.Sequence(self._normalizers())
        backend.decoder = space_decoder(self.dummy_prefix)
        backend.add_special_tokens(self.of_type(PieceType.CONTROL, PieceType.UNKNOWN))
        backend.add_tokens([AddedToken(name, normalized=False) for name in self.of_type(PieceType.USER_DEFINED)])
        return backend

    def of_type(self, *types: PieceType) -> list[str]:
        """Names of the token pieces of these types."""
        return [name for name, kind in zip(self.names, self.types, strict=True) if kind in types]

    @cached_property
    def _normal_scores(self) -> dict[str, float]:
        """Scores of the normal token pieces: no merge may lead to special tokens or bytes."""
        rows = zip(self.names, self.scores, self.types, strict=True)
        return {name: score for name, score, kind in rows if kind == PieceType.NORMAL}

    def _merges(self) -> list[tuple[str, str]]:
        return merges_by_score(self._normal_scores) if self.kind == ModelKind.BPE else []

    @cached_property
    def _split_points(self) -> dict[str, int]:
        """Special, byte and unused tokens -> the offset of a split that keeps text from matching them, 0 for none.

        The library's unigram model matches every token piece; SentencePiece's matches normal ones alone. A split is
        safe between two characters that are adjacent in no normal token piece.
        """
        adjacent = {pair for name in self._normal_scores for pair in pairwise(name)}

        def split_point(name: str) -> int:
            return next((i for i, pair in enumerate(pairwise(name), 1) if pair not in adjacent), 0)

        reserved = self.of_type(PieceType.CONTROL, PieceType.UNKNOWN, PieceType.BYTE, PieceType.UNUSED)
        return {name: split_point(name) for name in reserved if len(name) > 1}

    def _unigram_scores(self) -> list[tuple[str, float]]:
        """Names with scores; tokens without a split point score below any other segmentation of their text.

        Six digits survive the round trip through a tokenizer.json.
        """
        worst = min([*self.scores, -1.0])
        scores = dict(zip(self.names, self.scores, strict=True))
        scores |= {name: 2 * len(name) * worst for name, i in self._split_points.items() if not i}
        return [(name, round(score, 6)) for name, score in scores.items()]

    def _split_pattern(self) -> Regex:
        """Prefixes, up to the split point, of texts that spell a special, byte or unused token."""
        splits = [(name[:i], name[i:]) for name, i in self._split_points.items() if i]
        return Regex("|".join(f"{re.escape(left)}(?={re.escape(right)})" for left, right in splits) or "(?!)")

    def _normalizers(self) -> list[Any]:
        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.squeeze:
            # not Strip, which removes other whitespace as well
            steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        return [*steps, *([normalizers.Prepend(SPACE)] if self.dummy_prefix else []), normalizers.Replace(" ", SPACE)]

    @classmethod
    def of(cls, backend: Backend) -> Pieces | None:
        """Vocabulary of a BPE backend that is equivalent to a SentencePiece model; None for any other.

        Scores are minus the rank of a token piece's first merge, which gives the same merges in the same order.
        """
        spec, table = to_dict(backend), by_id(backend)
        prefix = _dummy_prefix(spec)
        model, names = spec["model"], list(table.values())
        if model["type"] != "BPE" or not model["byte_fallback"] or prefix is None or max(table) >= len(table):
            return None
        merges = [(left, right) for left, right in model["merges"]]
        ranks: dict[str, int] = {}
        for rank, (left, right) in enumerate(merges):
            ranks.setdefault(left + right, rank)
        scores = [-float(ranks.get(name, len(ranks) + i)) for i, name in enumerate(names)]
        types = {name: PieceType.BYTE if BYTE.fullmatch(name) else PieceType.NORMAL for name in names}
        for token in spec["added_tokens"]:
            types[token["content"]] = PieceType.CONTROL if token["special"] else PieceType.USER_DEFINED
        if model["unk_token"] in types:
            types[model["unk_token"]] = PieceType.UNKNOWN
        pieces = cls(names, scores, list(types.values()), dummy_prefix=prefix)
        # the same merges, up to the order of splits of one token piece
        joined = [piece for piece, _ in groupby(left + right for left, right in merges)]
        same = len(joined) == len(set(joined)) and set(merges) == set(pieces._merges())
        return pieces if same else None


def _dummy_prefix(spec: Mapping[str, Any]) -> bool | None:
    """Whether a tokenizer.json prepends a space; None if it does not treat whitespace as SentencePiece does."""
    normalizer, pre = spec["normalizer"], spec["pre_tokenizer"]
    if normalizer is None and pre is not None and pre["type"] == "Metaspace" and not pre.get("split", True):
        return pre["prepend_scheme"] in ("always", "first")
    steps = [step["type"] for step in (normalizer or {}).get("normalizers", [normalizer or {"type": None}])]
    if pre is None and steps in (["Prepend", "Replace"], ["Replace"]):
        return "Prepend" in steps
    return None


def space_decoder(dummy_prefix: bool = True) -> Any:
    """SentencePiece's decoder: U+2581 is a space, byte tokens are bytes; the dummy prefix is stripped."""
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if dummy_prefix else [])])


def merges_by_score(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Merges of a scored vocabulary, in SentencePiece's order: by descending score, ties in the order given.

    Raises:
        InputError: a score is NaN, or a token piece is implausibly long.
    """
    if any(score != score for score in scores.values()):
        raise InputError("a score of the vocabulary is NaN")
    longest = max(map(len, scores), default=0)
    if longest > LONGEST:
        expected = f"at most {LONGEST} characters"
        raise InputError("a token of the vocabulary is too long", found=longest, expected=expected)
    check_size(sum(map(len, scores)), CHARACTERS, None, "characters of token pieces")
    return [pair for piece in sorted(scores, key=lambda piece: -scores[piece]) for pair in splits(piece, scores)]


def splits(piece: str, known: Container[str]) -> list[tuple[str, str]]:
    """The ways to split a token piece into two others."""
    pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
    return [(left, right) for left, right in pairs if left in known and right in known]
