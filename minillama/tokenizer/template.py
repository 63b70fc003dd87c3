"""Chat templates: the built-in ones, a file of one's own, and that of a tokenizer; all of them Jinja.

`{% generation %}` encloses what the assistant writes, up to the token that ends its turn: the trained span. The
built-in templates are the files of the folder `templates`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

from minillama.errors import InputError
from minillama.files import read_text
from minillama.tokenizer.chat import ChatTemplate
from minillama.tokenizer.conversation import Conversation
from minillama.tokenizer.tokenizer import Tokenizer

OWN = "own"
"""Name of the template that comes with the tokenizer."""

_FOLDER = Path(__file__).with_name("templates")
_GLM = ("[gMASK]", "<sop>", "<eop>")
# special tokens that each template writes, besides BOS and EOS
_SPECIAL: Mapping[str, tuple[str, ...]] = {
    "alpaca": (),
    "chatglm": _GLM,
    "chatglm2": _GLM[:2],
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama-2": (),
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "plain": (),
    "vicuna": (),
    "ziya": (),
}
BUILTIN = tuple(_SPECIAL)
_WITH_ROLES = ("chatml", "llama-3")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
# GLM's tokenizers have these names with or without brackets
_BARE = {"<sop>": "sop", "<eop>": "eop"}


@dataclass(frozen=True)
class Template:
    """Chat template.

    Args:
        name: for messages.
        source: Jinja.
        variables: of the template besides the conversation, such as `bos_token`.
        tool_use: Jinja for conversations with tools, where it is another.
    """

    name: str
    source: str
    variables: Mapping[str, str] = field(default_factory=dict)
    tool_use: str = ""

    @property
    def begins(self) -> bool:
        """Whether a sequence begins with BOS where the tokenizer adds one; GLM's have tokens of their own."""
        return _GLM[0] not in self.source

    def marks_answers(self, conversation: Conversation) -> bool:
        """Whether `{% generation %}` encloses the answers of a conversation."""
        return _GENERATION.search(self.source_for(conversation)) is not None

    def source_for(self, conversation: Conversation) -> str:
        """The Jinja of a conversation, with tools or without.

        Raises:
            InputError: there is a template for tools alone.
        """
        source = self.tool_use if self.tool_use and conversation.tools else self.source
        if not source:
            what, found = "this template is for conversations with tools", f"template {self.name}"
            raise InputError(what, where=conversation.where or None, found=found, fix="name another template")
        return source

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Encode a conversation with `encode` or `encode_prompt` instead of its text: in a text, the name of a special
        token in a user's message is not to be told from the template's own.

        Raises:
            InputError: the template refuses the conversation, or fails; see `ChatTemplate`.
        """
        messages = [message.for_template() for message in conversation.messages]
        return self.renderings(conversation, messages, [(len(messages), add_generation_prompt)])[0]

    def renderings(
        self,
        conversation: Conversation,
        messages: Sequence[Mapping[str, Any]],
        prefixes: Sequence[tuple[int, bool]],
        mark: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """Renderings of prefixes of a conversation, see `ChatTemplate.renderings`."""
        tools, source = conversation.tools if tools is None else tools, self.source_for(conversation)
        chat = self._chats.setdefault(source, ChatTemplate(source, self.variables))
        try:
            return chat.renderings(messages, prefixes, mark, tools=list(tools) or None)
        except InputError as error:
            what = f"{error.what}: template {self.name}"
            others = "another template, such as chatml or own; or leave such records out: --data.on_error skip"
            fix = others if tools else error.fix
            raise InputError(what, where=conversation.where or None, found=error.found, fix=fix) from None

    @cached_property
    def _chats(self) -> dict[str, ChatTemplate]:
        return {}


def special_tokens(name: str) -> tuple[str, ...]:
    """Special tokens that a built-in template needs, besides BOS and EOS; none for others."""
    return _SPECIAL.get(name, ())


def load_template(name: str, tokenizer: Tokenizer) -> Template:
    """Chat template for a tokenizer.

    Args:
        name: one of `BUILTIN`; `own` or nothing for the tokenizer's; or the path of a Jinja file.
        tokenizer: its special tokens are variables of the template.

    Raises:
        InputError: no such template, or the tokenizer lacks special tokens that it needs.
    """
    variables = tokenizer.template_variables
    if name in ("", OWN):
        templates = tokenizer.chat_templates
        if not templates.keys() & {"default", "tool_use"}:
            what, expected = tokenizer.no_chat_template().what, f"{', '.join(BUILTIN)}, or a Jinja file"
            raise InputError(
                what,
                where="template",
                expected=expected,
                fix="name one of them: --template, of a run --data.template; a base model continues text without",
            )
        return Template(OWN, templates.get("default", ""), variables, templates.get("tool_use", ""))
    if name in BUILTIN:
        _check_special(name, tokenizer)
        return Template(name, _source(name, tokenizer), variables)
    if not Path(name).is_file():
        near = get_close_matches(name, BUILTIN, n=1)
        raise InputError(
            "no such template",
            where="template",
            found=name,
            expected=f"{', '.join(BUILTIN)}, {OWN} for the tokenizer's, or the path of a Jinja file",
            fix=f"did you mean {near[0]!r}?" if near else None,
        )
    return Template(name, read_text(Path(name)), variables)


def _source(name: str, tokenizer: Tokenizer) -> str:
    """Jinja of a built-in template, which reads no other variables than those of every tokenizer."""
    source, is_special = read_text(_FOLDER / f"{name}.jinja"), tokenizer.special.names.fullmatch
    for full, bare in _BARE.items():
        if is_special(bare) and not is_special(full):
            source = source.replace(full, bare)
    return source if name in _WITH_ROLES else read_text(_FOLDER / "turns.jinja") + source


def _check_special(name: str, tokenizer: Tokenizer) -> None:
    known = tokenizer.special.names
    missing = [token for token in _SPECIAL[name] if not known.fullmatch(token)]
    missing = [token for token in missing if not known.fullmatch(_BARE.get(token, token))]
    if missing:
        raise InputError(
            f"the tokenizer lacks special tokens of the template {name}",
            where="template",
            found=f"no {', '.join(missing)}",
            expected="a tokenizer with them",
            fix="choose a template of plain text such as alpaca or vicuna, or add the tokens",
        )
