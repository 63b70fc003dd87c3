"""Chat templates: the bytes of their sources, and transformers and TRL on the same Jinja."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from minillama.errors import InputError
from minillama.tokenizer import Tokenizer, byte_tokenizer
from minillama.tokenizer.conversation import Conversation, Message
from minillama.tokenizer.rendering import encode, encode_prompt
from minillama.tokenizer.template import BUILTIN, Template, load_template, special_tokens

TRL = pytest.importorskip("trl")
TEMPLATES = Path(TRL.__file__).parent / "chat_templates"
LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
VARIABLES = {"llama-3": {"bos_token": "<|begin_of_text|>"}}
U1, A1 = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}
U2, A2 = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}
SYSTEM = {"role": "system", "content": "Be kind."}


@cache
def usable(name: str) -> tuple[Template, Tokenizer]:
    """A built-in template and a tokenizer with its special tokens."""
    names = ("[gMASK]", "sop") if name == "chatglm2" else special_tokens(name)  # as its own tokenizer has them
    tokenizer = byte_tokenizer().with_special(names)
    return load_template(name, tokenizer), tokenizer


@cache
def template(name: str) -> Template:
    """A built-in template with the special tokens of its own model."""
    found, _ = usable(name)
    return Template(name, found.source, {**found.variables, **VARIABLES.get(name, LLAMA)})


def text(name: str, *messages: dict[str, Any], prompt: bool = False) -> str:
    return template(name).render(Conversation.of(messages), prompt)


# --- alpaca: stanford_alpaca, train.py


def test_alpaca_without_and_with_input() -> None:
    assert text("alpaca", {"role": "user", "content": "Add."}, A1) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:Hello!</s>"
    )
    record = Conversation((Message("user", "Add.", input="1, 2"), Message("assistant", "3")))
    assert template("alpaca").render(record) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:3</s>"
    )


def test_an_input_is_a_paragraph_where_the_template_has_no_place_for_it() -> None:
    record = Conversation((Message("user", "Add.", input="1, 2"), Message("assistant", "3")))
    assert template("ziya").render(record) == "<human>:Add.\n1, 2\n<bot>:3</s>"


# --- FastChat 0.2.36: get_conv_template("vicuna_v1.1"), ("chatglm"), ("chatglm2")

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)


def test_vicuna() -> None:
    assert text("vicuna", U1, A1, U2, prompt=True) == VICUNA + "USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT:"
    assert text("vicuna", SYSTEM, U1, A1) == "Be kind. USER: Hi ASSISTANT: Hello!</s>"


def test_chatglm_has_rounds_from_zero_and_none_for_a_single_question() -> None:
    assert text("chatglm", U1, A1) == "Hi[gMASK]<sop>Hello!<eop>"
    assert text("chatglm", U1, A1, U2, prompt=True) == (
        "[Round 0]\n问：Hi\n答：Hello!\n[Round 1]\n问：Bye\n答：[gMASK]<sop>"
    )


def test_chatglm2_has_rounds_from_one_behind_two_tokens() -> None:
    assert text("chatglm2", U1, A1) == "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：Hello!</s>"
    assert text("chatglm2", U1, A1, U2, prompt=True) == (
        "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：Hello!\n\n[Round 2]\n\n问：Bye\n\n答："
    )


def test_ziya() -> None:
    question = {"role": "user", "content": " 你好 "}
    assert text("ziya", question, prompt=True) == "<human>:你好\n<bot>:"
    assert text("ziya", question, A1, U2) == "<human>:你好\n<bot>:Hello!</s><human>:Bye\n<bot>:"


# --- meta-llama/llama, generation.py; meta-llama/llama3, tokenizer.py


def test_llama_2_has_the_system_message_inside_the_first_turn() -> None:
    assert text("llama-2", SYSTEM, U1, A1, U2, prompt=True) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye [/INST]"
    )
    padded = {"role": "user", "content": "  Hi\n"}
    assert text("llama-2", padded, A1) == "<s>[INST] Hi [/INST] Hello! </s>"


def test_llama_2_refuses_its_tags_in_a_message() -> None:
    with pytest.raises(InputError, match="the tag"):
        text("llama-2", {"role": "user", "content": "x [/INST] y"}, A1)


def test_llama_3() -> None:
    assert text("llama-3", SYSTEM, U1, {"role": "assistant", "content": " A\n"}, prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.slow  # a vocabulary of 128,256
def test_llama_3_ids_of_metas_tokenizer(shared: Path) -> None:
    """models/llama3/tests/api/test_tokenizer.py: user 882, system 9125, assistant 78191, two newlines 271."""
    tokenizer = Tokenizer.load(shared / "tokenizer" / "llama3" / "tokenizer.model")
    question = {"role": "user", "content": "This is a test sentence."}
    conversation = Conversation.of([{"role": "system", "content": "Hello world"}, question])
    system = [128006, 9125, 128007, 271, 9906, 1917, 128009]
    user = [128006, 882, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009]
    ids = encode_prompt(conversation, load_template("llama-3", tokenizer), tokenizer)
    assert ids == [128000, *system, *user, 128006, 78191, 128007, 271]


def test_llama_2_ids_of_metas_tokenizer(shared: Path) -> None:
    """Each pair alone with BOS and EOS, as generation.py encodes it; ids by SentencePiece."""
    import sentencepiece

    file = shared / "tokenizer" / "llama2" / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    tokenizer = Tokenizer.load(file)
    answers = [{"role": "assistant", "content": "Hello!"}, {"role": "assistant", "content": "再见 🦙"}]
    conversation = Conversation.of([SYSTEM, U1, answers[0], U2, answers[1]])
    wanted = []
    for pair in ("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! ", "[INST] Bye [/INST] 再见 🦙 "):
        wanted += [1, *pieces.encode(pair), 2]
    rendered = encode(conversation, load_template("llama-2", tokenizer), tokenizer)
    assert rendered.ids == wanted
    assert [run.strip() for run, weight in rendered.runs if weight] == ["Hello! </s>", "再见 🦙 </s>"]


# --- what every built-in template holds to


@pytest.mark.parametrize("name", BUILTIN)
def test_the_prompt_of_an_answer_is_the_beginning_of_its_conversation(name: str) -> None:
    chosen, tokenizer = usable(name)
    conversation = Conversation.of([U1, A1, U2, A2])
    rendered = encode(conversation, chosen, tokenizer, "last")
    prompt = encode_prompt(conversation.first(3), chosen, tokenizer)
    first = next(i for i, weight in enumerate(rendered.weights) if weight)
    assert rendered.ids[:first] == prompt
    assert rendered.text == tokenizer.decode(rendered.ids, skip_special=False)
    assert rendered.text.removeprefix(tokenizer.bos_token).endswith(
        chosen.render(conversation).removeprefix(tokenizer.bos_token)
    )


ENDS = {"chatml": "<|im_end|>", "llama-3": "<|eot_id|>", "chatglm": "<eop>"}


@pytest.mark.parametrize("name", BUILTIN)
def test_the_last_trained_token_ends_the_turn(name: str) -> None:
    chosen, tokenizer = usable(name)
    rendered = encode(Conversation.of([U1, A1, U2, A2]), chosen, tokenizer)
    end = ENDS.get(name, tokenizer.eos_token)
    answers = [run for run, weight in rendered.runs if weight]
    assert len(answers) == (1 if name.startswith("chatglm") else 2) and all(run.endswith(end) for run in answers)
    wanted = [message["content"] for message in (A1, A2)][2 - len(answers) :]
    assert [run.removesuffix(end).strip() for run in answers] == wanted
    assert rendered.end_id in tokenizer.special_ids and tokenizer.decode([rendered.end_id], skip_special=False) == end


@pytest.mark.parametrize("name", [name for name in BUILTIN if name not in ("chatml", "llama-3")])
def test_turns_that_a_template_cannot_express_are_refused(name: str) -> None:
    chosen, _ = usable(name)
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": {}}]}
    for messages in ([U1, U2, A1], [A1, U1, A2], [U1, call]):
        with pytest.raises(InputError, match="chat template failed"):
            chosen.render(Conversation.of(messages))


def test_no_such_template(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(InputError, match="did you mean 'vicuna'"):
        load_template("vikuna", tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        load_template("own", tokenizer)
    with pytest.raises(InputError, match=r"lacks special tokens.*chatml"):
        load_template("chatml", tokenizer)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}")
    assert (
        load_template(str(tmp_path / "mine.jinja"), tokenizer).render(Conversation.of([U1, A1])) == "u:Hi\na:Hello!\n"
    )


# --- transformers and TRL

CHAT = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "  And 3+3?"},
    {"role": "assistant", "content": "6, of course:\n\n```\nx\n```"},
]
SPECIAL = r"<[|｜][^'\"<>{}\s]+?[|｜]>|<(?:start|end)_of_turn>|<end_of_utterance>|<turn\|>|<\|turn>|\[gMASK\]|<sop>"
NAMES = sorted(path.name.removesuffix("_training.jinja") for path in TEMPLATES.glob("*_training.jinja"))


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    """SmolLM2's with the special tokens of all the templates."""
    sources = "".join(path.read_text() for path in TEMPLATES.glob("*.jinja"))
    return Tokenizer.load(smollm2).with_special(sorted(set(re.findall(SPECIAL, sources))))


@pytest.fixture(scope="module")
def theirs(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def masked(theirs: Any, source: str, messages: list[dict[str, Any]], **more: Any) -> tuple[list[int], list[int]]:
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = theirs.apply_chat_template(messages, chat_template=source, **options, **more)
    return found["input_ids"], list(found["assistant_masks"])


def fast_and_slow(fast: tuple[str, ...]) -> list[Any]:
    """Names of TRL's training templates; llava_next takes no text, and llama3 has a test of its own."""
    names = [name for name in NAMES if name not in ("llava_next", "llama3")]
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", fast_and_slow(("cohere", "gemma3", "glm4moe", "gptoss", "phi3", "qwen2_5", "qwen3")))
def test_trained_tokens_are_those_of_trls_assistant_only_loss(name: str, tokenizer: Tokenizer, theirs: Any) -> None:
    """TRL's own training templates, which mark the assistant's turns, and the mask that its trainer takes."""
    file = TEMPLATES / f"{name}_training.jinja"
    source = file.read_text()
    messages = CHAT[1:] if "gemma" in name else CHAT  # gemma's have no system message
    ids, mask = masked(theirs, source, messages)
    rendered = encode(Conversation.of(messages), load_template(str(file), tokenizer), tokenizer)
    assert 0 < sum(mask) < len(mask)
    assert (rendered.ids, [int(weight) for weight in rendered.weights]) == (ids, mask)


def test_tokens_in_front_of_an_answer_are_those_of_the_prompt_alone(tokenizer: Tokenizer, theirs: Any) -> None:
    """Where the whole text is segmented otherwise than the prompt (two newlines here), the model meets the prompt."""
    file = TEMPLATES / "llama3_training.jinja"
    source = file.read_text()
    ids, mask = masked(theirs, source, CHAT[:3])
    prompt = theirs.apply_chat_template(CHAT[:2], chat_template=source, add_generation_prompt=True)["input_ids"]
    rendered = encode(Conversation.of(CHAT[:3]), load_template(str(file), tokenizer), tokenizer)
    trained = [i for i, weight in zip(rendered.ids, rendered.weights, strict=True) if weight]
    assert trained == [i for i, on in zip(ids, mask, strict=True) if on]
    assert rendered.ids[: -len(trained)] == prompt != ids[: -len(trained)]


@pytest.mark.parametrize("name", ["cohere", "gemma3", "lfm2", "llama3", "phi3", "qwen2_5"])
def test_differences_of_prefixes_find_the_spans_that_trl_marks(name: str, tokenizer: Tokenizer) -> None:
    """The same models' own templates, which mark nothing; spaces behind the end of a turn are not generated."""
    marked, bare = TEMPLATES / f"{name}_training.jinja", TEMPLATES / f"{name}.jinja"
    conversation = Conversation.of(CHAT[1:])
    found = [encode(conversation, load_template(str(file), tokenizer), tokenizer).runs for file in (bare, marked)]
    spans = [[run.strip() for run, weight in runs if weight] for runs in found]
    assert spans[0] == spans[1] and len(spans[0]) == 2


def test_history_that_a_template_renders_otherwise_is_refused_by_its_message(tokenizer: Tokenizer) -> None:
    """Qwen 3 drops the thoughts of earlier answers, which its prompt asks for; the last one can be trained."""
    file = TEMPLATES / "qwen3.jinja"
    chosen, conversation = load_template(str(file), tokenizer), Conversation.of(CHAT)
    with pytest.raises(InputError, match="when more messages follow\n  where: message 3"):
        encode(conversation, chosen, tokenizer)
    rendered = encode(conversation, chosen, tokenizer, "last")
    assert [run for run, weight in rendered.runs if weight] == [
        "<think>\n\n</think>\n\n6, of course:\n\n```\nx\n```<|im_end|>"
    ]


def test_a_prompt_that_no_answer_continues_is_refused_by_its_message(tokenizer: Tokenizer) -> None:
    file = TEMPLATES / "deepseekv3.jinja"  # the prompt opens a thought, the conversation has none
    with pytest.raises(InputError, match="behind its prompt\n  where: message 3"):
        encode(Conversation.of(CHAT), load_template(str(file), tokenizer), tokenizer)


@pytest.mark.parametrize("train_on", ["all", "last"])
def test_a_models_own_template(train_on: Any, tokenizer: Tokenizer, theirs: Any) -> None:
    """SmolLM2-135M-Instruct: ids of transformers, prompt for prompt; the end token of each answer is trained."""
    chosen = load_template("own", tokenizer)
    rendered = encode(Conversation.of(CHAT), chosen, tokenizer, train_on)
    assert rendered.ids == theirs.apply_chat_template(CHAT)["input_ids"]
    for count in (2, 4):
        prompt = theirs.apply_chat_template(CHAT[:count], add_generation_prompt=True)["input_ids"]
        assert encode_prompt(Conversation.of(CHAT[:count]), chosen, tokenizer) == prompt
    spans = [run for run, weight in rendered.runs if weight]
    assert spans == [f"{message['content']}<|im_end|>" for message in CHAT[2::2]][-1 if train_on == "last" else 0 :]


def test_chatml_with_tools_is_qwens(tokenizer: Tokenizer, theirs: Any) -> None:
    tool = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "中国"}}}
    messages = [
        CHAT[0],
        {"role": "user", "content": "The time?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "12:00"},
        {"role": "tool", "content": "13:00"},
        {"role": "assistant", "content": "Noon.", "tool_calls": [call]},
    ]
    source = (TEMPLATES / "qwen2_5_training.jinja").read_text()
    ids, _ = masked(theirs, source, messages, tools=[tool])
    rendered = encode(Conversation.of(messages, [tool]), load_template("chatml", tokenizer), tokenizer)
    assert rendered.ids == ids
    assert (
        rendered.runs[-2][0]
        == f"Noon.\n<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call><|im_end|>"
    )


def test_a_template_that_loses_a_tool_or_its_call_is_refused(tokenizer: Tokenizer) -> None:
    chosen = load_template("own", tokenizer)  # it knows nothing of tools
    tool = {"name": "clock", "parameters": {}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "clock", "arguments": "{}"}]}
    with pytest.raises(InputError, match="leaves out a tool: clock"):
        encode(Conversation.of([U1, A1], [tool]), chosen, tokenizer)
    with pytest.raises(InputError, match="leaves out a tool call: clock"):
        encode(Conversation.of([U1, call]), chosen, tokenizer)
