"""Teacher behind an endpoint: repetitions, budget, cache, key, and what servers do wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minillama.errors import InputError
from minillama.inference.remote import BudgetError, Remote
from minillama.inference.sampling import Sampling

pytest.importorskip("openai", reason="the client of the endpoint")
KEY = "sk-of-the-test-0123456789"


class Server(ThreadingHTTPServer):
    """Endpoint that misbehaves as `script` says, one word per request, and then answers."""

    def __init__(self, script: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.bodies, self.keys = script, list[dict[str, Any]](), set[str]()
        self.lock, self.now, self.most, self.listing = threading.Lock(), 0, 0, list[int]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, address: Any) -> None:
        pass


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *words: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.listing:
            return self.reply(self.server.listing.pop(0), "{}")
        return self.reply(200, json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}))

    def reply(self, status: int, text: str, length: int | None = None, **headers: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            word = server.script.pop(0) if server.script else ""
        time.sleep(0.02)
        with server.lock:
            server.now -= 1
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        part = (
            {"message": {"role": "assistant", "content": text.upper()}}
            if "messages" in body
            else {"text": text.upper()}
        )
        first = [{"token": " A", "logprob": -1.2}, {"token": "B", "logprob": -2.0}, {"token": "x", "logprob": -0.5}]
        scores = {"logprobs": {"content": [{"token": "A", "logprob": -1.2, "top_logprobs": first}]}}
        choice = {"index": 0, "finish_reason": "stop", **part, **(scores if "logprobs" in body else {})}
        good = json.dumps(
            {
                "id": "1",
                "object": "x",
                "created": 1,
                "model": "tiny",
                "choices": [choice],
                "usage": {"total_tokens": 10},
            }
        )
        if word.isdigit():
            said = json.dumps({"error": {"message": f"no, {self.headers['Authorization']}"}})
            self.reply(int(word), said, **({"Retry_After": "0.01"} if word == "429" else {}))
        elif word == "half":
            self.reply(200, good[:40], len(good))
            self.close_connection = True
        elif word == "nothing":
            self.close_connection = True
        elif word == "drip":
            self.send_response(200)
            self.end_headers()
            for _ in range(200):
                self.wfile.write(b" ")
                time.sleep(0.05)
        elif word == "endless":
            self.reply(200, " " * 1_200_000 + '{"choices": [{"text": "long"}]}')
        elif word == "elsewhere":
            self.reply(307, "", Location=f"{server.url}/other")
        elif word == "later":
            self.reply(429, "{}", Retry_After="\u00b2")
        elif word == "context":
            self.reply(400, json.dumps({"error": {"message": "the request exceeds the available context size"}}))
        elif word:
            self.reply(200, word)
        else:
            self.reply(200, good)


Start = Callable[..., tuple[Server, Remote]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    servers = []
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def begin(*script: str, **options: Any) -> tuple[Server, Remote]:
        servers.append(Server(list(script)))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1], Remote(servers[-1].url, **{"wait": 0.001, "timeout": 20.0} | options)

    yield begin
    for server in servers:
        server.shutdown()
        server.server_close()


def test_answers_come_in_order_and_concurrently_within_the_bound(start: Start) -> None:
    server, teacher = start(concurrency=3)
    found = teacher([f"word {i}" for i in range(12)], 7, Sampling(0.5, top_p=0.9, top_k=4, seed=5), ("\n",))
    assert [one.text for one in found] == [f"WORD {i}" for i in range(12)]
    assert 1 < server.most <= 3 and teacher.requests == 12 and teacher.tokens == 120
    assert sorted(body["seed"] for body in server.bodies) == list(range(5, 17))
    assert {body["max_tokens"] for body in server.bodies} == {7} and server.bodies[0]["stop"] == ["\n"]
    assert server.bodies[0]["top_k"] == 4 and "min_p" not in server.bodies[0] and teacher.about["model"] == "tiny"
    assert teacher(["a"], chat=True)[0].text == teacher([[{"role": "user", "content": "a"}]])[0].text == "A"
    with pytest.raises(InputError, match="takes text, not token ids"):
        teacher([[1, 2]])


@pytest.mark.parametrize(
    "script",
    [
        ["429", "429"],
        ["500", "503"],
        ["half"],
        ["nothing"],
        ["nonsense"],
        ['{"choices": []}'],
        ["[]", "null"],
        ['{"choices": [{"message": {"content": null}}]}'],
        ["later"],
        ["[" * 100_000],
        ["drip"],
        ["endless"],
    ],
    ids=lambda script: script[0][:8],
)
def test_what_passes_is_asked_again(start: Start, script: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minillama.inference.endpoint.LARGEST", 1_000_000)
    _, teacher = start(*script, timeout=2.0)
    begun = time.monotonic()
    assert teacher(["hello"])[0].text == "HELLO" and time.monotonic() - begun < 8
    assert teacher.requests == len(script) + 1


def test_a_reply_that_repeats_the_key_is_told_without_it(start: Start) -> None:
    _, teacher = start(*[json.dumps({"heard": "x" * 95 + KEY})] * 2, retries=1)  # where a message was cut before
    with pytest.raises(InputError, match="no usable reply") as refused:
        teacher(["hello"])
    assert KEY[:8] not in str(refused.value)


def test_a_reply_with_the_key_or_half_a_character_is_kept_without_it(start: Start, tmp_path: Path) -> None:
    replies = [f'{{"choices": [{{"text": "{text}"}}]}}' for text in (f"I hear {KEY}.", "half \\ud83d")]
    _, teacher = start(*replies, cache=tmp_path)
    assert [teacher([name])[0].text for name in "ab"] == ["I hear ***.", "half ?"]
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json"))


def test_numbers_of_a_reply_are_checked(start: Start) -> None:
    usage = '{"choices": [{"text": "%s"}], "usage": {"total_tokens": %s}}'
    _, teacher = start(*(usage % ("x" * 300, n) for n in ("1e999", "-50", "null")))
    teacher(["p" * 300])
    assert 200 < teacher.tokens < 300  # a third of the bytes
    assert teacher(["a"]) and teacher(["b"]) and teacher.tokens > 400
    scores = '{"choices": [{"text": "", "logprobs": {"content": [{"top_logprobs": [{"token": "A", "logprob": %s}]}]}}]}'
    for wrong in ("NaN", "1000", "2"):
        _, teacher = start(scores % wrong)
        assert teacher.option_logprobs([[{"role": "user", "content": "Which?"}]], "A")[0] == pytest.approx([-1.2])
        assert teacher.requests == 2


@pytest.mark.parametrize("key", [f"{KEY}\r", f" {KEY}\n"])
def test_white_space_around_the_key_is_no_part_of_it(start: Start, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server, teacher = start()
    assert teacher(["a"])[0].text == "A" and server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY}é"])
def test_a_key_that_is_none_is_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="a key with a line break") as refused:
        Remote("http://127.0.0.1:9")
    assert KEY[:8] not in str(refused.value)


def test_the_list_of_models_is_asked_for_again(start: Start) -> None:
    server, _ = start()
    server.listing += [503, 429]
    assert Remote(server.url, wait=0.001).model == "tiny"
    server.listing += [401]
    with pytest.raises(InputError, match=r"the endpoint refuses[\s\S]*set OPENAI_API_KEY"):
        Remote(server.url)


def test_a_filtered_answer_is_empty(start: Start) -> None:
    _, teacher = start('{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}')
    assert (teacher(["hello"])[0].text, teacher.requests) == ("", 1)


def test_what_does_not_pass_is_said(start: Start, tmp_path: Path) -> None:
    _, teacher = start("401")
    with pytest.raises(InputError, match=r"the endpoint refuses[\s\S]*401[\s\S]*OPENAI_API_KEY") as refused:
        teacher(["hello"])
    assert KEY not in str(refused.value) and teacher.requests == 1
    _, teacher = start(*["500"] * 9, retries=2)
    with pytest.raises(InputError, match=r"no usable reply[\s\S]*500[\s\S]*same command again"):
        teacher(["hello"])
    assert teacher.requests == 3
    server, teacher = start("elsewhere")
    with pytest.raises(InputError, match=r"the endpoint refuses[\s\S]*307"):
        teacher(["hello"])
    assert len(server.bodies) == 1
    _, teacher = start("context", cache=tmp_path)  # which is not kept
    assert teacher(["long"])[0].reason == "context" and teacher(["long"])[0].text == "LONG"
    with pytest.raises(InputError, match="lists no model"):
        Remote("http://127.0.0.1:9", timeout=0.5)


def test_nothing_is_asked_twice_and_the_key_is_written_nowhere(start: Start, tmp_path: Path) -> None:
    server, teacher = start(cache=tmp_path)
    first = teacher(["a", "b"], 9)
    again = Remote(server.url, cache=tmp_path)
    assert again(["a", "b"], 9) == first and again.requests == 0 and again.cached == 2
    assert again(["a"], 9, Sampling(seed=7)) != [] and again.requests == 1
    same = [[{"role": "user", "content": "c"}]] * 3
    teacher.option_logprobs(same, "AB")
    assert len(server.bodies) == 4 and server.keys == {f"Bearer {KEY}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 4 and not any(KEY in path.read_text() for path in files)
    for path, text in zip(files, ("", "[]", '{"reply": {"text": 1}}', '{"reply": null}'), strict=True):
        path.write_text(text)  # damaged by a full disk, say
    assert Remote(server.url, cache=tmp_path)(["a", "b"], 9) == first and len(server.bodies) == 6


def test_the_budget_stops_in_good_order(start: Start, tmp_path: Path) -> None:
    server, teacher = start(cache=tmp_path, max_requests=5, concurrency=2)
    with pytest.raises(BudgetError, match=r"budget of the endpoint is spent[\s\S]*5 requests[\s\S]*another budget"):
        teacher([f"word {i}" for i in range(12)])
    assert len(server.bodies) == 5
    further = Remote(server.url, cache=tmp_path, concurrency=2)
    assert len(further([f"word {i}" for i in range(12)])) == 12 and len(server.bodies) == 12  # none of the five again
    server, teacher = start(max_tokens=200)
    with pytest.raises(BudgetError, match="tokens"):
        for i in range(50):
            teacher([f"word {i}"], 20)
    assert 100 <= teacher.tokens <= 200


def test_log_probabilities_of_options(start: Start) -> None:
    _, teacher = start()
    (found,) = teacher.option_logprobs([[{"role": "user", "content": "Which?"}]], ("A", "B", "C"))
    assert found == pytest.approx([-1.2, -2.0, float("-inf")])


@pytest.mark.parametrize("url", ["http://me:secret@127.0.0.1:9", "http://127.0.0.1:9/v1?key=secret"])
def test_a_key_in_the_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="OPENAI_API_KEY") as refused:
        Remote(url, "tiny")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://[::1", "http://me:sec/ret@127.0.0.1", "http://127.0.0.1:99999", "http://"])
def test_what_is_no_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(InputError, match=r"not a URL[\s\S]*--teacher") as refused:
        Remote(url, "tiny")
    assert "sec" not in str(refused.value)
