"""Chat prompts: messages as token ids, by the model's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from minillama.errors import InputError
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.conversation import Conversation, Message
from minillama.tokenizer.rendering import encode, encode_prompt
from minillama.tokenizer.template import load_template

Messages = Sequence[Mapping[str, Any]]
Prompt = str | Sequence[int] | Tensor | Messages


class ChatPrompts:
    """Encoder of chat prompts.

    Args:
        tokenizer: the model's.
        template: chat template; the tokenizer's own unless given.
        system: system message in front of every conversation that has none.

    Raises:
        InputError: no such template, or the tokenizer has none.
    """

    def __init__(self, tokenizer: Tokenizer, template: str = "", system: str = "") -> None:
        self.tokenizer, self.template = tokenizer, load_template(template, tokenizer)
        self.system = (Message("system", system),) if system else ()
        probe = encode(Conversation((Message("user", "a"), Message("assistant", "b"))), self.template, tokenizer)
        self.stop_ids = frozenset([probe.end_id]) & tokenizer.special_ids
        """The special token that ends an answer of this template, if one does."""
        self.lead = next(text for text, weight in probe.runs if weight).partition("b")[0]
        """What the template writes in front of an answer and the model generates, as Vicuna's space."""

    def __call__(self, prompt: str | Messages) -> list[int]:
        """Token ids of a question, or of messages, up to the answer that is to be written.

        Raises:
            InputError: messages that are none, or that the template refuses.
        """
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.encode(Conversation.of(given).messages)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of messages up to the answer that is to be written."""
        has_system = bool(messages) and messages[0].role == "system"
        messages = (*(() if has_system else self.system), *messages)
        return encode_prompt(Conversation(tuple(messages)), self.template, self.tokenizer)

    def answer(self, text: str) -> Message:
        """Message of a generated text, which rendered again gives what the model wrote, and not two spaces for one."""
        return Message("assistant", text.removeprefix(self.lead))


def is_messages(prompt: object) -> bool:
    """Whether a prompt is a list of messages, not a text or token ids."""
    return not isinstance(prompt, str) and isinstance(prompt, Sequence) and isinstance(next(iter(prompt), 0), Mapping)


def chat_ids(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], chat: bool | ChatPrompts
) -> tuple[list[str | Sequence[int]], ChatPrompts | None]:
    """Prompts of which messages, and with `chat` texts as well, are encoded by the chat template; and their encoder.

    Raises:
        InputError: one is to be, and the tokenizer has no template.
    """
    questions = chat if isinstance(chat, ChatPrompts) else None
    found: list[str | Sequence[int]] = []
    for number, prompt in enumerate(prompts, 1):
        if not (is_messages(prompt) or (chat and isinstance(prompt, str))):
            found.append(prompt)  # type: ignore[arg-type]
            continue
        questions = questions or ChatPrompts(tokenizer)
        try:
            found.append(questions(prompt))  # type: ignore[arg-type]
        except InputError as error:
            raise error.at(", ".join(filter(None, (f"prompt {number}", str(error.where or ""))))) from None
    return found, questions


def why_empty(reason: str | None) -> str:
    """Explanation of a completion without text."""
    if reason == "eos":
        return "the model ended its answer at once"
    return "the model wrote no text" if reason == "length" else "a stop string came first"
