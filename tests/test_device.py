"""What is asked of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minillama import Decoder
from minillama.device import choose_device, choose_dtype, decoding_dtype, refuse_one_gpu
from minillama.errors import InputError
from minillama.runs.config import RunConfig
from minillama.runs.sections import TrainConfig
from minillama.training.parallel import processes

PROGRAM = """
import resource, sys
import torch
from minillama.device import keep_freed_pages
if sys.argv[1] == "keep":
    assert keep_freed_pages()
def touch():
    torch.ones(16, 2**20)  # 64 MiB: over the largest block that glibc keeps by default
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

LENGTHS = """
import sys
from pathlib import Path
from minillama.device import bound_kernel_caches
if sys.argv[1] == "bound":
    bound_kernel_caches()
import torch
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
x, weight = torch.ones(700, 576), torch.ones(768, 576)
linear = torch.ops.mkldnn._linear_pointwise
for length in range(150, 550):
    if length == 370:
        before = resident()
    linear(x[:length], weight, None, "none", [], "")
print(resident() - before)
"""


@pytest.mark.parametrize(
    ("features", "trains", "decodes"),
    [
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx512_bf16": True}, torch.float32, torch.bfloat16),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True}, torch.bfloat16, torch.bfloat16),
        ({"avx512_bf16": True}, torch.float32, torch.bfloat16),
        ({"cpu_name": "Intel Xeon", "avx2": True}, torch.float32, torch.float32),
        ({}, torch.float32, torch.float32),
    ],
)
def test_bfloat16_is_chosen_where_it_is_multiplied_fast(
    features: dict[str, object], trains: torch.dtype, decodes: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: features)
    cpu = torch.device("cpu")
    assert choose_dtype("auto", cpu) == trains
    assert decoding_dtype(torch.bfloat16, cpu) == decodes
    assert decoding_dtype(torch.float32, cpu) == torch.float32
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert choose_dtype("auto", cpu) == torch.float32


@pytest.mark.parametrize("name", ["abc", "cpu:abc", "cpu:1", "cuda:99", "cuda:x", "", "xpu"])
def test_a_device_that_is_not_there_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such device") as error:
        Decoder.from_pretrained(tmp_path, device=name)
    said = error.value.parts()
    assert said["where"] == "Decoder.from_pretrained, device" and said["found"] == name
    assert "cpu" in said["expected"] and said["fix"]


def test_more_processes_than_gpus_are_refused_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="more processes than GPUs") as error:
        choose_device()
    assert error.value.found == 3 and "--nproc-per-node 2" in str(error.value.fix)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_device().index == 0


def test_several_processes_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    config = RunConfig(train=TrainConfig(device="cuda:0"))
    with pytest.raises(InputError, match="cannot share one GPU") as error, processes(config):
        pass
    assert error.value.where == "train.device" and error.value.found == "cuda:0"
    refuse_one_gpu("cuda")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # one process per machine
    refuse_one_gpu("cuda:0")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_kernels_of_lengths_that_are_over_are_not_kept() -> None:
    """Of 400 lengths the last 180 add next to nothing to the memory."""

    def grown(mode: str) -> int:
        command = [sys.executable, "-c", LENGTHS, mode]
        own = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=own).stdout)

    assert grown("bound") * 4 < grown("default")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_pages_are_kept() -> None:
    def faults(mode: str) -> int:
        command = [sys.executable, "-c", PROGRAM, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") * 2 < faults("default")
