"""Prompts read by the decode step in C++: in several passes, behind what was read before, by blocks of queries."""

from __future__ import annotations

import pytest
import torch

from minillama.layers.mask import Mask
from minillama.layers.quantized_linear import Quantization
from minillama.native import build
from minillama.native.decode import NativeStep

from .test_decode import INTEGERS, exact, model

pytestmark = pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux")


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@torch.no_grad()
def test_prompts_longer_than_a_pass(kind: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.native.decode.CHUNK", 40)
    native = model(kind=kind)
    plain = exact(native)
    step = NativeStep(native)
    step.at_once = 1000
    prompts = torch.randint(0, 83, (3, 50), generator=torch.Generator().manual_seed(2))
    expected = plain(prompts)[:, -1]
    found = step(prompts.tolist(), native.state(3, 60), Mask())
    assert found is not None
    assert ((found - expected).norm(dim=-1) < INTEGERS[kind] * expected.norm(dim=-1)).all()


@pytest.mark.parametrize("heads", [(6, 6), (6, 2), (20, 1)])
@torch.no_grad()
def test_prompts_behind_a_past(heads: tuple[int, int]) -> None:
    """Queries of one key/value head are taken together, their scores in parts."""
    native = model(n_heads=heads[0], n_kv_heads=heads[1], dim=480, head_dim=48, max_seq_len=512)
    plain, step = exact(native).double(), NativeStep(native)
    step.at_once = 1000
    ids = torch.randint(0, 83, (2, 400), generator=torch.Generator().manual_seed(2))
    state, lengths = native.state(2, 440), (150, 7)
    for begin, ends in (((0, 0), lengths), (lengths, (400, 290)), ((400, 290), (400, 291))):
        parts = [row[a:b].tolist() for row, a, b in zip(ids, begin, ends, strict=True)]
        found = step(parts, state, Mask())
        assert found is not None
        for row, end in enumerate(ends):
            if parts[row]:
                expected = plain(ids[row : row + 1, :end])[0, -1]
                assert (found[row] - expected).norm() < 1e-5 * expected.norm(), (row, end)
