"""Standard streams that are closed, full or of another encoding; narrow terminals and those without colors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minillama.commands.cli import main
from minillama.tokenizer import byte_tokenizer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's devices")
PLAN = ("plan", "llama-7b")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run(*words: object, closed: str = "", env: dict[str, str] | None = None, **streams: Any) -> Any:
    """A command; `closed` are redirections of the shell, such as `>&-`."""
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "minillama", *map(str, words)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(command, env=os.environ | (env or {}), timeout=120, text=True, encoding="utf-8", **streams)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_tokenizer().save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_fault_47_a_closed_stream_is_the_null_device(closed: str) -> None:
    found = run(*PLAN, closed=closed)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_fault_47_a_closed_standard_input_is_empty(tokenizer: Path) -> None:
    found = run("tokenizer", "encode", "-", "--model", tokenizer, closed="<&-")
    assert found.returncode == 0 and "internal error" not in found.stderr


def test_fault_47_a_full_standard_output() -> None:
    with open("/dev/full", "w") as full:
        found = run(*PLAN, stdout=full)
    assert found.returncode == 1
    assert found.stderr == (
        "error: the system refuses\n  where: standard output, or a file\n  found: No space left on device\n"
    )


def test_fault_47_a_closed_pipe_ends_a_table_too() -> None:
    read, write = os.pipe()
    os.close(read)
    found = run(*PLAN, stdout=write)
    os.close(write)
    assert (found.returncode, found.stderr) == (141, "")


def test_fault_47_an_encoding_that_lacks_the_text(tokenizer: Path) -> None:
    ids = [str(byte) for byte in "é中".encode()]
    found = run("tokenizer", "decode", *ids, "--model", tokenizer, env={"PYTHONIOENCODING": "ascii"})
    assert (found.returncode, found.stdout) == (0, "\\xe9\\u4e2d\n")


def test_fault_47_a_run_whose_name_no_terminal_can_show(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / os.fsdecode(b"a\xff\x1b[2J$b")
    assert main([*words, "--out", str(out)]) == 0
    found = capsys.readouterr()
    assert "\x1b" not in found.out + found.err and "\\x1b[2J" in found.out
    assert (out / "loss.png").is_file()


@pytest.mark.parametrize(("name", "is_colored"), [("NO_COLOR", False), ("ANOTHER", True)])
def test_fault_48_no_color_on_a_terminal(name: str, is_colored: bool) -> None:
    terminal, other = os.openpty()
    own = {key: value for key, value in os.environ.items() if key != "PYTHON_TYRO_ANSI_CODES"}  # main() sets it
    env = own | {name: "1", "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-m", "minillama", "inspect", "--help"], stdout=other, env=env) as process:
        os.close(other)
        said = b""
        try:
            while part := os.read(terminal, 2**16):
                said += part
        except OSError:  # Linux's end of a terminal
            pass
        os.close(terminal)
    assert process.returncode == 0 and b"usage" in said
    assert bool(re.search(rb"\x1b\[[0-9;]*m", said)) is is_colored


def test_fault_48_a_narrow_terminal_cuts_no_figure() -> None:
    wide, narrow = (run(*PLAN, env={"COLUMNS": columns}).stdout for columns in ("200", "20"))
    assert "…" not in narrow
    assert re.findall(r"\d[\d.,]*", narrow) == re.findall(r"\d[\d.,]*", wide)
