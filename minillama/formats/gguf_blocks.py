"""GGUF int4 blocks of 32 inputs, Q4_0 and Q4_1, without rounding (ggml-org/ggml, src/ggml-common.h).

Q4_0 is d (float16) and 16 bytes, w = d (b - 8); Q4_1 is d, m (float16) and 16 bytes, w = d b + m. Byte j has b of
input j in its low half, and that of input j + 16 in its high half.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minillama.formats.stored import Stored
from minillama.layers.int4 import GROUP, LOW, Int4

INT4 = {"Q4_0": 1, "Q4_1": 2}  # type -> float16 values before the bytes


def read_int4(path: Path, info: Stored) -> Int4:
    """Int4 matrix of a tensor, exact in float32.

    Args:
        path: of the file.
        info: of a tensor whose type is in `INT4`.
    """
    rows, inputs = info.shape
    shape = rows, inputs // GROUP, info.size // (rows * inputs // GROUP)
    blocks = torch.from_numpy(np.memmap(path, np.uint8, "c", info.start, shape))
    head = 2 * INT4[info.dtype]
    numbers = blocks[..., :head].contiguous().view(torch.float16).float()
    scale = numbers[..., 0].contiguous()
    offset = numbers[..., 1] - LOW * scale if info.dtype == "Q4_1" else torch.zeros_like(scale)
    return Int4(blocks[..., head:].flatten(-2).clone(), scale, offset)


def q4_1_bytes(numbers: Int4) -> NDArray[np.uint8]:
    """Q4_1 blocks (O, I / 32 * 20); m = z - 8 s rounded to float16, exact for `storable` grids.

    Args:
        numbers: in groups of a multiple of 32; each block gets scale and zero point of its group.
    """
    times = numbers.group // GROUP
    scale, offset = (grid.repeat_interleave(times, dim=-1) for grid in (numbers.scale, numbers.offset))
    head = torch.stack((scale, offset + LOW * scale), dim=-1).half().view(torch.uint8)  # (O, I / 32, 4)
    blocks: Tensor = torch.cat((head, numbers.nibbles.unflatten(-1, (-1, 16))), dim=-1)
    return blocks.flatten(-2).numpy()
