"""Teacher model: an OpenAI-compatible endpoint, or a local model, behind one signature, that of `generate`."""

from __future__ import annotations

import json
import math
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from minillama.errors import InputError, optional_import
from minillama.files import read_json, replace_text
from minillama.inference.chat import ChatPrompts, Messages, Prompt, is_messages
from minillama.inference.endpoint import KEY, bounded_client, decode_json, environment_key, read_reply, split_url
from minillama.inference.engine import Engine, evaluating
from minillama.inference.generate import Completion, generate
from minillama.inference.sampling import Sampling

if TYPE_CHECKING:
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

T = TypeVar("T")
_AGAIN, _LONGEST = (408, 409, 429), 60.0
ROWS = 16  # answers of a local model that are decoded at once, at least


class Teacher(Protocol):
    """Model that answers, local or remote."""

    about: Mapping[str, Any]
    """Its name, for provenance."""

    def __call__(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
    ) -> list[Completion]:
        """Completions, as of `generate`; an empty one with the reason `context` for a prompt that does not fit."""

    def option_logprobs(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[list[float]]:
        """Log-probabilities, in nats, that the answer to messages begins with each option; -inf where it is unknown."""


class Local:
    """Local model as a teacher.

    Args:
        name: for provenance.
        template: chat template instead of the tokenizer's, which messages need otherwise; texts are then questions.
        rows: answers that are decoded at once.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, name: str = "", template: str = "", rows: int = ROWS
    ) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self._questions = ChatPrompts(tokenizer, template) if template else None
        source = self._questions.template.source if self._questions else tokenizer.chat_template or ""
        digest = sha256(source.encode()).hexdigest()[:16]
        self.about: Mapping[str, Any] = {
            "model": name,
            "tokenizer": tokenizer.fingerprint[:16],
            "template": digest if source else "",
        }

    def __call__(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
    ) -> list[Completion]:
        """Completions; prompt i has seed + i whether others fit the context or not."""
        how, limits = (self._questions or chat), (max_new_tokens, sampling, stop)
        engine = Engine(self.model, self.rows, None)
        return generate(self.model, self.tokenizer, prompts, *limits, engine=engine, chat=how, skips_long=True)

    def option_logprobs(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[list[float]]:
        """Log-probabilities of the options' first tokens; all -inf for a prompt that does not fit."""
        import torch

        asked = self._questions or ChatPrompts(self.tokenizer)
        firsts = [self.tokenizer.encode_inside(option)[0] for option in options]
        found = []
        for prompt in prompts:
            ids = asked(prompt)
            if len(ids) > self.model.config.max_seq_len:
                found.append([-math.inf] * len(firsts))
                continue
            with evaluating(self.model):
                logits = self.model(torch.tensor([ids], device=self.model.device))[0, -1].float()
            found.append(logits.log_softmax(-1)[firsts].tolist())
        return found


class BudgetError(InputError):
    """Budget of requests or tokens that is spent. Every answer that was paid for is in the cache."""


class Remote:
    """OpenAI-compatible endpoint as a teacher, by the official client (extra `teacher`).

    The key comes from the environment, `OPENAI_API_KEY`, and is written nowhere, also where a reply repeats it. 408,
    409, 429, 5xx, broken and senseless replies are asked for again, after Retry-After or wait * 2^attempt seconds, 60
    at most; other errors stop, and redirections.

    Args:
        url: base URL; `/v1` is added to one without a path.
        model: its name there; the first that the endpoint lists unless given.
        concurrency: requests at once.
        retries: per request, behind the first attempt.
        max_requests: budget, of attempts; 0: none.
        max_tokens: budget, of prompts and answers, as the endpoint counts them, or one per three bytes where it does
            not; 0: none. What an answer may still take is reserved before it is asked for.
        cache: folder of the replies, by a digest of the request: nothing is asked twice.
        timeout: seconds per request, to the end of its reply.
        wait: seconds before the first repetition.
        options: of the command line for the URL and the name, as messages call them.

    Raises:
        InputError: no URL, or one with a password or query; a key that is none; no such endpoint; no openai package.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        concurrency: int = 4,
        retries: int = 5,
        max_requests: int = 0,
        max_tokens: int = 0,
        cache: Path | None = None,
        timeout: float = 300.0,
        wait: float = 1.0,
        options: tuple[str, str] = ("--teacher", "--teacher-model"),
    ) -> None:
        parts = split_url(url, options[0])
        if parts.username is not None or parts.query or parts.fragment:
            shown = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
            fix = f"give the URL alone, and the key in the environment variable {KEY}"
            raise InputError("a URL with a user, a query or a fragment", where=options[0], found=shown, fix=fix)
        self._openai = optional_import("openai", "an endpoint", "teacher")
        self.url = url.rstrip("/") + ("" if parts.path.strip("/") else "/v1")
        self._key = environment_key()
        how = {"api_key": self._key or "none", "base_url": self.url}  # servers of one's own take any key
        client = bounded_client(self._openai, timeout)
        self._client = self._openai.OpenAI(**how, max_retries=0, timeout=timeout, http_client=client)
        self.concurrency, self.retries, self.wait, self.cache = concurrency, retries, wait, cache
        self.max_requests, self.max_tokens = max_requests, max_tokens
        self.requests = self.tokens = self.cached = self._reserved = 0
        self._lock, self._stopping, self._options = threading.Lock(), threading.Event(), options
        self.model = model or self._first_model()
        self.about: Mapping[str, Any] = {"url": self.url, "model": self.model}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
    ) -> list[Completion]:
        """Completions, asked for concurrently.

        Raises:
            BudgetError: the budget is spent.
            InputError: a prompt of token ids, an error that no repetition mends, or no answer after all of them.
        """
        sampling = sampling or Sampling()
        settings = {"max_tokens": max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p}
        more = {name: getattr(sampling, name) for name in ("top_k", "min_p", "repetition_penalty")}
        extra = {name: value for name, value in more.items() if value != getattr(Sampling(), name)}
        bodies = [
            {**self._prompt(prompt, chat), **settings, **extra, "seed": (sampling.seed + i) % 2**31}
            | ({"stop": list(stop)} if stop else {})
            for i, prompt in enumerate(prompts)
        ]
        return [Completion(reply["text"], (), reply["reason"]) for reply in self._all(bodies)]

    def option_logprobs(self, prompts: Sequence[Messages], options: Sequence[str]) -> list[list[float]]:
        """Log-probabilities from the 20 most probable first tokens, as many as endpoints give."""
        ask = {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        found = []
        for reply in self._all([{**self._prompt(prompt, True), **ask} for prompt in prompts]):
            shares = [
                math.fsum(math.exp(p) for token, p in reply["first"] if token.strip(' ("') == option)
                for option in options
            ]
            found.append([math.log(share) if share else -math.inf for share in shares])
        return found

    def _prompt(self, prompt: Prompt, chat: bool) -> dict[str, Any]:
        if is_messages(prompt):
            return {"model": self.model, "messages": [dict(message) for message in prompt]}  # type: ignore[arg-type]
        if not isinstance(prompt, str):
            raise InputError("a remote teacher takes text, not token ids", where=self.url)
        asked = {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        return {"model": self.model, **asked}

    def _all(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replies in order; those to requests that are under way when one fails go to the cache."""
        keys = [sha256(json.dumps([self.url, body], sort_keys=True).encode()).hexdigest() for body in bodies]
        self._stopping.clear()
        with ThreadPoolExecutor(max(1, self.concurrency)) as pool:
            unique = dict(zip(keys, bodies, strict=True))
            once = {key: pool.submit(self._reply, key, body) for key, body in unique.items()}
            try:
                return [once[key].result() for key in keys]
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _reply(self, key: str, body: dict[str, Any]) -> dict[str, Any]:
        path = self.cache / key[:2] / f"{key}.json" if self.cache is not None else None
        if path is not None and (kept := _cached(path)) is not None:
            with self._lock:
                self.cached += 1
            return kept
        reply = self._ask(body)
        if path is not None and reply["reason"] != "context":  # the server may be given more of it
            text = json.dumps({"url": self.url, "request": body, "reply": reply}, ensure_ascii=False)
            replace_text(path, text)
        return reply

    def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        kind = self._client.chat.completions if "messages" in body else self._client.completions
        known = {name: body[name] for name in body if name not in ("top_k", "min_p", "repetition_penalty")}
        extra = {name: body[name] for name in body.keys() - known.keys()} or None
        prompt = len(json.dumps(body).encode()) // 3  # three bytes per token
        most = prompt + body["max_tokens"]

        def send() -> dict[str, Any]:
            self._take(most)
            used = 0
            try:
                raw = kind.with_raw_response.create(**known, extra_body=extra)
                reply = read_reply(decode_json(raw.http_response.content, self._key), prompt)
                used = reply.pop("tokens")
                return reply
            except self._openai.BadRequestError as error:
                if "context" not in self._told(error).lower():
                    raise
                return {"text": "", "reason": "context", "first": []}
            finally:
                with self._lock:
                    self._reserved, self.tokens = self._reserved - most, self.tokens + used

        return self._insist(send)

    def _insist(self, send: Callable[[], T]) -> T:
        """Value of `send`, which is called again after an error that may pass."""
        openai, problem = self._openai, ""
        for attempt in range(self.retries + 1):
            delay = self.wait * 2**attempt * (0.75 + random.random() / 2)
            try:
                return send()
            except InputError:
                raise
            except openai.APIStatusError as error:
                problem = f"{error.status_code} {self._told(error)}"
                if error.status_code not in _AGAIN and error.status_code < 500:
                    fix = f"set {KEY}" if error.status_code in (401, 403) else f"see {' and '.join(self._options)}"
                    raise InputError("the endpoint refuses", where=self.url, found=problem, fix=fix) from None
                after = error.response.headers.get("retry-after", "")
                delay = float(after) if re.fullmatch(r"[0-9]+(\.[0-9]*)?", after) else delay
            except (openai.OpenAIError, ValueError) as error:
                problem = self._told(error)
            if attempt < self.retries and self._stopping.wait(min(delay, _LONGEST)):
                break
        fix = "see that the server runs, then give the same command again: it goes on where it is"
        raise InputError("no usable reply of the endpoint", where=self.url, found=problem, fix=fix)

    def _take(self, tokens: int) -> None:
        """Reserve a request and its tokens.

        Raises:
            BudgetError: there is no room for them.
        """
        with self._lock:
            left = self.max_tokens - self.tokens - self._reserved
            if (self.max_requests and self.requests >= self.max_requests) or (self.max_tokens and left < tokens):
                found = f"{self.requests:,} requests, {self.tokens:,} tokens"
                fix = "give the same command again, with another budget: it goes on where it is"
                raise BudgetError("the budget of the endpoint is spent", where=self.url, found=found, fix=fix)
            self.requests += 1
            self._reserved += tokens

    def _told(self, error: Exception) -> str:
        """What an error says, in one short line without the key."""
        cause = f": {error.__cause__}" if error.__cause__ is not None else ""
        return " ".join(f"{error}{cause}".replace(self._key or "\0", "***").split())[:200]

    def _first_model(self) -> str:
        def send() -> str:
            try:
                raw = self._client.models.with_raw_response.list()
                name = decode_json(raw.http_response.content, self._key)["data"][0]["id"]
                if isinstance(name, str):
                    return name
                raise ValueError(f"a model without a name: {name!r}")
            except self._openai.APIStatusError:
                raise
            except Exception as error:  # a server of one's own may list anything
                fix, told = f"give {self._options[1]} NAME, or see that the server runs", self._told(error)
                raise InputError("the endpoint lists no model", where=self.url, found=told, fix=fix) from None

        return self._insist(send)


def _cached(path: Path) -> dict[str, Any] | None:
    """Reply of a file of the cache; None where there is none, or a damaged one."""
    try:
        reply = read_json(path)["reply"]
        return reply if isinstance(reply["text"], str) and {"reason", "first"} <= reply.keys() else None
    except (InputError, LookupError, TypeError, AttributeError):
        return None
