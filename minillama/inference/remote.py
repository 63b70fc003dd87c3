"""Model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from minillama.errors import InputError
from minillama.inference.chat import Messages
from minillama.inference.generate import Completion
from minillama.inference.sampling import Sampling

KEY = "MINILLAMA_API_KEY"
BUSY = (429, 500, 502, 503, 504)
TRIES = 4


class RemoteModel:
    """Chat completions of `POST URL/chat/completions`, one request after the other.

    The environment variable MINILLAMA_API_KEY is sent as a bearer token, if there is one.

    Args:
        url: up to `/v1`.
        name: of the model; the first that the endpoint lists unless given.
        timeout: seconds per request.

    Raises:
        InputError: the endpoint cannot be reached, refuses, or answers in another form.
    """

    def __init__(self, url: str, name: str = "", timeout: float = 600.0, wait: float = 2.0) -> None:
        self.url, self.timeout, self.wait = url.rstrip("/"), timeout, wait
        self.name = name or str(self._value(self._send("models", None), "data", 0, "id"))

    def __call__(self, prompts: Sequence[Messages], max_new_tokens: int, sampling: Sampling) -> list[Completion]:
        """One completion per conversation; prompt i has the sampling's seed + i."""
        found = []
        for i, messages in enumerate(prompts):
            settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed + i}
            body = {"model": self.name, "messages": list(messages), "max_tokens": max_new_tokens, **settings}
            reply = self._send("chat/completions", body)
            text = self._value(reply, "choices", 0, "message", "content") or ""
            cut = self._value(reply, "choices", 0).get("finish_reason") == "length"
            found.append(Completion(str(text), (), "length" if cut else "eos"))
        return found

    def _send(self, path: str, body: dict[str, Any] | None) -> Any:
        where, headers = f"{self.url}/{path}", {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(where, None if body is None else json.dumps(body).encode(), headers)
        for attempt in range(TRIES):
            try:
                with urlopen(request, timeout=self.timeout) as reply:
                    return json.load(reply)
            except HTTPError as error:
                if error.code in BUSY and attempt + 1 < TRIES:
                    time.sleep(self.wait * 2**attempt)
                    continue
                said = error.read(300).decode(errors="replace")
                fix = f"set {KEY}" if error.code in (401, 403) else None
                raise InputError("the endpoint refused", where=where, found=f"{error.code} {said}", fix=fix) from None
            except (URLError, TimeoutError, ConnectionError) as error:
                raise InputError("the endpoint cannot be reached", where=where, found=error) from None
            except ValueError as error:
                raise InputError("the endpoint's answer is not JSON", where=where, found=error) from None
        raise AssertionError("unreachable")

    def _value(self, reply: Any, *path: str | int) -> Any:
        value = reply
        try:
            for step in path:
                value = value[step]
        except (KeyError, IndexError, TypeError):
            expected = ".".join(map(str, path))
            what = "the endpoint answers in another form"
            raise InputError(what, where=self.url, found=str(reply)[:200], expected=expected) from None
        return value
