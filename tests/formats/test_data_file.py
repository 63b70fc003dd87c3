"""Memory that tensors are read into."""

from __future__ import annotations

from minillama.formats.data_file import CHUNK, LARGE, SMALL, Pages


def test_tensors_of_any_size_have_their_own_bytes() -> None:
    pages = Pages()
    sizes = [0, 1, SMALL - 1, SMALL, SMALL + 1, *[LARGE - 3] * (CHUNK // LARGE), LARGE, SMALL + 7]
    tensors = [pages.empty(size).fill_(number) for number, size in enumerate(sizes)]
    for number, (size, tensor) in enumerate(zip(sizes, tensors, strict=True)):
        assert tensor.shape == (size,) and tensor.untyped_storage().nbytes() == size  # a saved tensor is no chunk
        assert bool((tensor == number).all()) and tensor.data_ptr() % 64 == 0
