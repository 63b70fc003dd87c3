"""HTTP of an OpenAI-compatible endpoint: its URL, its key, replies of a bounded length and time, and what they say."""

from __future__ import annotations

import json
import os
import time
from typing import Any
from urllib.parse import SplitResult, urlsplit

from minillama.errors import InputError
from minillama.files import LARGEST, bound
from minillama.inference.request import FinishReason

KEY = "OPENAI_API_KEY"
"""Environment variable of the key."""
_REASONS: dict[object, FinishReason] = {"length": "length", "content_filter": "cancelled"}
_SECRET = 16  # characters of a key at least that is cut out of replies; a shorter one may be any word


def split_url(url: str, option: str) -> SplitResult:
    """Parts of a URL.

    Raises:
        InputError: it is none, and is not shown, as it may hold a password.
    """
    try:
        parts = urlsplit(url)
        if parts.hostname and (parts.port is None or parts.port) and url.isprintable() and " " not in url:
            return parts
    except ValueError:
        pass
    raise InputError("not a URL", where=option, expected="http://HOST:PORT or https://HOST, perhaps with a path")


def environment_key() -> str:
    """Key of the environment, or nothing.

    Raises:
        InputError: one that no header can hold; the library would quote it.
    """
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise InputError("a key with a line break or a character outside ASCII", where=KEY, fix="set it anew")
    return key


def bounded_client(openai: Any, timeout: float) -> Any:
    """HTTP client that reads no reply longer than a time and a length, and follows no redirection."""
    client = openai.DefaultHttpxClient(timeout=timeout, follow_redirects=False)
    inner, most = client.send, bound(LARGEST)

    def send(request: Any, *, stream: bool = False, **how: Any) -> Any:
        end, data = time.monotonic() + timeout, bytearray()
        response = inner(request, stream=True, **how)
        try:
            for part in response.iter_bytes():
                data += part
                if len(data) > most or time.monotonic() > end:
                    what = f"{most:,} bytes" if len(data) > most else f"{timeout:g} s"
                    raise ValueError(f"a reply of more than {what}")
        finally:
            response.close()
        coded = (b"content-encoding", b"content-length", b"transfer-encoding")
        headers = [(name, value) for name, value in response.headers.raw if name.lower() not in coded]
        return type(response)(response.status_code, headers=headers, content=bytes(data), request=request)

    client.send = send
    return client


def decode_json(data: bytes, key: str) -> Any:
    """JSON of a reply, without the key and without halves of surrogate pairs, which no file can hold.

    Raises:
        ValueError: it is none.
    """
    try:
        text = json.dumps(json.loads(data), ensure_ascii=False)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
    if len(key) >= _SECRET:
        text = text.replace(json.dumps(key)[1:-1], "***")
    return json.loads(text.encode("utf-8", "replace"))


def read_reply(reply: Any, prompt: int = 0) -> dict[str, Any]:
    """Text, finish reason, alternatives of the first token and number of tokens of a reply.

    Args:
        prompt: tokens of the prompt, for an endpoint that does not count them.

    Raises:
        ValueError: it is no reply.
    """
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason, tokens = choice.get("finish_reason"), (reply.get("usage") or {}).get("total_tokens")
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        nats = [float(each["logprob"]) for each in first]
        pairs = [[str(each["token"]), one] for each, one in zip(first, nats, strict=True)]
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a chat or text completion: {json.dumps(reply)}") from error
    if text is None and reason in ("length", "content_filter"):
        text = ""
    if not isinstance(text, str) or not (reason is None or isinstance(reason, str)):
        raise ValueError(f"a reply without text: {json.dumps(reply)}")
    if not all(one <= 0.01 for one in nats):  # NaN is not; a float may be rounded to more than 0
        raise ValueError(f"a log-probability that is none: {nats}")
    if not isinstance(tokens, int) or tokens <= 0:
        tokens = prompt + len(text.encode()) // 3 + 1
    return {"text": text, "reason": _REASONS.get(reason, "stop"), "first": pairs, "tokens": tokens}
