"""Conversations of real files of every format; records that cannot be read, by file and record."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from minillama.data.conversations import conversations, read_record
from minillama.data.reading import Record, read_records
from minillama.data.skipped import BadText, Skipped
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.tokenizer.conversation import Conversation, Message


def read(path: Path, **more: Any) -> list[Conversation]:
    return list(conversations(Source(path=str(path)), **more))


def one(fields: dict[str, Any], **more: Any) -> Conversation:
    return read_record(Record(fields, "r.jsonl:1"), **more)[0]


def pairs(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.full_content) for message in conversation.messages]


@pytest.mark.parametrize(
    ("name", "count", "messages", "last"),
    [
        ("alpaca_en_demo.json", 999, 1998, ", record 999"),
        ("alpaca_zh_demo.json", 1000, 2000, ", record 1000"),
        ("alpaca_fixture.json", 23, 46, ", record 23"),
        ("identity.json", 91, 182, ", record 91"),
        ("dolly_fixture.json", 12, 24, ", record 12"),
        ("dolly_hhrlhf_train_small.jsonl", 1000, 2000, ":1000"),
        ("sharegpt_dummy_conversation.json", 500, 2000, ", record 500"),
        ("messages_v1_sft_demo.jsonl", 500, 1000, ":500"),
        ("glaive_toolcall_en_demo.json", 300, 1914, ", record 300"),
        ("seed_tasks.jsonl", 175, 350, ":175"),
        ("belle_zh_seed_tasks.json", 175, 350, ":175"),  # JSON lines in spite of its name
    ],
)
def test_real_files(name: str, count: int, messages: int, last: str, shared: Path) -> None:
    """The counts are those of shared/data/README.md."""
    found = read(shared / "sft" / name)
    assert len(found) == count
    assert sum(len(conversation.messages) for conversation in found) == messages
    assert found[-1].where.endswith(name + last)


def test_every_turn_of_sharegpt_in_its_order(shared: Path) -> None:
    file = shared / "sft" / "sharegpt_dummy_conversation.json"
    names = {"human": "user", "gpt": "assistant"}
    turns = [[(names[t["from"]], t["value"]) for t in r["conversations"]] for r in json.loads(file.read_text())]
    assert [pairs(conversation) for conversation in read(file)] == turns


def test_weights_and_parts_of_messages(shared: Path) -> None:
    first = read(shared / "sft" / "messages_v1_sft_demo.jsonl")[0]
    assert [(m.role, m.weight, m.loss_weight) for m in first.messages] == [("user", 0, 0), ("assistant", 1, 1)]
    assert first.messages[0].content == "hi"


def test_tool_calls(shared: Path) -> None:
    found = read(shared / "sft" / "glaive_toolcall_en_demo.json")
    roles = Counter(message.role for conversation in found for message in conversation.messages)
    assert roles == {"user": 746, "assistant": 746 + 211, "tool": 211}
    assert sum(bool(conversation.tools) for conversation in found) == 191
    call = {"name": "search_recipes", "arguments": {"ingredients": ["chicken", "bell peppers", "rice"]}}
    assert found[0].messages[3] == Message("assistant", "", tool_calls=({"type": "function", "function": call},))
    tool = found[0].tools[0]
    assert tool["type"] == "function" and tool["function"]["name"] == "search_recipes"


# --- each format in small


def test_an_input_is_kept_apart() -> None:
    found = one({"instruction": "Add.", "input": "1, 2", "output": "3", "text": "whole"})
    assert found.messages == (Message("user", "Add.", input="1, 2"), Message("assistant", "3"))
    assert one({"instruction": "Add.", "context": "1, 2", "response": "3"}).messages == found.messages
    assert one({"instruction": "Hi", "input": None, "output": "Ho"}).messages[0].input == ""


def test_alpaca_with_a_history_and_a_system_message() -> None:
    fields = {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]}
    assert pairs(one(fields)) == [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def test_a_task_has_as_many_conversations_as_instances() -> None:
    fields = {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"input": "", "output": "4"}]}
    found = read_record(Record(fields, "x"))
    assert [pairs(conversation)[0][1] for conversation in found] == ["Add.\n1", "Add."]


def test_prompts_and_completions_may_be_messages() -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    wanted = [("user", "a"), ("assistant", "b")]
    assert pairs(one({"prompt": [user], "completion": [answer]})) == wanted
    assert pairs(one({"prompt": "a", "completion": "b"})) == wanted == pairs(one({"prompt": "a", "response": "b"}))
    assert pairs(one({"conversations": [user, answer]})) == wanted
    assert pairs(one({"messages": [user, answer], "prompt": "a", "prompt_id": "7"})) == wanted


def test_an_answer_in_front_of_every_question_is_left_out_and_noted() -> None:
    """FastChat skips it: it is the rest of a conversation that was split."""
    turns = [("system", "s"), ("gpt", "and so on"), ("human", "Hi"), ("gpt", "Ho")]
    report = Skipped()
    found = one({"conversations": [{"from": role, "value": value} for role, value in turns]}, report=report)
    assert pairs(found) == [("system", "s"), ("user", "Hi"), ("assistant", "Ho")]
    assert str(report) == "1 conversation without the answer in front of their first question"


# --- what cannot be read

U, A = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"text": "plain"}, "known format.*found: fields 'text'.*expected: messages"),
        ({"instruction": "a", "output": 3}, "'output' is not a string"),
        ({"instruction": "a", "output": "  "}, "the answer is empty"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "the input is not a string"),
        ({"instruction": "a", "instances": []}, "'instances' is not a list"),
        ({"messages": [U]}, "nothing in it is of the assistant"),
        ({"messages": [U, {**A, "content": ""}]}, "nothing in it is of the assistant"),
        ({"messages": [U, "x"]}, "'messages' is not a list of objects"),
        ({"messages": [U, {"role": "assistant"}]}, "has no content, in message 2"),
        ({"messages": [U, {**A, "loss_weight": "high"}]}, "weight of a message, in message 2"),
        ({"conversations": [{"from": "human", "value": 1}]}, "not a turn, in message 1"),
        ({"conversations": [{"from": "wizard", "value": "x"}]}, "unknown role, in message 1"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "function_call is not JSON, in message 1"),
        ({"messages": [U, A], "tools": "["}, "tools is not JSON"),
        ({"messages": [U, A], "tools": [{}]}, "not a tool"),
        ({"prompt": "a", "response": "b\ud800"}, "not valid Unicode"),
        ({"prompt": "a", "response": "b\0"}, "NUL"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_with_what_was_expected(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(BadText, match=f"(?s){what}") as caught:
        read_record(Record(fields, "r.jsonl:7"))
    assert caught.value.where == "r.jsonl:7"
    assert caught.value.expected or caught.value.found or caught.value.reason == "NUL"


def test_a_backslash_before_u0000_is_text() -> None:
    assert one({"prompt": "\\u0000", "response": "\\\\u0000"}).messages[0].content == "\\u0000"


def test_a_named_format_is_the_only_one() -> None:
    assert one({"instruction": "a", "output": "b"}, format="alpaca").messages
    with pytest.raises(BadText, match=r"(?s)'prompt' is not a string.*expected: prompt, response"):
        one({"instruction": "a", "output": "b"}, format="pairs")


def test_the_rest_goes_on_or_stops(tmp_path: Path) -> None:
    good = {"prompt": "a", "response": "b"}
    file = tmp_path / "r.jsonl"
    file.write_text(f'{json.dumps(good)}\n{{"x": 1}}\nnot json\n{json.dumps(good)}\n', encoding="utf-8")
    with pytest.raises(InputError, match=rf"(?s)known format.*{file}:2"):
        read(file)
    report = Skipped()
    assert [found.where for found in read(file, on_error="skip", report=report)] == [f"{file}:1", f"{file}:4"]
    assert report.counts == {"no conversation": 1, "malformed JSON": 1}
    assert report.locations == [f"{file}:2", f"{file}:3"]


# --- files of JSON


def values(path: Path) -> list[Any]:
    return [item.value if isinstance(item, Record) else str(item.what) for item in read_records(path)]


RECORDS = [{"a": 1}, {"b": "x\u2028y"}, {}]


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.ndjson"])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2, ensure_ascii=False),
        "\n\n  " + json.dumps(RECORDS) + "\n\n",
        "[\n" + ",\n".join(map(json.dumps, RECORDS)) + "\n]\n",
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS),
        "\n" + "\r\n\r\n".join(map(json.dumps, RECORDS)),
    ],
)
def test_arrays_and_lines_by_their_content(name: str, text: str, tmp_path: Path) -> None:
    for data in (text.encode(), b"\xef\xbb\xbf" + text.encode()):
        (tmp_path / name).write_bytes(data)
        assert values(tmp_path / name) == RECORDS


def test_compressed_arrays(tmp_path: Path) -> None:
    data = json.dumps(RECORDS).encode()
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(data))
    (tmp_path / "r.json.zst").write_bytes(zstandard.compress(data))
    assert values(tmp_path / "r.json.gz") == values(tmp_path / "r.json.zst") == RECORDS
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(data)[:-9])
    assert values(tmp_path / "r.json.gz") == ["this compressed file is damaged or truncated"]


def test_an_object_of_several_lines(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps({"a": [1, {"b": 2}]}, indent=1))
    assert values(tmp_path / "r.json") == [{"a": [1, {"b": 2}]}]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"a": 1}, 3, {"b": 2}]', [{"a": 1}, "this record is not a JSON object", {"b": 2}]),
        ('[{"a": 1}, {"b": ', [{"a": 1}, "the file is not JSON from here on"]),
        ('[{"a": 1},\n', [{"a": 1}, "the file's array does not end with it"]),
        ('[{"a": 1}] x', [{"a": 1}, "the file's array does not end with it"]),
        ("[]", []),
        ("", []),
        ("nonsense\n", ["this line is not JSON"]),
    ],
)
def test_a_damaged_array_loses_no_record_silently(text: str, wanted: list[Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    assert values(tmp_path / "r.json") == wanted


def test_a_damaged_line_of_jsonl_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('[1, 2\n{"a": 1}\n{"b": \n[3]\n')
    wanted = ["this line is not JSON", {"a": 1}, "this line is not JSON", "this line is not a JSON object"]
    assert values(tmp_path / "r.jsonl") == wanted


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    """A file larger than memory: nothing behind the first record has been looked at."""
    good = json.dumps({"prompt": "a", "response": "b"})
    (tmp_path / "r.jsonl").write_text(f"{good}\n" * 20_000 + "broken\n")
    stream = conversations(Source(path=str(tmp_path / "r.jsonl")))
    assert next(stream).where.endswith(":1")


def test_a_folder_gives_its_files_of_records(tmp_path: Path) -> None:
    for name in ("b.json", "a.jsonl", "c.ndjson", "d.txt"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "response": "b"}) + "\n")
    assert [found.messages[0].content for found in read(tmp_path)] == ["a.jsonl", "b.json", "c.ndjson"]
