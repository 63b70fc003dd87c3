"""Arguments of another type than the annotations' are refused by name, by one guard for all public functions."""

from __future__ import annotations

import inspect
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minillama
from minillama import Corpus, Decoder, InputError, ModelConfig, Tokenizer, TokenizerTrainer
from minillama.data.sources import Source
from minillama.tokenizer import byte_tokenizer

WORDS = byte_tokenizer()
CONFIG = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, vocab_size=257, max_seq_len=32)
MODEL = Decoder(CONFIG)
WRONG = ["abc", -1, 3.5, None, [1], ["a"], {}, object(), torch.tensor([1, 2]), b"x", [None], True]
IDS = torch.tensor([[1, 2]])


def calls(folder: Path) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Public functions with valid arguments, all of which are to be replaced."""
    (folder / "t.txt").write_text("abc def ghi " * 200)
    sources, cache = [Source(path=str(folder / "t.txt"))], folder / "cache"
    corpus, _ = minillama.prepare(sources, WORDS, cache=cache, val_fraction=0.1)
    MODEL.save_pretrained(folder / "model")
    WORDS.save(folder / "model")
    asked = {"model": MODEL, "tokenizer": WORDS, "prompts": "ab", "max_new_tokens": 1, "sampling": None, "stop": ()}
    flags = dict.fromkeys(("ignore_eos", "chat", "logprobs", "skips_long"), False)
    return {
        "generate": (minillama.generate, asked | flags | {"engine": None}),
        "perplexity": (minillama.perplexity, {"model": MODEL, "tokenizer": WORDS, "text": "abc", "context": 0}),
        "log_likelihoods": (minillama.log_likelihoods, {"model": MODEL, "context": [1], "continuations": [[3], [4]]}),
        "quantize": (lambda **given: minillama.quantize(**given), {"model": Decoder(CONFIG), "kind": "none"}),
        "prepare": (minillama.prepare, {"sources": sources, "tokenizer": WORDS, "cache": cache, "val_fraction": 0.1}),
        "load_run_config": (minillama.load_run_config, {"name": "tiny", "words": (), "preset": None}),
        "train": (minillama.train, {"config": None, "out": "x", "resume": False, "report": None}),
        "Decoder": (Decoder, {"config": CONFIG, "dropout": 0.0}),
        "Decoder.from_pretrained": (Decoder.from_pretrained, {"path": folder / "model", "dtype": None}),
        "Decoder.save_pretrained": (MODEL.save_pretrained, {"path": folder / "other"}),
        "Decoder.forward": (MODEL, {"tokens": IDS, "positions": None, "mask": None, "state": None}),
        "Decoder.loss": (MODEL.loss, {"hidden": MODEL.hidden(IDS), "targets": IDS, "weights": None, "z_loss": 0.0}),
        "Decoder.state": (MODEL.state, {"batch_size": 1, "max_len": 4, "cache_dtype": None}),
        "ModelConfig.load": (ModelConfig.load, {"source": "llama-tiny"}),
        "ModelConfig": (CONFIG.flops_per_token, {"seq_len": 8, "training": True}),
        "Tokenizer": (Tokenizer, {"backend": byte_tokenizer().backend, "eos": "<|endoftext|>"}),
        "Tokenizer.load": (Tokenizer.load, {"path": folder / "model"}),
        "Tokenizer.encode": (WORDS.encode, {"text": "a", "bos": False, "special": False}),
        "Tokenizer.encode_batch": (WORDS.encode_batch, {"texts": ["a"]}),
        "Tokenizer.decode": (WORDS.decode, {"ids": [1], "skip_special": True}),
        "Tokenizer.save": (WORDS.save, {"folder": folder / "words"}),
        "TokenizerTrainer": (TokenizerTrainer, {"kind": "bpe", "vocab_size": 300, "full": False, "special": ()}),
        "TokenizerTrainer()": (TokenizerTrainer("bpe", 300), {"texts": ["abc"]}),
        "Corpus": (Corpus, {"train": corpus.train, "val": corpus.val, "weights": None, "separator": None}),
        "Corpus.batch": (corpus.batch, {"seed": 1, "step": 0, "rows": 2, "length": 8}),
        "Sampling": (minillama.Sampling, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 0}),
    }


def test_wrong_types_are_input_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    unclear = []
    for name, (function, valid) in calls(tmp_path).items():
        for argument in valid:
            for wrong in WRONG:
                try:
                    function(**valid | {argument: wrong})
                except InputError as error:
                    assert "Error" not in error.what and "UnionType" not in str(error)
                except Exception as error:
                    unclear.append(f"{name}({argument}={wrong!r}): {error!r}")
    # an iterable of anything may give texts, and a tensor of states may have any shape
    allowed = ("texts=tensor", "hidden=tensor")
    assert [line for line in unclear if not any(one in line for one in allowed)] == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda: minillama.generate("folder", WORDS, "a"),
            r"expected: a Decoder\n  do: Decoder.from_pretrained\('folder'\)",
        ),  # type: ignore[arg-type]
        (
            lambda: minillama.generate(MODEL, WORDS, "a", -1),
            "max_new_tokens is out of range[^!]*found: -1[^!]*at least 0",
        ),
        (
            lambda: minillama.generate(MODEL, WORDS, "a", stop="ab"),
            "stop has a value of the wrong type[^!]*a list, each a str",
        ),
        (
            lambda: minillama.generate(MODEL, WORDS, [[5000]]),
            "outside the vocabulary[^!]*found: 5000\n[^!]*0 to 256",
        ),
        (lambda: MODEL(torch.tensor([[5000]])), "outside the vocabulary"),
        (lambda: MODEL([1, 2]), "these are no token ids[^!]*found: list"),
        (lambda: MODEL(torch.zeros(1, 2)), "these are no token ids[^!]*found: torch.float32 of shape"),
        (lambda: Decoder("llama-tiny"), r"expected: a ModelConfig\n  do: ModelConfig.load\('llama-tiny'\)"),  # type: ignore[arg-type]
        (lambda: TokenizerTrainer("bpe", 300)("abc"), "texts has a value of the wrong type"),
        (lambda: WORDS.encode(["a"]), "text has a value of the wrong type"),  # type: ignore[arg-type]
        (lambda: minillama.train({}), r"expected: a RunConfig\n  do: load_run_config\(...\)"),  # type: ignore[arg-type]
    ],
)
def test_the_message_names_argument_and_remedy(call: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        call()


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([1.7, 2.9]),
        torch.tensor([[1.0]]),
        torch.tensor(1),
        torch.ones(1, 1, 2, dtype=torch.long),
        [torch.tensor([1.5, 2])],
        [torch.tensor([[1, 2]])],
        [torch.tensor(1.5)],
        [[torch.tensor(1.5)]],
        [1.5],
    ],
    ids=str,
)
def test_prompts_of_other_tensors_than_ids_are_refused(prompts: Any) -> None:
    with pytest.raises(InputError, match=r"no token ids|wrong type"):
        minillama.generate(MODEL, WORDS, prompts, 1)


class Place:
    """A path as of other libraries."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_paths_of_any_kind_are_taken(tmp_path: Path) -> None:
    place = Place(tmp_path / "model")
    given = calls(tmp_path)
    WORDS.save(place)
    assert Tokenizer.load(place).vocab_size == 257 and Decoder.from_pretrained(path=place).config == CONFIG
    prepare, settings = given["prepare"]
    prepare(**settings | {"cache": Place(tmp_path / "other")})
    assert (tmp_path / "other").is_dir()
    (tmp_path / "run.toml").write_text("[train]\nsteps = 3\n")
    assert minillama.load_run_config(Place(tmp_path / "run.toml")).train.steps == 3  # type: ignore[arg-type]


def test_lists_are_checked_in_less_time_than_they_are_read() -> None:
    ids = [97] * 1000
    checked, bare = (
        min(timeit.repeat(partial(decode, WORDS, ids), number=5, repeat=5))
        for decode in (Tokenizer.decode, inspect.unwrap(Tokenizer.decode))
    )
    assert checked < 2 * bare


def test_what_was_taken_is_taken() -> None:
    """One prompt of ids, tensors, whole numbers of arrays, compiled models; a tokenizer that is called."""
    one = minillama.generate(MODEL, WORDS, [1, 2], 1, temperature=0)
    for prompts in ([[1, 2]], torch.tensor([1, 2]), torch.tensor([[1, 2]]), [torch.tensor([1, 2])], (np.int64(1), 2)):
        assert minillama.generate(MODEL, WORDS, prompts, np.int64(1), temperature=0) == one  # type: ignore[arg-type]
    for array in (np.array([1, 2]), np.array([[1, 2]], np.uint16), [np.array([1, 2])]):
        assert minillama.generate(MODEL, WORDS, array, 1, temperature=0) == one  # type: ignore[arg-type]
    likely = minillama.log_likelihoods(MODEL, [1, 2], [[3, 4], [5, 6]])
    for make in (np.array, torch.tensor):
        assert minillama.log_likelihoods(MODEL, make([1, 2]), make([[3, 4], [5, 6]])) == likely
        assert minillama.log_likelihoods(MODEL, [1, 2], [make([3, 4]), [5, 6]]) == likely
    with pytest.raises(InputError, match="wrong type"):
        minillama.log_likelihoods(MODEL, np.array([1.5]), [[3]])  # type: ignore[arg-type]
    text = minillama.generate(MODEL, WORDS, "ab", 8, stop=["x", "b"], ignore_eos=True)
    for stop, flag in (({"x", "b"}, 1), (("x", "b"), np.True_), (frozenset("xb"), np.int64(1))):
        assert minillama.generate(MODEL, WORDS, "ab", 8, stop=stop, ignore_eos=flag) == text  # type: ignore[arg-type]
    assert WORDS.encode("a", bos=1) == WORDS.encode("a", True) != WORDS.encode("a", bos=0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="expected: True or False"):
        WORDS.encode("a", bos=2)  # type: ignore[arg-type]
    wrapped = torch.compile(MODEL, backend="eager")
    assert minillama.generate(wrapped, WORDS, [1, 2], 1, temperature=0) == one  # type: ignore[arg-type]
    assert WORDS("abc") == WORDS.encode("abc") and len(WORDS) == WORDS.vocab_size == 257
    for given, said in (((), "missing 1 required"), (("a", True, True, 1), "positional arguments but")):
        with pytest.raises(TypeError, match=said):
            WORDS.encode(*given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"generate\(\) missing 1 required"):
        minillama.generate(MODEL, WORDS)  # type: ignore[call-arg]
