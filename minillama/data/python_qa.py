"""Built-in conversations: questions about Python's standard library, answered from its docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

from minillama.data.builtin import modules, parse, signature
from minillama.data.permutation import hash_fraction
from minillama.data.reading import Document, Record, read_file

PYTHON_QA = "python-qa"
LONGEST = 200  # characters of an answer

WHAT = ("What does {name} do?", "Explain {name} in one sentence.", "What is {name} for?")
HOW = ("How do I call {name}?", "What is the signature of {name}?", "Which arguments does {name} take?")
WHERE = ("Which module has {short}?", "Where is {short} defined?", "What do I import for {short}?")

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def python_qa() -> Iterator[Record]:
    """One conversation per documented public function, method or class: three questions in an order by its name.

    What would answer the last question on the next name of the module is its `rejected` answer, for preferences.

    What it does (the first sentence of its docstring), its signature, its module. Wordings and order follow from a
    hash of the name, so that the conversations depend on the Python version alone; all questions on one name are in
    one conversation, so that none of them is held out while another is trained.
    """
    for module, path in modules():
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for source in read_file(path, ""):
            if isinstance(source, Document):
                named = [(name, _turns(module, name, node)) for name, node in _public(parse(source.text), "")]
                answered = [(name, turns) for name, turns in named if turns]
                for (name, turns), (_, others) in zip(answered, [*answered[1:], *answered[:1]], strict=True):
                    full = f"{module}.{name}"
                    yield Record(_conversation(full, name, turns, others), f"{PYTHON_QA}, {full}")


def _public(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Documented]]:
    """Dotted names within a module."""
    for child in node.body:
        if isinstance(child, Documented) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{prefix}{child.name}.")


def _turns(module: str, name: str, node: Documented) -> list[tuple[str, str]]:
    """Three questions on a name, and their answers; none where its docstring has no short first sentence."""
    sentence, call = first_sentence(ast.get_docstring(node) or ""), signature(node, "")
    head, _, _ = name.rpartition(".")
    full = f"{module}.{name}"
    call = call.replace(node.name, f"{head}.{node.name}" if head else node.name, 1)
    if sentence is None or len(call) > LONGEST:
        return []
    kind = "class" if isinstance(node, ast.ClassDef) else "method" if head else "function"
    return [
        (_pick(WHAT, full), sentence),
        (_pick(HOW, full), call),
        (_pick(WHERE, full), f"The {kind} {name} is in the module {module}."),
    ]


def _conversation(
    full: str, name: str, turns: Sequence[tuple[str, str]], others: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Messages on a name, and the answer of another one to the last question."""
    order = sorted(range(len(turns)), key=lambda i: hash_fraction(f"{full} {i}", "order of the questions"))
    messages = []
    for question, answer in (turns[i] for i in order):
        messages.append({"role": "user", "content": question.format(name=full, short=name)})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "rejected": others[order[-1]][1]}


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring's first paragraph; None if there is none of 10 to 200 characters."""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`'\"])", paragraph)[0]
    return sentence if 10 <= len(sentence) <= LONGEST and sentence[0].isalpha() else None


def _pick(wordings: tuple[str, ...], name: str) -> str:
    return wordings[int(hash_fraction(name, wordings[0]) * len(wordings))]
