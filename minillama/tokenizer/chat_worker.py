"""Chat template worker process: one JSON object per line in and out. See `chat.py`."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import cache
from typing import Any, ClassVar, NoReturn

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: delimits assistant turns, renders as its body (transformers).

    Where a request gives a mark, the body is rendered as mark + "(" + body + mark + ")".
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration
    mark: ClassVar[str] = ""

    def parse(self, parser: Parser) -> Node | list[Node]:
        """The block's body, unchanged."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> str:
        text: str = caller()
        return f"{self.mark}({text}{self.mark})" if self.mark else text


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@cache
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _render(request: dict[str, Any], size: int) -> list[str]:
    """Texts of a request: for each `prefixes` pair, the first n messages, with or without the generation prompt."""
    template, values = _compiled(request["template"]), dict(request["values"])
    messages = values.pop("messages")
    texts = []
    for count, prompt in request["prefixes"]:
        values |= {"messages": messages[:count], "add_generation_prompt": prompt}
        Generation.mark = request["mark"]
        text = template.render(**values)
        if request["mark"] and f"{request['mark']}(" in text:
            Generation.mark = ""
            plain = template.render(**values)
            if plain != text.replace(f"{request['mark']}(", "").replace(f"{request['mark']})", ""):
                raise TemplateError("generation: a filter on the block changes its ends; apply it inside the block")
        if len(text) > size:
            raise TemplateError(f"a text of {len(text)} characters, and at most {size} are allowed")
        texts.append(text)
    return texts


def main(memory: int, size: int) -> None:
    """Serve requests until the input ends, in `memory` bytes, with replies of at most `size` characters."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, ValueError, OSError):
        pass  # Windows; macOS takes the call and refuses the value. The time limit stays.
    print(flush=True)
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"texts": _render(json.loads(line), size)}
        except Exception as error:  # untrusted code raises anything
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
