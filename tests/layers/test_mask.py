"""The mask's description against the pattern written out cell by cell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from minillama.layers.cache import CacheRange
from minillama.layers.mask import KernelMask, Mask

CPU = torch.device("cpu")


def rows(mask: Mask, span: CacheRange) -> list[str]:
    allowed, flag = mask.for_kernel(span, CPU)[:2]
    assert allowed is not None and not flag
    return ["".join(".x"[int(cell)] for cell in row) for row in allowed[-1, 0]]


def test_plain_patterns_keep_the_fused_kernel() -> None:
    assert Mask().for_kernel(CacheRange(0, 5, 5), CPU) == KernelMask(None, True)
    padded = Mask(lengths=torch.tensor([2, 5])).for_kernel(CacheRange(0, 5, 5), CPU)
    assert padded[:2] == (None, True) and padded.lengths is not None
    assert Mask().for_kernel(CacheRange(7, 1, 8), CPU) == KernelMask(None, False)
    assert Mask(causal=False).for_kernel(CacheRange(0, 5, 5), CPU) == KernelMask(None, False, is_plain=False)
    assert Mask(window=5).for_kernel(CacheRange(0, 5, 5), CPU) == KernelMask(None, True, is_plain=False)


def test_later_chunk_sees_what_came_before() -> None:
    assert rows(Mask(), CacheRange(2, 3, 5)) == ["xxx..", "xxxx.", "xxxxx"]


def test_rows_of_unequal_length() -> None:
    allowed = Mask().for_kernel(CacheRange(None, 1, 5, (2, 4)), CPU).allowed
    assert allowed is not None and allowed.shape == (2, 1, 1, 5)
    assert allowed[:, 0, 0].tolist() == [[True] * 3 + [False] * 2, [True] * 5]


def test_window_and_sinks() -> None:
    assert rows(Mask(window=2), CacheRange(0, 4, 4)) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(Mask(window=2, sinks=1), CacheRange(0, 4, 4)) == ["x...", "xx..", "xxx.", "x.xx"]


def test_prefix() -> None:
    assert rows(Mask(prefix=torch.tensor([3])), CacheRange(0, 5, 5)) == ["xxx..", "xxx..", "xxx..", "xxxx.", "xxxxx"]


def test_padding_is_hidden_where_attention_looks_ahead() -> None:
    mask = Mask(causal=False, lengths=torch.tensor([2]))
    assert rows(mask, CacheRange(0, 3, 3)) == ["xx."] * 3


def test_segments() -> None:
    mask = Mask(segments=(2, 3))
    assert mask.for_kernel(CacheRange(0, 5, 5), CPU) == KernelMask(None, False, None, False, (2, 3))
    for other in (replace(mask, window=2), replace(mask, segments=(2, 2)), replace(mask, causal=False)):
        with pytest.raises(ValueError, match="segments"):
            other.for_kernel(CacheRange(0, 5, 5), CPU)
    with pytest.raises(ValueError, match="segments"):
        mask.for_kernel(CacheRange(5, 5, 10), CPU)


def test_documents() -> None:
    mask = Mask(documents=torch.tensor([[0, 0, 1, 1, 1]]))
    assert rows(mask, CacheRange(0, 5, 5)) == ["x....", "xx...", "..x..", "..xx.", "..xxx"]
    with pytest.raises(ValueError, match="document"):
        mask.for_kernel(CacheRange(2, 5, 7), CPU)
