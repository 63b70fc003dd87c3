"""WKV, RWKV-4's linear attention: recurrent step and parallel scan.

wkv_t = (sum_{i<t} e^{-(t-1-i)w + k_i} v_i + e^{u + k_t} v_t) / (the same sums without v), per channel, with
decay w > 0 and bonus u. BlinkDL/RWKV-LM, RWKV-v4neo/cuda/wkv_cuda.cu.

Sums are kept as a e^p and b e^p with a running maximum exponent p, so that nothing overflows.
Shapes: B batch, T time, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = -1e38  # exponent of an empty sum


class Sums(NamedTuple):
    """WKV state: sum of e^k v = a e^p, sum of e^k = b e^p, decayed up to now."""

    a: Tensor
    b: Tensor
    p: Tensor

    @classmethod
    def empty(cls, batch: int, width: int, device: torch.device) -> Sums:
        """Initial state, (B, D) each, float32."""
        zeros = torch.zeros(batch, width, device=device)
        return cls(zeros, zeros, zeros + EMPTY)

    def decayed(self, amount: Tensor) -> Sums:
        """Sums times e^-amount."""
        return self._replace(p=self.p - amount)

    def plus(self, other: Sums) -> Sums:
        """Sum of both states."""
        p = torch.maximum(self.p, other.p)
        mine, theirs = torch.exp(self.p - p), torch.exp(other.p - p)
        return Sums(mine * self.a + theirs * other.a, mine * self.b + theirs * other.b, p)


def wkv_step(k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Sums) -> tuple[Tensor, Sums]:
    """Recurrent WKV step: (B, D) keys and values -> (B, D) output, and the updated state."""
    now = Sums(v, torch.ones_like(v), k)
    seen = past.plus(now._replace(p=k + u))
    return seen.a / seen.b, past.decayed(w).plus(now)


def wkv_scan(k: Tensor, v: Tensor, w: Tensor, u: Tensor, past: Sums) -> tuple[Tensor, Sums]:
    """Parallel WKV scan: (B, T, D) keys and values -> (B, T, D) outputs, and the state after each, (B, T, D).

    Sums over spans of 1, 2, 4, ... tokens are combined from two of half the length each (Hillis and Steele
    1986): log2 T rounds over whole tensors in place of T steps.
    """
    sums = Sums(v, torch.ones_like(v), k)
    start = past.decayed(w)  # decayed once for the first token
    first = Sums(*(part[:, :1] for part in sums)).plus(Sums(*(part[:, None] for part in start)))
    sums = Sums(*(torch.cat((one, rest[:, 1:]), dim=1) for one, rest in zip(first, sums, strict=True)))
    length, span = k.shape[1], 1
    while span < length:
        earlier = Sums(*(part[:, :-span] for part in sums)).decayed(span * w)
        later = Sums(*(part[:, span:] for part in sums))
        joined = earlier.plus(later)
        sums = Sums(*(torch.cat((part[:, :span], new), dim=1) for part, new in zip(sums, joined, strict=True)))
        span *= 2
    before = Sums(*(torch.cat((one[:, None], part[:, :-1]), dim=1) for one, part in zip(past, sums, strict=True)))
    seen = before.plus(Sums(v, torch.ones_like(v), k + u))
    return seen.a / seen.b, sums
