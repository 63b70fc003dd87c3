"""Quality classifier: logistic regression on hashed word uni- and bigrams (as fastText, arXiv 1607.01759).

LLaMA trained one on pages that Wikipedia cites against random pages (arXiv 2302.13971, section 2.1). Scores are
calibrated by Platt's scaling on held-out documents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from minillama.data.cleaning.document import Draft, Figures, Step
from minillama.data.cleaning.words import words
from minillama.errors import InputError
from minillama.files import reading, replace_file

CHARACTERS = 20_000  # of a document that are looked at
Vector = tuple[NDArray[np.int64], NDArray[np.float32]]


@dataclass(frozen=True)
class LinearClassifier:
    """Classifier P(like) = sigmoid(scale * (w . x) + offset) of L2-normalized counts.

    Args:
        weights: (2^bits,) w.
        scale: of Platt's scaling.
        offset: the same.
        held_out: accuracy, AUC and calibration error on documents not trained on.
    """

    weights: NDArray[np.float32]
    scale: float = 1.0
    offset: float = 0.0
    held_out: tuple[tuple[str, float], ...] = ()

    @classmethod
    def train(cls, like: Iterable[str], unlike: Iterable[str], **options: int) -> LinearClassifier:
        """Train by AdaGrad on equal numbers of both kinds; a fifth is held out, for the scaling and for the figures.

        Args:
            like: texts of the first kind.
            unlike: the others.
            options: limit of documents per kind (300,000), bits (20), epochs (5), seed (0).

        Raises:
            InputError: fewer than ten documents of a kind.
        """
        given = {"limit": 300_000, "bits": 20, "epochs": 5, "seed": 0} | options
        found = [[vector(text, given["bits"]) for text in islice(texts, given["limit"])] for texts in (unlike, like)]
        count = min(map(len, found))
        if count < 10:
            counts = " and ".join(str(len(kind)) for kind in found[::-1])
            fix = "give more files, or records (.jsonl): a file of text is one document"
            raise InputError("too few documents of a kind", found=counts, expected="ten of each", fix=fix)
        rng = np.random.Generator(np.random.PCG64(given["seed"]))
        examples = [(x, label) for label, kind in enumerate(found) for x in kind[:count]]
        examples = [examples[i] for i in rng.permutation(len(examples))]
        held, trained = examples[: len(examples) // 5], examples[len(examples) // 5 :]
        weights, squares = np.zeros(2 ** given["bits"], np.float32), np.full(2 ** given["bits"], 1e-6, np.float32)
        for i in (i for _ in range(given["epochs"]) for i in rng.permutation(len(trained))):
            (index, value), label = trained[i]
            gradient = (sigmoid(float(weights[index] @ value)) - label) * value
            squares[index] += gradient * gradient
            weights[index] -= 0.5 * gradient / np.sqrt(squares[index])
        raw = np.array([float(weights[index] @ value) for (index, value), _ in held])
        labels, half = np.array([label for _, label in held], float), len(held) // 2
        scale, offset = _platt(raw[:half], labels[:half])
        figures = _figures(sigmoid(scale * raw[half:] + offset), labels[half:])
        return cls(weights, scale, offset, tuple(figures.items()))

    def score(self, text: str) -> float:
        """Probability that a text is of the first kind."""
        index, value = vector(text, len(self.weights).bit_length() - 1)
        return float(sigmoid(self.scale * float(self.weights[index] @ value) + self.offset))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        from safetensors.numpy import save_file

        settings = {"scale": self.scale, "offset": self.offset, "held_out": dict(self.held_out)}
        metadata = {"classifier": json.dumps(settings)}
        replace_file(path, lambda file: save_file({"weights": self.weights}, file, metadata))

    @classmethod
    def load(cls, path: Path) -> LinearClassifier:
        """Classifier of a file.

        Raises:
            InputError: no such file, or another one.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with reading(path, "the classifier"), safe_open(path, "numpy") as file:
                made = json.loads(file.metadata()["classifier"])
                return cls(file.get_tensor("weights"), made["scale"], made["offset"], tuple(made["held_out"].items()))
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            fix = "minillama data classifier train writes one"
            raise InputError("this is not a classifier", where=path, found=error, fix=fix) from None


def vector(text: str, bits: int) -> Vector:
    """Hashed uni- and bigrams of lowercase words: indices, and square roots of the counts, of length 1."""
    found = words(text[:CHARACTERS].lower())
    known = {word: crc32(word.encode(errors="replace")) for word in set(found)}
    ids = np.array([known[word] for word in found], np.uint64)
    pairs = (ids[:-1] * np.uint64(0x9E3779B97F4A7C15) ^ ids[1:]) * np.uint64(0xC2B2AE3D27D4EB4F)
    hashed = np.concatenate([ids * np.uint64(0x9E3779B97F4A7C15), pairs]) >> np.uint64(64 - bits)
    index, counts = np.unique(hashed.astype(np.int64), return_counts=True)
    values = np.sqrt(counts).astype(np.float32)
    return index, values / max(float(np.sqrt((values**2).sum())), 1e-9)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x)))


def _platt(raw: NDArray[np.float64], labels: NDArray[np.float64]) -> tuple[float, float]:
    """Scale and offset of the best logistic fit, by Newton's method; labels are smoothed as by Platt (1999)."""
    positive, negative = labels.sum(), len(labels) - labels.sum()
    target = np.where(labels == 1, (positive + 1) / (positive + 2), 1 / (negative + 2))
    fit, x = np.array([1.0, 0.0]), np.stack([raw, np.ones_like(raw)])
    for _ in range(50):
        p = sigmoid(fit @ x)
        hessian = (x * (p * (1 - p))) @ x.T + 1e-6 * np.eye(2)
        fit = fit - np.clip(np.linalg.solve(hessian, x @ (p - target)), -1, 1)
    return float(fit[0]), float(fit[1])


def _figures(p: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, float]:
    """Accuracy, area under the ROC curve (Mann-Whitney), expected calibration error in ten bins."""
    ranks = np.empty(len(p))
    ranks[np.argsort(p, kind="stable")] = np.arange(1, len(p) + 1)
    positive = labels.sum()
    auc = (ranks[labels == 1].sum() - positive * (positive + 1) / 2) / max(positive * (len(p) - positive), 1)
    bins = np.minimum((p * 10).astype(int), 9)
    gaps = [abs((p - labels)[bins == i].sum()) for i in range(10)]
    figures = {"accuracy": ((p >= 0.5) == labels).mean(), "auc": auc, "calibration_error": sum(gaps) / len(p)}
    return {name: round(float(value), 4) for name, value in figures.items()}


@dataclass(frozen=True)
class Classifier(Step):
    """Score of a trained classifier; `buckets` cuts by the share of documents."""

    made_by = "minillama data classifier train writes one"

    name: Literal["classifier"] = "classifier"
    path: str = ""
    """File of `minillama data classifier train`."""
    min_score: float = 0.0
    max_score: float = 1.0

    def measure(self, draft: Draft) -> Figures:
        return {"score": _load(self.path).score(draft.text)}


@cache
def _load(path: str) -> LinearClassifier:
    return LinearClassifier.load(Path(path))
