"""Messages from all processes to the first one, which need not wait for them.

They go through the store by which the processes found each other.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from itertools import count
from typing import Any

from torch import distributed

from minillama.training.ranks import Ranks

CHANNELS = count()  # which all processes open in one order


class Messages:
    """Channel from all processes to the first one; values are those of JSON.

    Args:
        ranks: the processes.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.counts = ranks, Counter[int]()
        self.name = f"messages {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} {next(CHANNELS)}"

    def send(self, value: Any) -> None:
        """Send a value, from another process than the first."""
        self._store.set(self._next(self.ranks.index), json.dumps(value))
        self.counts[self.ranks.index] += 1

    def received(self) -> list[Any]:
        """Values that have come since the last call, at the first process; in order of each sender's."""
        found = []
        for sender in range(1, self.ranks.processes):
            while self._store.check([key := self._next(sender)]):
                found.append(json.loads(self._store.get(key)))
                self._store.delete_key(key)
                self.counts[sender] += 1
        return found

    @property
    def _store(self) -> Any:
        return distributed.distributed_c10d._get_default_store()

    def _next(self, sender: int) -> str:
        """Name of the next message of a process."""
        return f"{self.name} {sender} {self.counts[sender]}"
