"""SentencePiece vocabulary: token pieces with scores and types, and the equivalent backend.

Token pieces of higher score are merged earlier. The `tokenizers` library has ranked merges instead: every split of
a token piece into two others becomes a merge, ranked by the token piece's score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.tokenizer.reference.byte_fallback import BYTE

LONGEST = 1000
SPACE = "▁"  # U+2581, a space inside token pieces
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # byte fallback: an unknown character becomes these
MARKS = frozenset([*BYTES, "<unk>", "<s>", "</s>", "<|endoftext|>"])  # tokens that are never learned from text


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
    """SentencePiece vocabulary in the order of its ids.

    Attributes:
        names: with U+2581 for a space.
        scores: log probabilities (unigram) or minus the merge index (BPE).
        types: of `PieceType`.
        kind: unigram, BPE or characters.
        dummy_prefix: prepend a space to every text.
        charsmap: SentencePiece's compiled normalization, empty for identity.
        squeeze: remove extra whitespace: strip spaces at the ends, collapse runs.
    """

    names: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    kind: ModelKind = ModelKind.BPE
    dummy_prefix: bool = True
    charsmap: bytes = b""
    squeeze: bool = False

    @property
    def unknown(self) -> int | None:
        """Id of the unknown token."""
        return next((i for i, kind in enumerate(self.types) if kind == PieceType.UNKNOWN), None)

    @cached_property
    def is_exact(self) -> bool:
        """Whether `backend` segments every text as SentencePiece does.

        Not under a normalization: the library ignores rules of more than five bytes, as those for half-width
        kana. Not with user-defined token pieces: the library splits there before it normalizes, so that each part
        loses and gains spaces of its own. Not for a unigram model: it may break ties between segmentations
        otherwise. Not where token pieces of a BPE model have equal scores: SentencePiece then merges from left to
        right, the library the smaller id first. Nor where merges lead to an unused token piece, which
        SentencePiece splits again.
        """
        if self.charsmap or self.squeeze or PieceType.USER_DEFINED in self.types or self.kind == ModelKind.UNIGRAM:
            return False
        if self.kind == ModelKind.CHAR:
            return True
        textual = self._textual()
        unused = [name for name, kind in zip(self.names, self.types, strict=True) if kind == PieceType.UNUSED]
        if any(merges_by_score({**textual, name: 0.0}, only=name) for name in unused):
            return False
        # Llama 2's runs of spaces have equal scores, but lead to the longest run in either order
        joined = {left + right for left, right in self._merges() if len({*left, *right}) > 1}
        return len({textual[name] for name in joined}) == len(joined)

    def backend(self) -> Backend:
        """Equivalent `tokenizers` backend: SentencePiece's ids, if `is_exact`."""
        byte_fallback = PieceType.BYTE in self.types
        if self.kind == ModelKind.UNIGRAM:
            model: Any = models.Unigram(self._scored(), unk_id=self.unknown, byte_fallback=byte_fallback)
        else:
            model = models.BPE(
                vocab={name: i for i, name in enumerate(self.names)},
                merges=self._merges(),
                unk_token=None if self.unknown is None else self.names[self.unknown],
                fuse_unk=True,
                byte_fallback=byte_fallback,
            )
        backend = Backend(model)
        backend.normalizer = normalizers.Sequence(self._normalizers())
        if self.kind == ModelKind.UNIGRAM:
            backend.pre_tokenizer = pre_tokenizers.Split(self._split_pattern(), "merged_with_previous")
        steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        steps += [decoders.Strip(" ", 1, 0)] if self.dummy_prefix else []
        backend.decoder = decoders.Sequence(steps)
        special = (PieceType.CONTROL, PieceType.UNKNOWN)
        named = list(zip(self.names, self.types, strict=True))
        backend.add_special_tokens(
            [AddedToken(n, normalized=False, special=True) for n, kind in named if kind in special]
        )
        words = [n for n, kind in named if kind == PieceType.USER_DEFINED]
        backend.add_tokens([AddedToken(n, normalized=False) for n in words])
        return backend

    def _split_points(self) -> dict[str, int]:
        """Special, byte and unused tokens -> the offset of a split that keeps text from matching them, 0 for none.

        The library's unigram model matches every token piece; SentencePiece's matches normal ones alone. A split is
        safe between two characters that are adjacent in no normal token piece.
        """
        rows = list(zip(self.names, self.types, strict=True))
        together = {pair for name in self._textual() for pair in pairwise(name)}
        names = [n for n, kind in rows if kind not in (PieceType.NORMAL, PieceType.USER_DEFINED) and len(n) > 1]
        return {
            name: next((i for i in range(1, len(name)) if (name[i - 1], name[i]) not in together), 0) for name in names
        }

    def _scored(self) -> list[tuple[str, float]]:
        """Names with scores; tokens without a split point score below any other segmentation of their text.

        Six digits survive the round trip through a tokenizer.json.
        """
        splits, worst = self._split_points(), min([*self.scores, -1.0])
        table = zip(self.names, self.scores, strict=True)
        return [(name, round(2 * len(name) * worst if splits.get(name) == 0 else score, 6)) for name, score in table]

    def _merges(self) -> list[tuple[str, str]]:
        return merges_by_score(self._textual()) if self.kind == ModelKind.BPE else []

    def _normalizers(self) -> list[Any]:
        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.squeeze:
            # not Strip, which removes other whitespace as well
            steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        return [*steps, *([normalizers.Prepend(SPACE)] if self.dummy_prefix else []), normalizers.Replace(" ", SPACE)]

    def _split_pattern(self) -> Regex:
        """Prefixes, up to the split point, of texts that spell a special, byte or unused token."""
        splits = [(name[:i], name[i:]) for name, i in self._split_points().items() if i]
        return Regex("|".join(f"{re.escape(left)}(?={re.escape(right)})" for left, right in splits) or "(?!)")

    @classmethod
    def of(cls, backend: Backend) -> Pieces | None:
        """Vocabulary of a BPE backend that is equivalent to a SentencePiece model; None for any other.

        Scores are minus the rank of a token piece's first merge, which gives the same merges in the same order.
        """
        spec = json.loads(backend.to_str())
        model, steps = spec["model"], spec["normalizer"] or {}
        normal = [step.get("type") for step in steps.get("normalizers", [steps])]
        scheme = (spec["pre_tokenizer"] or {}).get("prepend_scheme")
        metaspace = (spec["pre_tokenizer"] or {}).get("type") == "Metaspace" and not spec["pre_tokenizer"].get(
            "split", True
        )
        plain = spec["pre_tokenizer"] is None and normal in (["Prepend", "Replace"], ["Replace"])
        if (
            model["type"] != "BPE"
            or not model.get("byte_fallback")
            or not (plain or (metaspace and spec["normalizer"] is None))
        ):
            return None
        table = backend.get_vocab(with_added_tokens=True)
        names = [name for name, _ in sorted(table.items(), key=lambda item: item[1])]
        if [table[name] for name in names] != list(range(len(names))):
            return None
        ranks: dict[str, int] = {}
        for rank, pair in enumerate(model["merges"]):
            left, right = pair if isinstance(pair, list) else pair.split(" ")
            ranks.setdefault(left + right, rank)
        added = {token["content"]: token["special"] for token in spec["added_tokens"]}
        unknown, types = model.get("unk_token"), []
        for name in names:
            if name == unknown:
                types.append(PieceType.UNKNOWN)
            elif name in added:
                types.append(PieceType.CONTROL if added[name] else PieceType.USER_DEFINED)
            else:
                types.append(PieceType.BYTE if BYTE.fullmatch(name) else PieceType.NORMAL)
        scores = [-float(ranks.get(name, len(ranks) + i)) for i, name in enumerate(names)]
        prefix = "Prepend" in normal or scheme in ("always", "first")
        pieces = cls(names, scores, types, dummy_prefix=prefix)
        return pieces if pieces._merges_like(model["merges"]) else None

    def _merges_like(self, merges: list[Any]) -> bool:
        """Whether these are the merges of the scores, up to the order of splits of one token piece."""
        pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]
        joined = [piece for piece, _ in groupby(left + right for left, right in pairs)]
        return len(joined) == len(set(joined)) and set(pairs) == set(merges_by_score(self._textual()))

    def _textual(self) -> dict[str, float]:
        """Scores of the normal token pieces: no merge may lead to special tokens or bytes."""
        textual = (PieceType.NORMAL,)
        rows = zip(self.names, self.scores, self.types, strict=True)
        return {name: score for name, score, kind in rows if kind in textual}


def merges_by_score(scores: Mapping[str, float], only: str | None = None) -> list[tuple[str, str]]:
    """Merges of a scored vocabulary, in SentencePiece's order.

    Args:
        scores: by token piece; ties keep this order.
        only: restrict to the merges that give this token piece.

    Raises:
        InputError: a score is NaN, or a token piece is implausibly long.
    """
    if any(score != score for score in scores.values()):
        raise InputError("a score of the vocabulary is NaN")
    longest = max(map(len, scores), default=0)
    if longest > LONGEST:
        expected = f"at most {LONGEST} characters"
        raise InputError("a token of the vocabulary is too long", found=longest, expected=expected)
    merges = []
    for order, (piece, score) in enumerate(scores.items() if only is None else [(only, scores[only])]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, order, cut, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
