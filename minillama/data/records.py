"""Fine-tuning data set: JSONL records in a training and a held-out split."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from minillama.data.examples import drawn, is_held_out, too_few
from minillama.data.reading import Record
from minillama.data.skipped import Skipped
from minillama.data.sources import OnError, Source, records, skipping


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
                with skipping(on_error, skipped):
                    check(record)
                    text = json.dumps(record.value, sort_keys=True)
                    digest.update(text.encode() + b"\n")
                    (val if is_held_out(text, val_fraction) else train).append(record)
        if not (train and val):
            raise too_few("records", train, val, skipped)
        return cls(train, val, digest.hexdigest(), skipped)

    def where(self, seed: int, step: int, rows: int, chosen: Sequence[int]) -> list[str]:
        """Locations (file and line) of the chosen records of a step."""
        batch = self.batch(seed, step, rows)
        return [batch[row].where for row in chosen]

    def batch(self, seed: int, step: int, rows: int) -> list[Record]:
        """Batch of a step, without replacement within an epoch: a pure function of the arguments."""
        return [self.train[i] for i in drawn("records", seed, step, rows, len(self.train))]
