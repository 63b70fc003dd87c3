"""Fine-tuning data set: JSONL records in a training and a held-out split."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from minillama.data.permutation import derive_keys, hash_fraction, permute
from minillama.data.reading import BadText, Record, Skipped
from minillama.data.sources import OnError, Source, records
from minillama.errors import InputError


@dataclass(frozen=True)
class Records:
    """Fine-tuning data set; the fingerprint is the SHA-256 of all records and of the split."""

    train: Sequence[Record]
    val: Sequence[Record]
    fingerprint: str = ""
    skipped: Skipped = field(default_factory=Skipped)

    @classmethod
    def load(
        cls,
        sources: Sequence[Source],
        val_fraction: float,
        on_error: OnError = "stop",
        check: Callable[[Record], object] = lambda record: None,
    ) -> Records:
        """Read all sources once, whatever their weight.

        A record is held out when a hash of its JSON falls below `val_fraction`; `check` raises BadText for an
        invalid one.

        Raises:
            InputError: no records to train on, or none to hold out.
        """
        skipped = Skipped()
        train: list[Record] = []
        val: list[Record] = []
        digest = sha256(str(val_fraction).encode())
        for source in sources:
            for record in records(source, on_error, skipped):
                try:
                    check(record)
                except BadText as bad:
                    if on_error == "stop":
                        raise
                    skipped.add(bad)
                    continue
                text = json.dumps(record.value, sort_keys=True)
                digest.update(text.encode() + b"\n")
                side = val if hash_fraction(text, "held out") < val_fraction else train
                side.append(record)
        if not (train and val):
            found = f"{len(train)} to train on, {len(val)} held out" + (f"; {skipped}" if skipped.total else "")
            fix = "give more records, or another data.val_fraction"
            raise InputError(
                "too few records", where="data.sources", found=found, expected="at least one of each", fix=fix
            )
        return cls(train, val, digest.hexdigest(), skipped)

    def where(self, seed: int, step: int, rows: int, chosen: Sequence[int]) -> list[str]:
        """Locations (file and line) of the chosen records of a step."""
        batch = self.batch(seed, step, rows)
        return [batch[row].where for row in chosen]

    def batch(self, seed: int, step: int, rows: int) -> list[Record]:
        """Batch of a step, without replacement within an epoch: a pure function of the arguments."""
        count = len(self.train)
        chosen = []
        for sample in range(step * rows, (step + 1) * rows):
            epoch, position = divmod(sample, count)
            keys = derive_keys("records", seed, epoch)
            chosen.append(self.train[int(permute(np.array([position], np.uint64), count, keys)[0])])
        return chosen
