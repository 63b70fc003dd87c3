"""[log]: step records in TensorBoard and Weights & Biases, by stand-ins of them; what is missing is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from minillama.errors import InputError
from minillama.runs.config import RunConfig
from minillama.training.run import train

Make = Callable[..., RunConfig]


class Services:
    """What a run has sent: opened with, scalars by step, and whether it was closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[dict[str, Any]] = []
        self.points: dict[str, list[tuple[int, str, float]]] = {"tensorboard": [], "wandb": []}
        self.closed: list[str] = []
        board, torch_board, wandb = (ModuleType(name) for name in ("tensorboard", "torch.utils.tensorboard", "wandb"))
        torch_board.SummaryWriter = self._writer  # type: ignore[attr-defined]
        wandb.init = self._init  # type: ignore[attr-defined]
        for name, module in (("tensorboard", board), ("torch.utils.tensorboard", torch_board), ("wandb", wandb)):
            monkeypatch.setitem(sys.modules, name, module)

    def _writer(self, folder: str, purge_step: int | None = None) -> SimpleNamespace:
        self.opened.append({"folder": folder, "purge_step": purge_step})
        return SimpleNamespace(
            add_scalar=lambda name, value, step: self.points["tensorboard"].append((step, name, value)),
            close=lambda: self.closed.append("tensorboard"),
        )

    def _init(self, **options: Any) -> SimpleNamespace:
        self.opened.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.points["wandb"].extend((step, *pair) for pair in values.items()),
            finish=lambda: self.closed.append("wandb"),
        )


def test_a_run_sends_what_metrics_jsonl_has(tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    services, out = Services(monkeypatch), tmp_path / "run"
    words = ["--log.to", "tensorboard", "wandb", "--train.steps"]
    assert train(tiny_config(*words, "6"), str(out)) == 0
    assert train(tiny_config(*words, "8"), str(out), resume=True) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "val_loss", "lr"):
        expected = [(line["step"], name, line[name]) for line in lines if name in line]
        for points in services.points.values():
            assert [point for point in points if point[1] == name] == expected
    first, named, again, _ = services.opened
    assert (first, again["purge_step"]) == ({"folder": str(out / "tensorboard"), "purge_step": None}, 7)
    assert (named["project"], named["name"], named["config"]["optim"]["lr"]) == ("minillama", "run", 1e-2)
    assert services.closed == ["tensorboard", "wandb"] * 2


def test_a_missing_package_is_said_before_anything_is_replaced(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert train(tiny_config("--train.steps", "2"), str(out)) == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r'to = \["wandb"\] needs the package wandb(?s:.)*pip install'):
        train(tiny_config("--log.to", "wandb"), str(out), overwrite=True)
    assert (out / "model").is_dir()


def test_a_refusal_names_the_way_without_a_network(
    tiny_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise RuntimeError("no API key")

    Services(monkeypatch)
    sys.modules["wandb"].init = refuse  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"no API key(?s:.)*WANDB_MODE=offline"):
        train(tiny_config("--log.to", "wandb"), str(tmp_path / "run"))
