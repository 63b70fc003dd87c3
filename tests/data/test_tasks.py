"""Checkable tasks: pure functions of (seed, index), without repetition, as sources of conversations."""

from __future__ import annotations

import pytest

from minillama.data.conversations import conversations
from minillama.data.sources import Source, documents, records
from minillama.data.tasks import MOST, Task, is_right
from minillama.errors import InputError


@pytest.mark.parametrize("name", ["arithmetic", "arithmetic:1", "sorting:3", "spelling:1", "spelling"])
def test_questions_are_different_and_repeat_by_seed_and_index(name: str) -> None:
    task = Task.of(name)
    assert task is not None
    first = [*task.questions(3, range(min(task.count, 2000)))]
    assert len({question for question, _ in first}) == len(first)
    assert [*task.questions(3, [7, 1])] == [first[7], first[1]]
    assert [*task.questions(4, range(20))] != first[:20]


def test_each_answer_is_right() -> None:
    for record in records(Source("arithmetic:2")):
        a, b = record.value["prompt"].rstrip("=").split("+")
        assert len(a) == len(b) == 2 and record.value["response"] == str(int(a) + int(b))
    assert len([*records(Source("arithmetic"))]) == 90 * 90
    assert len([*records(Source("sorting"))]) == MOST
    [(question, answer), *_] = Task("sorting", 5).questions(0, [0])
    assert len(question) == 6 and [*answer] == sorted(question[:5])
    [(question, answer), *_] = Task("spelling", 2).questions(0, [0])
    assert answer.replace(" ", "") + ":" == question and len(answer) == 7


def test_they_are_conversations_and_no_text() -> None:
    first = next(conversations(Source("sorting:2")))
    assert [m.role for m in first.messages] == ["user", "assistant"] and first.where == "sorting:2, question 0"
    with pytest.raises(InputError, match="conversations, not texts"):
        next(documents(Source("spelling")))
    with pytest.raises(InputError, match="size of the task sorting"):
        next(records(Source("sorting:x")))
    with pytest.raises(InputError, match="did you mean 'arithmetic'"):
        next(records(Source("aritmetic")))


def test_an_answer_is_right_but_for_spaces() -> None:
    assert is_right(" 85\n", "85") and not is_right("085", "85") and not is_right("85 or 86", "85")
