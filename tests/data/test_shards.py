from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minillama.data.shards import HEADER_BYTES, Shard, ShardWriter


@pytest.mark.parametrize(("vocab_size", "width"), [(257, 2), (2**16, 2), (2**16 + 1, 4)])
def test_written_tokens_come_back(tmp_path: Path, vocab_size: int, width: int) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, 1000)
    writer = ShardWriter(tmp_path, "train", vocab_size, shard_tokens=300)
    for part in np.array_split(ids, [1, 7, 650]):
        writer.write(part.tolist())
    writer.close()
    assert [path.name for path in writer.paths] == [f"train-{i:05d}.bin" for i in range(4)]
    assert sorted(tmp_path.iterdir()) == writer.paths
    assert [path.stat().st_size for path in writer.paths] == [HEADER_BYTES + width * n for n in (300, 300, 300, 100)]
    shards = [Shard.open(path) for path in writer.paths]
    assert writer.tokens == 1000
    assert np.concatenate([shard.tokens for shard in shards]).tolist() == ids.tolist()
    assert all(isinstance(shard.tokens, np.memmap) for shard in shards)


def test_without_tokens_no_file(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "val", 300)
    writer.write([])
    writer.close()
    assert not writer.paths and not list(tmp_path.iterdir())


def test_a_shard_has_its_name_only_when_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", 300)
    writer.write([1, 2, 3])
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.bin.tmp"]
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.bin"]


def test_an_id_too_large_for_the_type_is_not_wrapped_round(tmp_path: Path) -> None:
    with pytest.raises(OverflowError):
        ShardWriter(tmp_path, "train", 300).write([70000])
