"""What a chat model brings besides its weights: stop tokens, BOS, chat templates, sampling defaults.

They go through loading, saving, training and every conversion.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minillama import Decoder, ModelConfig, Tokenizer, generate
from minillama.commands.cli import main
from minillama.convert import convert
from minillama.formats import generation_config
from minillama.formats.open import open_model
from minillama.inference.sampling import Sampling
from minillama.tokenizer import byte_tokenizer
from minillama.tokenizer.gguf import END_OF_TURN

NAMES = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|pad|>", "<|other|>"]
TEMPLATES = {"default": "D:{{ messages[0].content }}", "tool_use": "T:{{ tools[0].function.name }}"}
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}


def markov(vocab: int, chain: list[int]) -> Decoder:
    """A model whose next token depends on the last one alone: each of the chain is followed by the next."""
    width = -(-vocab // 32) * 32
    config = ModelConfig(dim=width, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=vocab, max_seq_len=64)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab, width))
        for before, after in pairwise(chain):
            model.lm_head.weight[after, before] = 10.0
    return model


def chat_tokenizer() -> Tokenizer:
    bare = byte_tokenizer().with_special(NAMES)
    config = {"chat_template": TEMPLATES, "pad_token": "<|pad|>"}
    return Tokenizer(bare.backend, eos=NAMES[1], bos=NAMES[0], add_bos=True, config=config)


def ids(*names: str) -> list[int]:
    return [chat_tokenizer()._id(name) for name in names]


EOS, EOM, EOT = ids(*NAMES[1:4])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of a model that says B, ends its turn, and would go on; three stop tokens, as Llama 3's are listed."""
    folder, tokenizer = tmp_path / "model", chat_tokenizer()
    markov(tokenizer.vocab_size, [65, 66, EOT, 67, 68, EOS, 65]).save_pretrained(folder)
    tokenizer.save(folder)
    generation_config.write(folder, bos_id=tokenizer.bos_id, eos_ids=[EOS, EOM, EOT], sampling=SAMPLING)
    return folder


def says(path: Path) -> str:
    opened = open_model(path)
    tokenizer = Tokenizer.load(opened.tokenizer_path())
    return generate(Decoder.from_pretrained(opened), tokenizer, ["A"], 12, Sampling(temperature=0))[0].text


def check(path: Path, sampling: dict[str, Any] = SAMPLING) -> None:
    """All that the model brought is there."""
    opened = open_model(path)
    tokenizer = Tokenizer.load(opened.tokenizer_path())
    assert says(path) == "B"
    assert opened.stop_ids | tokenizer.stop_ids >= {EOS, EOM, EOT}
    assert {key: value for key, value in opened.sampling.items() if key != "bos_token_id"} == sampling
    assert dict(tokenizer.chat_templates) == TEMPLATES
    assert (tokenizer.add_bos, tokenizer.bos_token, tokenizer.eos_token) == (True, NAMES[0], NAMES[1])


# --- conversions


def test_from_hugging_face_and_back(model: Path, tmp_path: Path) -> None:
    check(model)
    check(convert(model, tmp_path / "hf", "hf"))
    values = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert values["eos_token_id"] == [EOS, EOM, EOT] and values["bos_token_id"] == chat_tokenizer().bos_id
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"] == [EOS, EOM, EOT]


def test_through_gguf(model: Path, tmp_path: Path) -> None:
    check(convert(model, tmp_path / "m.gguf", "gguf"))
    check(convert(tmp_path / "m.gguf", tmp_path / "hf", "hf"))
    check(convert(tmp_path / "hf", tmp_path / "again.gguf", "gguf"))


def test_a_stop_token_without_a_name_goes_through_gguf(model: Path, tmp_path: Path) -> None:
    """llama.cpp has a key for the end of a turn and one of a message; others stand under a key of our own."""
    stops = [*ids("<|other|>", "<|pad|>"), 88, 89]
    generation_config.write(model, bos_id=None, eos_ids=[EOS, EOT, *stops], sampling={})
    opened = open_model(convert(model, tmp_path / "m.gguf", "gguf"))
    assert opened.stop_ids == {EOS, EOT, *stops}
    assert opened.metadata["tokenizer.ggml.eot_token_id"] == EOT


def test_through_meta(tmp_path: Path) -> None:
    """Llama 3's vocabulary in small; Meta's own code stops at three tokens, whatever a file says."""
    import base64

    lines = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "tokenizer.model").write_bytes(lines)
    bare = Tokenizer.load(tmp_path / "tokenizer.model")
    eos, eom, eot = (bare._id(name) for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
    folder = tmp_path / "model"
    markov(512, [65, 66, eot, 67, eos]).save_pretrained(folder)
    config = {"chat_template": TEMPLATES}
    Tokenizer(bare.backend, eos="<|end_of_text|>", bos="<|begin_of_text|>", add_bos=True, config=config).save(folder)
    convert(folder, tmp_path / "meta", "meta")
    opened = open_model(tmp_path / "meta")
    tokenizer = Tokenizer.load(opened.tokenizer_path())
    assert tokenizer.stop_ids == {eos, eom, eot} and dict(tokenizer.chat_templates) == TEMPLATES
    assert says(tmp_path / "meta") == "B" == says(convert(tmp_path / "meta", tmp_path / "again", "hf"))
    generation_config.write(folder, bos_id=None, eos_ids=[eos, 90], sampling=SAMPLING)
    opened = open_model(convert(folder, tmp_path / "other", "meta"))
    assert opened.stop_ids >= {eos, 90} and opened.sampling.items() >= SAMPLING.items()


def test_a_list_in_config_json_alone(model: Path, tmp_path: Path) -> None:
    """Also where generation_config.json has null: transformers goes on there."""
    for content in (None, '{"eos_token_id": null}'):
        file = model / "generation_config.json"
        file.unlink() if content is None else file.write_text(content)
        check(model, {})
        check(convert(model, tmp_path / f"{content is None}", "hf"), {"do_sample": True})


def test_saving_a_model_keeps_them(model: Path, tmp_path: Path) -> None:
    loaded = Decoder.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "saved")
    Tokenizer.load(model).save(tmp_path / "saved")
    check(tmp_path / "saved")


# --- training


@pytest.mark.parametrize("more", [{"data.template": "own"}, {"data.template": "own", "lora.rank": 2}])
def test_fine_tuning_keeps_them(more: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """All weights, and an adapter, whose folder has them in place of the base's."""
    templates = {
        **TEMPLATES,
        "default": "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}{% endfor %}",
    }
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    lines = [json.dumps({"prompt": f"xyz {number}", "response": "zyx"}) + "\n" for number in range(20)]
    (tmp_path / "r.jsonl").write_text("".join(lines))
    run = tmp_path / "run"
    assert main(["train", *words_of(tmp_path / "r.jsonl", model, run, **more)]) == 0
    made = run / "model"
    if "lora.rank" in more:
        made = convert(model, tmp_path / "merged", "hf", adapter=made)
    opened, tokenizer = open_model(made), Tokenizer.load(made)
    assert opened.stop_ids | tokenizer.stop_ids >= {EOS, EOM, EOT}
    assert {key: value for key, value in opened.sampling.items() if key != "bos_token_id"} == SAMPLING
    assert dict(tokenizer.chat_templates) == templates
    assert (tokenizer.add_bos, tokenizer.bos_token, tokenizer.eos_token) == (True, NAMES[0], NAMES[1])


def test_another_template_takes_the_place_of_the_default_alone() -> None:
    found = chat_tokenizer().with_chat_template("N:{{ messages[0].content }}")
    assert dict(found.chat_templates) == {**TEMPLATES, "default": "N:{{ messages[0].content }}"}
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = [{"role": "user", "content": "Hi"}]
    assert found.apply_chat_template(asked, tools=tools) == "T:f" and found.apply_chat_template(asked) == "N:Hi"


def words_of(source: Path, model: Path, out: Path, **more: Any) -> list[str]:
    """Command line of a run of two steps."""
    options = {
        "train.init_from": model,
        "data.sources": source,
        "data.cache": out.parent / "cache",
        "data.val_fraction": 0.3,
        "train.steps": 2,
        "train.batch_size": 1,
        "train.context": 16,
        "train.dtype": "float32",
        "train.compile": "false",
        "optim.lr": 1e-9,
        "sample.max_new_tokens": 0,
        "out": out,
    }
    return [word for name, value in (options | more).items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("documents", [1, 20])
def test_training_keeps_them(documents: int, model: Path, tmp_path: Path) -> None:
    """From one document, too, where nothing separates texts; and in a run that was resumed."""
    lines = [json.dumps({"text": "xyz " * 20 + str(i)}) for i in range(documents)]
    source = tmp_path / ("many.jsonl" if documents > 1 else "one.txt")
    source.write_text("\n".join(lines) + "\n" if documents > 1 else "xyz " * 200)
    words = words_of(source, model, tmp_path / "run")
    assert main(["train", *words]) == 0
    check(tmp_path / "run" / "model")
    words[words.index("--train.steps") + 1] = "3"
    assert main(["train", *words, "--resume"]) == 0
    check(tmp_path / "run" / "model")


# --- GGUF files of others


@pytest.mark.parametrize("key", ["eot_token_id", "eom_token_id", None])
def test_gguf_files_of_others_stop(key: str | None, tmp_path: Path) -> None:
    """Llama 3 Instruct of April 2024: EOS is the end of a text, and the end of a turn is a control token alone."""
    from minillama.formats import gguf
    from minillama.tokenizer.gguf_export import vocabulary

    tokenizer = chat_tokenizer()
    stop = EOT if key is None else ids("<|other|>")[0]
    decoder = markov(tokenizer.vocab_size, [65, 66, stop, 67, 68, EOS])
    keys = vocabulary(tokenizer, tokenizer.vocab_size) | ({f"tokenizer.ggml.{key}": stop} if key else {})
    gguf.write(tmp_path / "m.gguf", decoder.config, decoder.state_dict(), keys, "f32")
    assert says(tmp_path / "m.gguf") == "B"


@pytest.mark.parametrize("harmony", [True, False])
def test_stops_where_llama_cpp_stops(harmony: bool, tmp_path: Path) -> None:
    """Every name at which llama.cpp stops, and a control token at which it does not."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is the oracle here")
    left_out = {"<|endoftext|>"} | (set() if harmony else {"<|call|>", "<|calls|>"})
    names = [*sorted(END_OF_TURN - left_out), "<|other|>"]
    bare = byte_tokenizer().with_special(names)
    tokenizer = Tokenizer(bare.backend, eos="<|endoftext|>", add_bos=False)
    starts = [chr(65 + i) for i in range(len(names))]
    decoder = markov(tokenizer.vocab_size, [122, 122])  # z follows z
    with torch.no_grad():
        for start, name in zip(starts, names, strict=True):
            decoder.lm_head.weight[tokenizer._id(name), ord(start)] = 10.0
            decoder.lm_head.weight[122, tokenizer._id(name)] = 10.0
    decoder.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    path = convert(tmp_path / "model", tmp_path / "m.gguf", "gguf", "f32")
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 256, False, 1
    server = xllamacpp.Server(params)
    ours = Tokenizer.load(path)
    theirs = set()
    for start, name in zip(starts, names, strict=True):
        answer = server.handle_completions({"prompt": start, "n_predict": 4, "temperature": 0.0, "verbose": True})
        answer = answer[0] if isinstance(answer, list) else answer
        theirs |= {name} if answer.get("__verbose", answer)["stop_type"] == "eos" else set()
    assert theirs == {name for name in names if ours._id(name) in ours.stop_ids | open_model(path).stop_ids}
    assert ("<|end|>" in theirs) != harmony and "<|other|>" not in theirs and len(theirs) == len(names) - 1 - harmony


# --- files beside a vocabulary of another format


def test_settings_beside_a_sentencepiece_model(shared: Path, tmp_path: Path) -> None:
    """Folders of Llama 2's time have tokenizer.model and tokenizer_config.json, and no tokenizer.json."""
    data = (shared / "tokenizer" / "llama2" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data)
    settings = {"chat_template": "{{ bos_token }}x", "add_bos_token": False, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.apply_chat_template([]) == "<s>x" and not tokenizer.add_bos
