"""Built-in sources: documentation and source code of Python's standard library."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from minillama.data.reading import Document, read_file
from minillama.data.skipped import BadText, Remark
from minillama.errors import InputError

BUILTIN = ("python-docs", "python-code")

# Tests, applications, bundled wheels, and generated files: character tables and the topics' text.
_LEFT_OUT = frozenset(
    ["test", "tests", "idle_test", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data"]
)


def builtin_documents(name: str) -> Iterator[Document | BadText | Remark]:
    """Documents of a built-in source, in an order that depends on the Python version alone.

    python-docs: the language reference of `help()`, one document per topic; then the docstrings of each module,
    under their names and signatures. python-code: each module's source file.

    Raises:
        InputError: this Python has no standard library in source form.
    """
    if name == "python-code":
        for _, path in modules():
            yield from read_file(path, "")
        return
    with suppress(ImportError):  # a stripped Python
        topics = import_module("pydoc_data.topics").topics
        yield from (Document(topics[name], f"python-docs, topic {name}") for name in sorted(topics))
    for module, path in modules():
        for source in read_file(path, ""):
            if isinstance(source, Document):
                yield Document(_docstrings(module, source.text), f"python-docs, module {module}")


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name and file of each module."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "os.py").is_file():
        raise InputError("this Python has no standard library in source form", where=root, fix="give a text file")
    paths: list[Path] = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name.isidentifier() and name not in _LEFT_OUT]
        paths += [Path(folder, name) for name in files]
    for path in sorted(paths, key=lambda path: path.parts):
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):  # the machine's own build flags
            yield ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), path


def _docstrings(module: str, source: str) -> str:
    """Docstrings of a module as one document; empty where there are none."""
    tree = parse(source)
    own = ast.get_docstring(tree)
    parts = [*([own] if own else []), *_described(tree, "")]
    return "\n\n".join([module, *parts]) + "\n" if parts else ""


def parse(source: str) -> ast.Module:
    """Syntax tree of a module; an empty one of templates and the like."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's code
            return ast.parse(source)
    except SyntaxError:
        return ast.Module([], [])


def _described(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(child)
            if text:
                yield f"{signature(child, prefix)}\n{text}"
        if isinstance(child, ast.ClassDef):
            yield from _described(child, f"{prefix}{child.name}.")


def signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    """`class NAME(BASES)` or `NAME(ARGUMENTS)`."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {prefix}{node.name}" + (f"({bases})" if bases else "")
    return f"{prefix}{node.name}({ast.unparse(node.args)})"
