"""Chat templates, as a program that uses them meets them. Hostile ones are row 23 of the fault table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minillama.errors import InputError
from minillama.tokenizer import Tokenizer, byte_tokenizer
from minillama.tokenizer.chat import ChatTemplate
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.template import load_template


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


NAMED = {"default": "D:{{ messages[0].content }}", "tool_use": "T:{{ tools[0].function.name }}", "rag": "R"}
HELLO, CLOCK = [{"role": "user", "content": "hi"}], [{"type": "function", "function": {"name": "clock"}}]


def write(folder: Path, **changes: object) -> Path:
    byte_tokenizer().with_special(["<|im_end|>"]).save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def as_list(folder: Path) -> Path:
    return write(folder, chat_template=[{"name": name, "template": template} for name, template in NAMED.items()])


def as_table(folder: Path) -> Path:
    return write(folder, chat_template=NAMED)


def as_files(folder: Path) -> Path:
    write(folder)
    (folder / "chat_template.jinja").write_text(NAMED["default"])
    (folder / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(NAMED[name])
    return folder


def saved_again(folder: Path) -> Path:
    Tokenizer.load(as_files(folder)).save(folder / "again")
    return folder / "again"


@pytest.mark.parametrize("make", [as_list, as_table, as_files, saved_again])
def test_named_templates_as_transformers_takes_them(make: Callable[[Path], Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make(tmp_path)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert dict(ours.chat_templates) == NAMED
    for tools in (None, CLOCK):
        wanted = theirs.apply_chat_template(HELLO, tools=tools, tokenize=False)
        assert ours.apply_chat_template(HELLO, tools=tools) == wanted == ("T:clock" if tools else "D:hi")
        conversation = Conversation.of(HELLO, tools or [])
        assert load_template("own", ours).render(conversation) == wanted


def test_a_template_for_tools_alone(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, chat_template={"tool_use": NAMED["tool_use"]}))
    with pytest.raises(InputError, match="no default chat template\n  found: tool_use"):
        tokenizer.apply_chat_template(HELLO)
    with pytest.raises(InputError, match="for conversations with tools"):
        load_template("own", tokenizer).render(Conversation.of(HELLO))
    assert tokenizer.apply_chat_template(HELLO, tools=CLOCK) == "T:clock"


def test_a_function_is_no_tool() -> None:
    with pytest.raises(InputError, match="not JSON"):
        ChatTemplate("x")(HELLO, tools=[print])


@pytest.mark.parametrize("bos", [{"bos_token": None}, {}, {"bos_token": None, "add_bos_token": True}])
@pytest.mark.parametrize("template", ["{{ bos_token }}x", "{% if bos_token is defined and bos_token %}y{% endif %}x"])
def test_a_tokenizer_without_bos_renders_none(bos: dict[str, object], template: str, tmp_path: Path) -> None:
    """Qwen's way: the template begins with a bos_token that there is not."""
    from transformers import AutoTokenizer

    write(tmp_path)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | bos))
    spec = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    ours, theirs = Tokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.apply_chat_template(HELLO) == theirs.apply_chat_template(HELLO, tokenize=False) == "x"
    ours.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert again["bos_token"] is None and again["add_bos_token"] is False
    assert Tokenizer.load(tmp_path / "again").apply_chat_template(HELLO) == "x"


def test_a_gguf_file_without_bos_has_none(tmp_path: Path) -> None:
    """llama.cpp's default, id 11, is a comma in Qwen's vocabulary."""
    import gguf

    from minillama.tokenizer.gguf_export import vocabulary

    bare = byte_tokenizer().with_special(["<|im_end|>"])
    tokenizer = Tokenizer(bare.backend, eos="<|im_end|>", add_bos=False, config={"chat_template": "{{ bos_token }}x"})
    keys = vocabulary(tokenizer, tokenizer.vocab_size)
    assert "tokenizer.ggml.bos_token_id" not in keys
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    for key, value in keys.items():
        kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        kinds.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = Tokenizer.load(tmp_path / "v.gguf")
    assert not found.has_bos and not found.add_bos and found.apply_chat_template(HELLO) == "x"
