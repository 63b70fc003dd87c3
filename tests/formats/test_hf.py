"""Hugging Face folders; what they must lead to with transformers is in tests/oracles."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minillama import Decoder, ModelConfig, Tokenizer, generate
from minillama.errors import InputError
from minillama.formats import generation_config
from minillama.formats.hf import parse_size
from minillama.inference.sampling import Sampling

Make = Callable[..., Decoder]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", ["5GB", "60KB", 1])
def test_what_is_saved_comes_back(make: Make, tied: bool, size: int | str, tmp_path: Path) -> None:
    model = make(tied)
    model.save_pretrained(tmp_path, max_shard_size=size)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert (len(shards) == 1) == (size == "5GB")
    if len(shards) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {shard.name for shard in shards}
        assert index["metadata"]["total_size"] == 4 * model.config.num_params()
        largest = max(sum(t.nbytes for t in load_file(shard).values()) for shard in shards)
        assert largest <= max(parse_size(size), 4 * 320 * 96)
    back = Decoder.from_pretrained(tmp_path)
    assert back.config == model.config
    for (name, mine), theirs in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_types_are_kept_and_converted(make: Make, tmp_path: Path) -> None:
    make().bfloat16().save_pretrained(tmp_path)
    assert Decoder.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert Decoder.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    make().half().save_pretrained(tmp_path)
    assert Decoder.from_pretrained(tmp_path).dtype == torch.float32, "a CPU does not compute in float16"


def test_weights_are_the_models_own(make: Make, tmp_path: Path) -> None:
    """Memory-mapped tensors are private: changing them leaves the file alone."""
    make().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = Decoder.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(("text", "count"), [("500MB", 500_000_000), ("5GB", 5 * 10**9), ("1GiB", 2**30), (77, 77)])
def test_sizes(text: int | str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "much", "-5GB", "0", "5 parsecs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="not a size"):
        parse_size(text)


LOAD = """
import re, sys, torch
from pathlib import Path
from minillama import Decoder

def peak():  # of this program alone: ru_maxrss would start from the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

before = peak()
model = Decoder.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
for parameter in model.parameters():  # every page is touched
    parameter.view(-1)[::1024].sum().item()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_takes_little_more_than_the_weights(dtype: str, tmp_path: Path) -> None:
    """7B's proportions at a tenth of its width: 0.5 GB in bfloat16, in shards; also when each is converted."""
    config = ModelConfig(dim=1024, n_layers=16, n_heads=8, hidden_dim=2816, vocab_size=16000)
    Decoder(config).bfloat16().save_pretrained(tmp_path, max_shard_size="100MB")
    command = [sys.executable, "-c", LOAD, str(tmp_path), dtype]
    used = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    weights = config.num_params() * (2 if dtype == "bfloat16" else 4)
    assert weights <= used < 1.2 * weights


def test_a_later_save_replaces_an_earlier_one_of_other_shards(make: Make, tmp_path: Path) -> None:
    for size in ("60KB", "5GB", "40KB", "90KB"):
        model = make()
        with torch.no_grad():
            model.model.norm.weight.fill_(len(size) + parse_size(size))
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(Decoder.from_pretrained(tmp_path).model.norm.weight, model.model.norm.weight)


def test_token_ids_are_said_or_null(make: Make, bpe: Tokenizer, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["bos_token_id"] is None and config["eos_token_id"] is None
    generation_config.write(tmp_path, bos_id=None, eos_ids=[7], sampling={})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    assert Decoder.from_pretrained(tmp_path).stop_ids == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9, "x"]}')
    model = Decoder.from_pretrained(tmp_path)
    assert model.stop_ids == {7, 9}
    plain = generate(make(), bpe, ["The "], 40, Sampling(temperature=0), ignore_eos=True)[0].tokens
    model.stop_ids = frozenset({plain[5]})
    stopped = generate(model, bpe, ["The "], 40, Sampling(temperature=0))[0]
    assert stopped.reason == "eos" and stopped.tokens == plain[: plain.index(plain[5]) + 1]
