"""What is compiled, when, and what is said where it cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minillama.native import build
from minillama.native.build import CannotBuild, load_library

pytestmark = pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source file in a folder of its own, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    file = tmp_path / "three.cpp"
    file.write_text('#include "number.h"\nextern "C" int number() { return NUMBER; }\n')
    (tmp_path / "number.h").write_text("#define NUMBER 3\n")
    return file


def cache(source: Path) -> Path:
    return source.parent / "cache" / "minillama" / "native"


def test_it_is_compiled_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    assert load_library(source.name, said.append).number() == 3
    assert len(said) == 1
    assert source.name in said[0]
    assert [path.suffix for path in cache(source).iterdir()] == [".so"]
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    load_library(source.name)


def test_a_changed_header_makes_another_library(source: Path) -> None:
    load_library(source.name)
    (source.parent / "number.h").write_text("#define NUMBER 4\n")
    assert load_library(source.name).number() == 4


def test_old_libraries_go(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "KEPT", 2)
    other = source.with_name("other.cpp")
    other.write_text('extern "C" int number() { return 9; }\n')
    load_library(other.name)
    for number in range(4, 8):
        (source.parent / "number.h").write_text(f"#define NUMBER {number}\n")
        assert load_library(source.name).number() == number
    names = sorted(path.name.partition("-")[0] for path in cache(source).iterdir())
    assert names == ["other", "three", "three"]
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("the newest is gone"))
    assert load_library(source.name).number() == 7


def test_a_damaged_library_is_made_anew(source: Path) -> None:
    load_library(source.name)
    (made,) = cache(source).iterdir()
    made.unlink()
    made.write_bytes(b"\x7fELF")
    assert load_library(source.name).number() == 3


def test_a_library_that_others_may_write_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_library(source.name)
    getuid = os.getuid
    monkeypatch.setattr(build.os, "getuid", lambda: -1)
    with pytest.raises(CannotBuild, match="others may write"):
        load_library(source.name)
    monkeypatch.setattr(build.os, "getuid", getuid)
    cache(source).chmod(0o777)
    with pytest.raises(CannotBuild, match="others may write"):
        load_library(source.name)


def test_a_failure_is_said_and_not_repeated(source: Path) -> None:
    source.write_text("oops\n")
    said: list[str] = []
    for _ in range(2):
        with pytest.raises(CannotBuild, match="oops"):
            load_library(source.name, said.append)
    assert len(said) == 1
    source.write_text('extern "C" int number() { return 5; }\n')
    assert load_library(source.name).number() == 5
