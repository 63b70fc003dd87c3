"""The rooms of the package and the direction of its imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minillama

PACKAGE = Path(minillama.__file__).parent

# from the top down: a room imports from those below it alone, and not from its neighbors
LEVELS = [
    ["commands"],
    ["training", "scaling"],
    ["runs", "synthetic"],
    ["evaluate"],
    ["inference"],
    ["data", "native", "convert"],
    ["tokenizer", "model"],
    ["formats"],
    ["layers"],
    ["config"],
    ["files", "device", "threads"],
    ["errors"],
]
LEVEL = {room: -i for i, rooms in enumerate(LEVELS) for room in rooms}
OUTSIDE = {"__init__", "__main__"}  # the names at the top, which are imported when they are used; and the entry


def module(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = {name.partition(".")[0] for name in FILES} - OUTSIDE


def imports(name: str) -> Iterator[str]:
    """The package's modules that a file names, wherever: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports name the whole path"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in found:
            package, _, inside = full.partition(".")
            if package == "minillama":
                yield inside if inside in FILES else inside.rpartition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to the first of them, or none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        done.add(name)
        return next((found for other in sorted(graph[name]) if (found := visit(other, [*path, name]))), [])

    return next((found for name in graph if (found := visit(name, []))), [])


def test_every_room_has_a_level() -> None:
    assert set(LEVEL) == ROOMS


@pytest.mark.parametrize("name", [name for name in FILES if name not in OUTSIDE])
def test_no_import_goes_up(name: str) -> None:
    room = name.partition(".")[0]
    others = {other.partition(".")[0] for other in imports(name) if other} - {room}
    up = sorted(other for other in others if LEVEL[other] >= LEVEL[room])
    assert not up, f"{name} imports from {up}"


def test_no_circle() -> None:
    fronts = {name for name in FILES if FILES[name].name == "__init__.py"}  # a front only names what lies behind it
    graph = {name: set(imports(name)) - fronts - {name, ""} for name in FILES if name not in fronts}
    assert circle({name: {other for other in found if other in graph} for name, found in graph.items()}) == []


def test_circles_and_arrows_are_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert "errors" in set(imports("files")) and "model.decoder" in FILES


def test_files_stay_readable() -> None:
    longest = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: lines for name, lines in longest.items() if lines > 400} == {}
