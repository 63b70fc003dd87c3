"""The C++ as the processor runs it and with its instructions emulated; a model with parts in C++ beside its twin."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from minillama.model import Decoder
from minillama.native import build, decode

# the same sources on any processor: AVX-512 and AMX, or AVX-512 alone, from emulated/immintrin.h
EMULATED = f"-I{Path(__file__).parent / 'emulated'}", "-O1", "-Wno-psabi", "-D__AVX512F__", "-D__AVX512BF16__"
FLAGS = {"tiles": (*EMULATED, "-D__AMX_BF16__"), "vectors": (*EMULATED, "-U__AMX_BF16__")}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`kernels`: what the processor runs if it has the module's `UNITS`, and its `EMULATED`."""
    if "kernels" in metafunc.fixturenames:
        own = pytest.param("processor", marks=pytest.mark.hardware(*metafunc.module.UNITS))
        metafunc.parametrize("kernels", [own, *metafunc.module.EMULATED], indirect=True)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has the kernels of a test's module, its `KERNELS`, come from the build of that name."""
    kernel: build.Kernel = request.module.KERNELS.KERNEL
    monkeypatch.setattr(kernel, "_library", None)
    if request.param != "processor":
        monkeypatch.setattr(build, "load_library", partial(build.load_library, flags=FLAGS[request.param]))
        monkeypatch.setattr(kernel, "unsupported", lambda: None)
    return request.param


@pytest.fixture
def emulated_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the step multiply some inputs at once by emulated AMX."""

    def load(source: str, say: Callable[[str], None], flags: Sequence[str]) -> ctypes.CDLL:
        return build.load_library(source, say, [*flags, *FLAGS["tiles"]])

    monkeypatch.setattr(decode, "load_library", load)


@pytest.fixture
def same_training() -> Callable[..., None]:
    """Asserts that loss and gradients of a model are those of its twin, of 64 tokens, to the precision of bfloat16."""

    def compare(plain: Decoder, native: Decoder, loss_error: float = 2e-3, gradient_error: float = 0.03) -> None:
        tokens = torch.randint(0, 64, (3, 71), generator=torch.Generator().manual_seed(7))
        losses = [model.loss(model.hidden(tokens[:, :-1]), tokens[:, 1:]) for model in (plain, native)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0], rtol=loss_error, atol=0)
        for (name, one), two in zip(plain.named_parameters(), native.parameters(), strict=True):
            assert one.grad is not None and two.grad is not None
            assert (two.grad - one.grad).norm() < gradient_error * one.grad.norm(), name

    return compare
