"""SentencePiece's view of a vocabulary, pieces with scores and types, and the backend that cuts the same.

A piece with a higher score is merged earlier. The `tokenizers` library has merges instead, pairs in the order
of their ranks: every way to cut a piece into two others becomes one, ranked by the piece's score.
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

__all__ = ["BYTE", "BYTES", "MARKS", "ModelKind", "PieceType", "Pieces", "merges_by_score"]

LONGEST = 1000
SPACE = "▁"  # U+2581, a blank inside pieces
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # byte fallback: an unknown character becomes these
MARKS = frozenset([*BYTES, "<unk>", "<s>", "</s>", "<|endoftext|>"])  # what no vocabulary may learn from text


class ModelKind(IntEnum):
    """How text is cut; SentencePiece's numbers (TrainerSpec.ModelType)."""

    UNIGRAM = 1
    BPE = 2
    CHAR = 4


class PieceType(IntEnum):
    """google/sentencepiece, src/sentencepiece_model.proto; GGUF uses the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Pieces:
    """A vocabulary in the order of its ids.

    Attributes:
        names: with U+2581 for a blank.
        scores: log probabilities (unigram) or minus the merge index (BPE).
        types: of `PieceType`.
        kind: the best segmentation, merges, or neither.
        dummy_prefix: a text is given a blank in front.
        charsmap: SentencePiece's compiled normalization, empty for identity.
        squeeze: blanks at the ends go, and runs of them become one.
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
        """Id of the unknown piece."""
        return next((i for i, kind in enumerate(self.types) if kind == PieceType.UNKNOWN), None)

    @cached_property
    def is_exact(self) -> bool:
        """Whether `backend` cuts every text as SentencePiece does.

        Not under a normalization: the library overlooks rules of more than five bytes, as those for half-width
        kana. Not with user-defined pieces, at which the library cuts before it normalizes, so that each part
        loses and gains blanks of its own. Not for a unigram model: of two cuts that are equally probable it may
        take the other. Not where pieces of a BPE model have equal scores: SentencePiece then merges from left to
        right, the library the smaller id first. Nor where merges lead to a piece that is marked unused, which
        SentencePiece takes apart again.
        """
        if self.charsmap or self.squeeze or PieceType.USER_DEFINED in self.types or self.kind == ModelKind.UNIGRAM:
            return False
        if self.kind == ModelKind.CHAR:
            return True
        textual = self._textual()
        unused = [name for name, kind in zip(self.names, self.types, strict=True) if kind == PieceType.UNUSED]
        if any(merges_by_score({**textual, name: 0.0}, only=name) for name in unused):
            return False
        # Llama 2's runs of blanks have equal scores, but lead to the longest run in either order
        joined = {left + right for left, right in self._merges() if len({*left, *right}) > 1}
        return len({textual[name] for name in joined}) == len(joined)

    def backend(self) -> Backend:
        """The `tokenizers` object that gives SentencePiece's ids, if `is_exact`."""
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
            backend.pre_tokenizer = pre_tokenizers.Split(self._marks(), "merged_with_previous")
        steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        steps += [decoders.Strip(" ", 1, 0)] if self.dummy_prefix else []
        backend.decoder = decoders.Sequence(steps)
        marks = (PieceType.CONTROL, PieceType.UNKNOWN)
        named = list(zip(self.names, self.types, strict=True))
        backend.add_special_tokens(
            [AddedToken(n, normalized=False, special=True) for n, kind in named if kind in marks]
        )
        words = [n for n, kind in named if kind == PieceType.USER_DEFINED]
        backend.add_tokens([AddedToken(n, normalized=False) for n in words])
        return backend

    def _silent(self) -> dict[str, int]:
        """Marks, bytes and unused pieces -> where a cut keeps the library from finding them in a text, 0 for nowhere.

        The library's unigram model takes any piece that it finds; SentencePiece's takes text alone. A cut does no
        harm between two characters that stand together in no piece of text.
        """
        rows = list(zip(self.names, self.types, strict=True))
        together = {pair for name in self._textual() for pair in pairwise(name)}
        silent = [n for n, kind in rows if kind not in (PieceType.NORMAL, PieceType.USER_DEFINED) and len(n) > 1]
        return {
            name: next((i for i in range(1, len(name)) if (name[i - 1], name[i]) not in together), 0) for name in silent
        }

    def _scored(self) -> list[tuple[str, float]]:
        """Names with scores; what no cut can silence costs more than any other way to spell it.

        More digits than six would be read back from a tokenizer.json with another last one.
        """
        cuts, worst = self._silent(), min([*self.scores, -1.0])
        table = zip(self.names, self.scores, strict=True)
        return [(name, round(2 * len(name) * worst if cuts.get(name) == 0 else score, 6)) for name, score in table]

    def _merges(self) -> list[tuple[str, str]]:
        return merges_by_score(self._textual()) if self.kind == ModelKind.BPE else []

    def _normalizers(self) -> list[Any]:
        steps: list[Any] = [normalizers.Precompiled(self.charsmap)] if self.charsmap else []
        if self.squeeze:
            # not Strip, which takes other white space as well
            steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        return [*steps, *([normalizers.Prepend(SPACE)] if self.dummy_prefix else []), normalizers.Replace(" ", SPACE)]

    def _marks(self) -> Regex:
        """The beginning, up to the cut, of every text that spells a mark, a byte or an unused piece."""
        cuts = [(name[:i], name[i:]) for name, i in self._silent().items() if i]
        return Regex("|".join(f"{re.escape(left)}(?={re.escape(right)})" for left, right in cuts) or "(?!)")

    @classmethod
    def of(cls, backend: Backend) -> Pieces | None:
        """The pieces of a BPE backend that cuts as SentencePiece does; None for any other.

        Scores are minus the rank of a piece's first merge, which leads to the same merges in the same order.
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
        """Whether these are the merges that follow from the scores, but for the order of cuts of one piece."""
        pairs = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in merges]
        joined = [piece for piece, _ in groupby(left + right for left, right in pairs)]
        return len(joined) == len(set(joined)) and set(pairs) == set(merges_by_score(self._textual()))

    def _textual(self) -> dict[str, float]:
        """Score of every piece that is text: marks and bytes are none, and no merge may lead to them."""
        textual = (PieceType.NORMAL,)
        rows = zip(self.names, self.scores, self.types, strict=True)
        return {name: score for name, score, kind in rows if kind in textual}


def merges_by_score(scores: Mapping[str, float], only: str | None = None) -> list[tuple[str, str]]:
    """Every pair of pieces that joins to a third, in the order in which SentencePiece would merge them.

    Args:
        scores: by piece, which is also the order of equals.
        only: the one piece that is asked about.

    Raises:
        InputError: a score is no number, or a piece is so long that it must be forged.
    """
    if any(score != score for score in scores.values()):
        raise InputError("a score of the vocabulary is no number")
    longest = max(map(len, scores), default=0)
    if longest > LONGEST:
        expected = f"at most {LONGEST} characters"
        raise InputError("a piece is longer than any real one", found=longest, expected=expected)
    merges = []
    for order, (piece, score) in enumerate(scores.items() if only is None else [(only, scores[only])]):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((-score, order, cut, left, right))
    return [(left, right) for *_, left, right in sorted(merges)]
