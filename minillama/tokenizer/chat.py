"""Chat templates: untrusted code, run in Jinja's sandbox in a process of its own.

The sandbox keeps a template from Python's internals, but not from endless loops and not from
`'A' * 10**9`; a process has a memory limit and can be stopped. transformers renders with the same
sandbox and the same settings, so that the text is the same.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from minillama.errors import InputError

SECONDS, MEMORY, SIZE = 5.0, 1 << 30, 10_000_000
_WORKER = Path(__file__).with_name("chat_worker.py")  # run as a file: the package would take longer to import


class ChatTemplate:
    """Chat template renderer.

    Args:
        variables: of the template besides the messages: `bos_token`, `eos_token`.
        seconds: time limit per conversation.
    """

    def __init__(self, template: str, variables: Mapping[str, Any] | None = None, seconds: float = SECONDS) -> None:
        self.template, self.variables, self.seconds = template, dict(variables or {}), seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __call__(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **more: Any) -> str:
        """The rendered conversation.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with the header of an assistant turn.
            more: further variables, such as `tools`.

        Raises:
            InputError: the template is not valid Jinja, refuses the messages, violates the sandbox, or exceeds
                the time or size limit.
        """
        return self.renderings(messages, [(len(messages), add_generation_prompt)], **more)[0]

    def renderings(
        self, messages: Sequence[Mapping[str, Any]], prefixes: Sequence[tuple[int, bool]], mark: str = "", **more: Any
    ) -> list[str]:
        """Renderings of prefixes of a conversation.

        Args:
            messages: the whole conversation.
            prefixes: number of messages and `add_generation_prompt` of each rendering.
            mark: a character that is nowhere in the messages. Each `{% generation %}` block is rendered as
                mark + "(" + body + mark + ")".
            more: further variables, such as `tools`.

        Raises:
            InputError: as for a call.
        """
        values = {"tools": None, "documents": None, **self.variables, **more, "messages": messages}
        request = {"template": self.template, "values": values, "prefixes": prefixes, "mark": mark}
        try:
            data = json.dumps(request).encode() + b"\n"
        except TypeError as error:
            fix = "give each tool as a JSON schema, and not as a function"
            raise InputError("a message or a tool is not JSON", found=error, fix=fix) from None
        with self._lock:  # one request at a time, or the replies would be mixed up
            try:
                reply = self._ask(data)
            except BaseException:
                self.close()  # a reply that was not read must not become the next one
                raise
        if "texts" not in reply:
            raise InputError("the chat template failed", found=reply["error"])
        texts: list[str] = reply["texts"]
        return texts

    def _ask(self, request: bytes) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            # -P and our own search path: modules in the current folder must not be imported
            command = [sys.executable, "-P", str(_WORKER), str(MEMORY), str(SIZE)]
            path = os.pathsep.join(entry for entry in sys.path if entry)
            environment = os.environ | {"PYTHONPATH": path}
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
            assert self._process.stdout is not None
            if not self._process.stdout.readline():  # ready: startup is outside the time limit
                raise InputError("the process that renders chat templates did not start", found=" ".join(command))
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # the process ended; the empty reply below says so
            self._process.stdin.write(request)
            self._process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(self.seconds):
                raise InputError("the chat template does not end, and was stopped", found=f"{self.seconds:g} s")
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise InputError("the chat template exceeded its memory limit, and was stopped")
        return json.loads(line)

    def close(self) -> None:
        """Stop the process; the next call starts another."""
        if self._process is not None:
            with self._process:  # closes its streams and waits for its end
                self._process.kill()
        self._process = None

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()
