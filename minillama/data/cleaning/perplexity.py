"""Perplexity under an n-gram language model over token pieces, in CCNet's units (arXiv 1911.00359), and its buckets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minillama.data.cleaning.ccnet import normalized_for_perplexity
from minillama.data.cleaning.document import Draft, Figures, Removal, Step
from minillama.data.cleaning.grouping import CorpusStep, Rows, Verdicts, table
from minillama.data.cleaning.ngram_lm import BOS, EOS, UNK, NgramLM
from minillama.errors import InputError
from minillama.files import parsing, read_json, replace_folder
from minillama.tokenizer import Tokenizer

WEIGHTS, SETTINGS = "ngram_lm.safetensors", "ngram_lm.json"
VALUES, LANGUAGES = ".values", ".languages"


@dataclass(frozen=True)
class PieceLM:
    """n-gram model over the pieces of a tokenizer.

    Args:
        lm: the model; its token of piece i is i + 3 where it was trained here.
        tokenizer: from text to pieces.
        ids: token of each piece.
        normalize: whether lines are normalized as CCNet does.
    """

    lm: NgramLM
    tokenizer: Tokenizer
    ids: NDArray[np.int64]
    normalize: bool = True

    @classmethod
    def train(
        cls, texts: Iterable[str], tokenizer: Tokenizer, order: int = 5, min_count: int = 1, normalize: bool = True
    ) -> PieceLM:
        """Train on the lines of texts."""
        names = piece_names(tokenizer)
        lines = (line for text in texts for line in _lines(text, normalize))
        sentences = ([i + 3 for i in tokenizer.encode(line)] for line in lines)
        lm = NgramLM.train(sentences, ("<unk>", "<s>", "</s>", *names), order, min_count)
        return cls(lm, tokenizer, np.arange(len(names)) + 3, normalize)

    def save(self, folder: Path) -> None:
        """Write model, tokenizer and settings."""
        from safetensors.numpy import save_file

        def write(temporary: Path) -> None:
            tensors: dict[str, NDArray[Any]] = {f"keys.{n}": keys for n, keys in enumerate(self.lm.keys, 2)}
            tensors |= {f"log10s.{n}": values for n, values in enumerate(self.lm.log10s, 1)}
            tensors |= {f"backoffs.{n}": values for n, values in enumerate(self.lm.backoffs, 1)}
            save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary / WEIGHTS)
            self.tokenizer.save(temporary)
            settings = {"order": self.lm.order, "normalize": self.normalize, "tokens": self.lm.tokens}
            (temporary / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")

        replace_folder(folder, write)

    @classmethod
    def load(cls, path: Path, tokenizer: str = "", normalize: bool = True) -> PieceLM:
        """Model of a folder that `save` wrote, or of an ARPA file over the pieces of `tokenizer`.

        Raises:
            InputError: neither; an ARPA file without a tokenizer.
        """
        if path.is_dir():
            settings, loaded = read_json(path / SETTINGS, most=2**30), Tokenizer.load(path)
            with parsing(path, "this is not an n-gram model"):
                tensors, order = _tensors(path / WEIGHTS), settings["order"]
                log10s = [tensors[f"log10s.{n}"] for n in range(1, order + 1)]
                backoffs = [tensors[f"backoffs.{n}"] for n in range(1, order)]
                keys = [tensors[f"keys.{n}"] for n in range(2, order + 1)]
                lm, normalize = NgramLM(tuple(settings["tokens"]), keys, log10s, backoffs), bool(settings["normalize"])
                lm.check()
        elif not path.is_file():
            raise InputError("no n-gram model there", where=path, fix="make one: minillama data ngram-lm train")
        elif not tokenizer:
            raise InputError("an ARPA file needs the tokenizer of its pieces", where=path, fix="set tokenizer")
        else:
            lm, loaded = NgramLM.read_arpa(path), Tokenizer.load(tokenizer)
        known = {name: i for i, name in enumerate(lm.tokens)}
        return cls(lm, loaded, np.array([known.get(name, UNK) for name in piece_names(loaded)]), normalize)

    def perplexity(self, text: str) -> float:
        """10^(-s / n): s is the log10 probability of all lines, n their pieces and ends; to one decimal."""
        rows = [self.ids[self.tokenizer.encode(line)] for line in _lines(text, self.normalize)]
        if not rows:
            return 0.0
        ids = np.concatenate([np.concatenate([[BOS], row, [EOS]]) for row in rows])
        return round(float(10 ** min(-self.lm.scores(ids).sum() / (len(ids) - len(rows)), 300.0)), 1)


def _tensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError("this is not an n-gram model", where=path, found=error) from None


def _lines(text: str, normalize: bool) -> Iterator[str]:
    for line in text.split("\n"):
        if normal := normalized_for_perplexity(line) if normalize else line.strip():
            yield normal


def piece_names(tokenizer: Tokenizer) -> list[str]:
    """Names of the pieces in an ARPA file: as they are, but for those with blanks and those that are taken."""
    taken, names = {"<unk>", "<s>", "</s>", "<UNK>"}, []
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.backend.id_to_token(i) or ""
        names.append(piece if piece.strip() and len(piece.split()) == 1 and piece not in taken else f"<id:{i}>")
        taken.add(names[-1])
    return names


@dataclass(frozen=True)
class Perplexity(Step):
    """Perplexity of the lines of a document."""

    made_by = "minillama data ngram-lm train writes one"

    name: Literal["perplexity"] = "perplexity"
    path: str = ""
    """Folder of `minillama data ngram-lm train`, or an ARPA file."""
    tokenizer: str = ""
    """Tokenizer of an ARPA file's pieces."""
    normalize: bool = True
    """For an ARPA file: lines in lower case, without accents and numbers, as CCNet's models read them."""
    min_perplexity: float = 0.0
    max_perplexity: float = 1e9

    def measure(self, draft: Draft) -> Figures:
        return {"perplexity": _load(self.path, self.tokenizer, self.normalize).perplexity(draft.text)}


@cache
def _load(path: str, tokenizer: str, normalize: bool) -> PieceLM:
    return PieceLM.load(Path(path), tokenizer, normalize)


@dataclass(frozen=True)
class Buckets(CorpusStep):
    """Buckets of a figure by percentiles of each language: CCNet's head, middle and tail of the perplexity."""

    name: Literal["buckets"] = "buckets"
    figure: str = "perplexity.perplexity"
    """STEP.MEASURE of an earlier step."""
    percentiles: tuple[float, ...] = (30.0, 60.0)
    labels: tuple[str, ...] = ("head", "middle", "tail")
    keep: tuple[str, ...] = ("head", "middle")

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.percentiles) + 1 or list(self.percentiles) != sorted(self.percentiles):
            raise InputError("labels are one more than percentiles, which ascend", where="percentiles")

    def value(self, draft: Draft) -> float | None:
        """The figure of a document."""
        step, _, measure = self.figure.partition(".")
        value = draft.measured.get(step, {}).get(measure)
        return value if isinstance(value, int | float) else None

    def collect(self, rows: Rows, draft: Draft) -> None:
        if (value := self.value(draft)) is not None:
            rows.add_to(VALUES, (draft.index, value))
            rows.add_to(LANGUAGES, draft.language)

    def decide(self, collected: Sequence[Path], verdicts: Verdicts) -> dict[str, Any]:
        found: dict[str, list[NDArray[np.float64]]] = {}
        for part, path in enumerate(collected):
            languages = table(path, LANGUAGES)
            for language in np.unique(languages).tolist():
                index, values = table(path, VALUES)[languages == language].T
                found.setdefault(language, []).append(np.array([index + part * 2.0**32, values]))
        cutoffs = {}
        for language, parts in sorted(found.items()):
            documents, values = np.concatenate(parts, 1)
            cutoffs[language] = np.percentile(values, self.percentiles).tolist()
            buckets = np.searchsorted(cutoffs[language], values, side="right")
            verdicts.add(documents.astype(np.uint64), documents.astype(np.uint64), buckets)
        return {"cutoffs": cutoffs}

    def settle(self, draft: Draft, found: NDArray[Any], names: Sequence[str]) -> Removal | None:
        label = self.labels[int(found["value"][0])] if len(found) else "all"
        self.judge(draft, {"bucket": label})
        return Removal("bucket", label) if len(found) and label not in self.keep else None
