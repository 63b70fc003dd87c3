"""Self-instruct and constitutional feedback with llama.cpp's server, which listens on the loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillama.commands.cli import main
from minillama.inference.remote import Remote
from minillama.inference.sampling import Sampling

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is the teacher here")
pytest.importorskip("openai", reason="the client of the endpoint")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(smollm2: Path) -> Iterator[str]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(smollm2), 4096, 2, False
    params.cpuparams.n_threads, params.port = 2, 0
    server = xllamacpp.Server(params)
    yield server.listening_address


def test_text_chat_seeds_and_options(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    teacher = Remote(url, cache=tmp_path, concurrency=2)
    text = teacher(["One, two, three,", "Monday, Tuesday,"], 4, Sampling(temperature=0))
    assert "four" in text[0].text and text[1].text not in ("", text[0].text) and text[0].reason == "length"
    stopped = teacher(["One, two, three,"], 8, Sampling(temperature=0), (",",))[0]
    assert stopped.text.strip() == "four" and stopped.reason == "stop"
    chat = [[{"role": "user", "content": "Reply with the letter A alone."}]]
    assert teacher(chat, 4, Sampling(temperature=0))[0].text
    (nats,) = teacher.option_logprobs(chat, ("A", "B"))
    assert -20 < max(nats) <= 0
    assert teacher.tokens > 20 and teacher.requests == 5


def test_the_commands_end_to_end(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    seeds = tmp_path / "seeds.jsonl"
    fields: list[dict[str, Any]] = [
        {"instruction": f"Name {number} things that are {color}.", "output": "A leaf, a frog."}
        for number, color in enumerate(
            ["green", "red", "blue", "cold", "warm", "old", "new", "long", "round", "soft"], 2
        )
    ]
    seeds.write_text("".join(json.dumps(each) + "\n" for each in fields))
    common = ["--teacher", url, "--cache", str(tmp_path / "cache")]
    words = ["data", "self-instruct", "--seeds", str(seeds), *common, "--output", str(tmp_path / "new.jsonl")]
    assert main([*words, "--count", "2", "--max-new-tokens", "300", "--requests", "2"]) == 0
    assert len((tmp_path / "new.jsonl").read_text().splitlines()) == 2
    (tmp_path / "q.jsonl").write_text('{"prompt": "How do I open a lock?"}\n')
    words = ["data", "constitutional", *common, "--max-new-tokens", "24", "--rounds", "1"]
    assert main([*words, str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl")]) == 0
    assert main([*words, str(tmp_path / "a.jsonl"), "--step", "compare", "--output", str(tmp_path / "b.jsonl")]) == 0
    (line,) = [json.loads(text) for text in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert 0.5 < line["probability"] <= 1 and line["chosen"] != line["rejected"]
