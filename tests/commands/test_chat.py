"""Questions to chat models: `generate --chat`, messages in Python, and the conversation in the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.inference.chat import ChatPrompts
from minillama.inference.generate import Chunk, generate
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer, byte_tokenizer
from minillama.tokenizer.conversation import Conversation, Message
from minillama.tokenizer.rendering import encode
from minillama.tokenizer.template import BUILTIN, load_template, special_tokens

transformers = pytest.importorskip("transformers")
GREEDY = Sampling(temperature=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random chat model of ChatML."""
    tokenizer = byte_tokenizer().with_special(special_tokens("chatml"))
    tokenizer = tokenizer.with_chat_template(load_template("chatml", tokenizer).source)
    config = ModelConfig(dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=tokenizer.vocab_size, max_seq_len=256)
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_messages_texts_and_ids_are_prompts(folder: Path) -> None:
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello <|im_end|>"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
    ]
    plain = [message if "<" not in message["content"] else {**message, "content": "Hello"} for message in messages]
    ids = ChatPrompts(tokenizer)(plain)
    # the tokenizer begins every sequence with BOS, which this template does not write
    assert ids == [tokenizer.bos_id, *theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)]
    assert ChatPrompts(tokenizer, system="Be brief.")(plain[1:]) == ids
    end = tokenizer.backend.token_to_id("<|im_end|>")
    assert ChatPrompts(tokenizer)(messages).count(end) == 4  # not that in the user's text
    with_messages, with_ids = generate(model, tokenizer, [plain, ids], 8, GREEDY)
    assert with_messages.tokens == with_ids.tokens
    question, raw = (generate(model, tokenizer, ["And?"], 8, GREEDY, chat=chat)[0] for chat in (True, False))
    asked = generate(model, tokenizer, [[{"role": "user", "content": "And?"}]], 8, GREEDY)[0]
    assert question.tokens == asked.tokens != raw.tokens


def test_a_chat_model_answers_and_raw_continues(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(folder), "--prompt", "And?", "--max-new-tokens", "8", "--temperature", "0"]
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    for more, chat in (([], True), (["--chat"], True), (["--raw"], False)):
        assert main([*words, *more]) == 0
        found = capsys.readouterr()
        assert found.out == generate(model, tokenizer, ["And?"], 8, GREEDY, chat=chat)[0].text
        assert ("--raw" in found.err) is not bool(more)
    assert main([*words, "--raw", "--system", "x"]) == 1
    assert "--raw continues texts" in capsys.readouterr().err


def test_special_tokens_of_raw_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    words = ["generate", "--model", str(folder), "--prompt", text, "--max-new-tokens", "8", "--temperature", "0"]
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    plain, asked = (
        generate(model, tokenizer, ["And?" if chat else text], 8, GREEDY, chat=chat)[0].text for chat in (False, True)
    )
    assert plain != asked
    assert main([*words, "--raw"]) == 0
    found = capsys.readouterr()
    assert found.out == plain and "prompt 1: '<|im_start|>' is plain text; --special" in found.err
    assert main([*words, "--raw", "--special"]) == 0
    found = capsys.readouterr()
    assert found.out == asked and "plain text" not in found.err
    words[words.index(text)] = tokenizer.bos_token + text  # BOS once
    assert main([*words, "--raw", "--special"]) == 0 and capsys.readouterr().out == asked
    assert main([*words, "--special"]) == 1 and "add --raw" in capsys.readouterr().err


def test_the_models_own_sampling_unless_some_is_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_k": 1, "temperature": 0.6}')  # greedy
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    greedy, sampled = (
        generate(model, tokenizer, ["And?"], 8, sampling, chat=True)[0].text
        for sampling in (GREEDY, Sampling(temperature=0.7, seed=3))
    )
    words = ["generate", "--model", str(folder), "--prompt", "And?", "--max-new-tokens", "8", "--seed", "3"]
    assert main(words) == 0
    found = capsys.readouterr()
    assert found.out == greedy and "--temperature 0.6 --top-k 1; any" in found.err
    assert main([*words, "--temperature", "0.7"]) == 0
    found = capsys.readouterr()
    assert found.out == sampled != greedy and "--top-k" not in found.err
    monkeypatch.setattr("sys.stdin", io.StringIO("And?\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "8", "--seed", "3"]) == 0
    assert capsys.readouterr().out == f"{greedy}\n"
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_p": 7}')
    assert main(words) == 1 and "top_p" in capsys.readouterr().err


def test_records_of_messages_are_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}
    records = [{"prompt": [system, user]}, {"messages": [user]}, {"prompt": "And?"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["generate", "--model", str(folder), "--prompts", str(tmp_path / "p.jsonl"), "--temperature", "0"]
    assert main([*words, "--max-new-tokens", "8"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    completions = generate(model, tokenizer, [[system, user], [user], "And?"], 8, GREEDY, chat=True)
    assert [line["completion"] for line in lines] == [completion.text for completion in completions]
    assert [line["prompt"] for line in lines] == [[system, user], [user], "And?"]
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "wizard", "content": "x"}]}\n')
    assert main(words) == 1 and "unknown role" in capsys.readouterr().err


def test_a_base_model_has_no_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    byte_tokenizer().save(folder)
    words = ["generate", "--model", str(folder), "--prompt", "And?", "--max-new-tokens", "2"]
    assert main(words) == 0 and "--raw" not in capsys.readouterr().err
    assert main([*words, "--chat"]) == 1 and "no chat template" in capsys.readouterr().err
    assert main([*words, "--template", "vicuna"]) == 0
    capsys.readouterr()
    assert main(["chat", str(folder)]) == 1
    fix = "do: name one with --template, as vicuna; a base model answers to `minillama generate`"
    assert fix in capsys.readouterr().err


def test_an_empty_answer_says_why(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    first = generate(model, tokenizer, ["And?"], 1, GREEDY, chat=True)[0].tokens[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [first]}))
    assert main(["generate", "--model", str(folder), "--prompt", "And?", "--temperature", "0"]) == 0
    found = capsys.readouterr()
    assert found.out == "" and "no text, the model ended its answer at once" in found.err


def test_a_conversation_in_the_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "chat.json"
    lines = [
        "One?",
        "Two?",
        "/regenerate",
        f"/save {saved}",
        "/system Be brief.",
        "Three?",
        f"/load {saved}",
        "/what",
        "",
    ]
    words = ["chat", str(folder), "--max-new-tokens", "4", "--temperature", "0"]
    monkeypatch.setattr(
        "sys.stdin",
        io.StringIO("\n".join([*lines, "/load nowhere", f"/load {folder / 'config.json'}", "/quit", "never read"])),
    )
    assert main(words) == 0
    found = capsys.readouterr()
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in messages[::2]] == ["One?", "Two?"]
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    first = generate(model, tokenizer, ["One?"], 4, GREEDY, chat=True)[0].text
    second = generate(model, tokenizer, [messages[:3]], 4, GREEDY)[0].text
    brief = generate(model, tokenizer, [ChatPrompts(tokenizer, system="Be brief.")("Three?")], 4, GREEDY)[0].text
    assert [messages[1]["content"], messages[3]["content"]] == [first, second]
    shown = f"{first}\n{second}\n{second}\n{brief}\n> One?\n{first}\n> Two?\n{second}\n"
    assert found.out == shown
    assert "unknown command /what" in found.err and "not a saved conversation" in found.err
    assert "cannot read nowhere: No such file or directory\n  where: nowhere" in found.err


@pytest.mark.parametrize("name", BUILTIN)
def test_an_answer_goes_into_the_history_as_it_was_generated(name: str) -> None:
    """Vicuna's begins with a space that the template writes: the next prompt has one space, as in training."""
    tokenizer = byte_tokenizer().with_special(special_tokens(name))
    prompts = ChatPrompts(tokenizer, name)
    asked = [Message("user", "One?")]
    rendered = encode(Conversation((*asked, Message("assistant", " 1.\n"))), prompts.template, tokenizer)
    prompt = prompts.encode(asked)
    written = [i for i, weight in zip(rendered.ids, rendered.weights, strict=True) if weight]
    answer = prompts.answer(tokenizer.decode(written))
    assert not answer.content.startswith("  ") and answer.content.strip() == "1."
    history = prompts.encode([*asked, answer, Message("user", "Two?")])
    if not name.startswith("chatglm"):  # earlier rounds are written otherwise there
        assert history[: len(prompt) + len(written)] == prompt + written


def test_a_saved_answer_has_no_space_of_the_template_and_reset_forgets(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minillama.inference import generate as module

    monkeypatch.setattr(module, "stream", lambda *args: iter([Chunk(0, " Fine.", (1,)), Chunk(0, "", (2,), "eos")]))
    saved = tmp_path / "chat.json"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"One?\n/reset\n/regenerate\nTwo?\n/save {saved}\n"))
    assert main(["chat", str(folder), "--template", "vicuna"]) == 0
    messages = json.loads(saved.read_text())["messages"]
    assert [message["content"] for message in messages] == ["Two?", "Fine."]
    assert "there is no answer to a question yet" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_not_the_chat(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minillama.inference import generate as module

    real, calls = module.stream, []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(args)
        chunks = real(*args, **options)  # type: ignore[arg-type]
        yield next(chunks)
        if len(calls) == 1:
            chunks.close()
            raise KeyboardInterrupt
        yield from chunks

    monkeypatch.setattr(module, "stream", interrupted)
    monkeypatch.setattr("sys.stdin", io.StringIO("One?\nTwo?\n"))
    assert main(["chat", str(folder), "--max-new-tokens", "6", "--temperature", "0"]) == 0
    found = capsys.readouterr()
    assert found.err.startswith(f"{folder}, its own template; /help lists commands")
    assert "(stopped)" in found.err and len(calls) == 2


def test_ctrl_c_clears_the_line_and_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["One?", KeyboardInterrupt, "Two?", EOFError])

    def typed(_: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(folder), "--max-new-tokens", "4", "--temperature", "0"]) == 0
    model, tokenizer = Decoder.from_pretrained(folder), Tokenizer.load(folder)
    asked = [{"role": "user", "content": "One?"}]
    first = generate(model, tokenizer, [asked], 4, GREEDY)[0].text
    asked += [{"role": "assistant", "content": first}, {"role": "user", "content": "Two?"}]
    assert capsys.readouterr().out == f"{first}\n{generate(model, tokenizer, [asked], 4, GREEDY)[0].text}\n"
    assert next(lines, None) is None
