"""Chat templates, as a program that uses them meets them. Hostile ones are row 23 of the fault table."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minillama.tokenizer import Tokenizer, byte_tokenizer
from minillama.tokenizer.chat import ChatTemplate


def test_threads_get_their_own_answers() -> None:
    chat = ChatTemplate("{{ messages[0].content * 50 }}")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: chat([{"role": "user", "content": f"<{i}>"}]), range(200)))
    assert answers == [f"<{i}>" * 50 for i in range(200)]
    chat.close()


def test_nothing_in_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jinja2.py").write_text("open('mark', 'w')")
    (tmp_path / "minillama.py").write_text("open('mark', 'w')")
    monkeypatch.chdir(tmp_path)
    assert ChatTemplate("{{ 1 + 1 }}")([]) == "2"
    assert not os.path.exists("mark")


def test_what_a_template_may_ask_for() -> None:
    template = (
        "{{ tools is none }} {{ documents is none }} {{ extra }} {% generation %}{{ 7 | tojson }}{% endgeneration %}"
    )
    assert ChatTemplate(template)([], extra="é") == "True True é 7"
    assert ChatTemplate("{{ bos_token }}", {"bos_token": "<s>"})([]) == "<s>"


def test_the_default_of_named_templates_is_taken(tmp_path: Path) -> None:
    byte_tokenizer().save(tmp_path)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes {{ eos_token }}"}]
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": named}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).apply_chat_template([]) == "yes <|endoftext|>"
