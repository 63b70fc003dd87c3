"""docs/api.md: its names exist with the parameters that it says, its examples run; the package's names are in it."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

import minillama

TEXT = (Path(__file__).resolve().parents[1] / "docs/api.md").read_text(encoding="utf-8")
NAMES = re.findall(r"\| `(minillama[\w.]*)(?:\(([\w, ]*)\))?` \|", TEXT)


def found(path: str) -> object:
    """What a dotted name is: as much of it as can be is a module."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: object = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AssertionError(path)


@pytest.mark.parametrize(("path", "parameters"), NAMES)
def test_a_name_has_these_parameters(path: str, parameters: str) -> None:
    wanted = [name for name in parameters.split(", ") if name]
    has = list(inspect.signature(found(path)).parameters) if wanted else []  # type: ignore[arg-type]
    assert [name for name in has if name in wanted] == wanted, f"{path}{has}"


def test_the_names_at_the_top_are_listed() -> None:
    assert len(NAMES) >= 30
    listed = {path.split(".")[1] for path, _ in NAMES}
    assert set(minillama.__all__) - {"__version__"} <= listed
    assert minillama.__doc__ is not None
    assert all(name in minillama.__doc__ for name in minillama.__all__ if name != "__version__")


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.S | re.M)
    assert len(blocks) == 11
    namespace: dict[str, object] = {"__name__": "example"}
    for block in blocks:  # one after the other, as they stand
        exec(compile(block, "docs/api.md", "exec"), namespace)
    said = capsys.readouterr().out.splitlines()
    assert float(said[0].split()[0]) < 4.5  # it learns: ln 257 is 5.55
    assert said[1] == "[(1, 20, 64), (1, 20, 64)] torch.Size([1, 4, 20, 20])"
