"""Tokens at the boundary of context and continuation, normalizations, comparison: errors that harnesses have had."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from minillama import Decoder, ModelConfig
from minillama.errors import InputError
from minillama.evaluate import likelihood
from minillama.evaluate.comparison import average, estimate, paired, wilson
from minillama.evaluate.likelihood import score
from minillama.evaluate.multiple_choice import Outcome, encode_pairs, outcomes
from minillama.evaluate.perplexity import perplexity, windows
from minillama.evaluate.results import summary
from minillama.evaluate.task import Item
from minillama.evaluate.tasks import TASKS
from minillama.tokenizer import Tokenizer, byte_tokenizer

SLOW = ["llama2/tokenizer.json", "llama2/tokenizer.bin", "llama2/ggml-vocab-llama-spm.gguf", "llama3/tokenizer.model"]
FILES = [
    *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    "llama2/tokenizer.model",
    "chinese/chinese_sp.model",
    "stories260K/tok512.bin",
    "smollm2",
]
PAIRS = [
    ("Ans", "wer"),
    ("hello wor", "ld"),
    ("Question: a\nAnswer:", " yes"),
    ("Answer: ", "yes"),
    ("Answer:", "\nA"),
    ("答案：", " 草鱼"),
    ("长江流经武", "汉"),
    ("x" * 9, "x"),
    ("", "Alone it stands"),
    (" \n ", "behind blanks"),
]


@pytest.fixture(scope="module")
def tiny() -> tuple[Decoder, Tokenizer]:
    torch.manual_seed(2)
    tokenizer = byte_tokenizer()
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 64}
    return Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **shape)).eval(), tokenizer


@pytest.mark.parametrize("name", FILES)
def test_no_continuation_is_lost_where_a_token_crosses_the_boundary(
    name: str, shared: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = Tokenizer.load(request.getfixturevalue("smollm2") if name == "smollm2" else shared / "tokenizer" / name)
    for (context, continuation), (before, after) in zip(PAIRS, encode_pairs(tokenizer, PAIRS), strict=True):
        assert before and after
        assert before.count(tokenizer.bos_id) == (tokenizer.add_bos or not context.strip())
        if tokenizer.unknown_id not in (*before, *after):
            text = tokenizer.decode([*before, *after])
            expected = (context + continuation).replace("：", ":")  # some normalize, and make spaces of line ends
            assert text.replace("：", ":").split() == expected.split(), context


KNOWN = {
    "llama2": [[4874], [29871, 4874], [13, 29909]],  # the harness's own
    "smollm2": [[9805], [216, 9805], [198, 49]],
    "llama3": [[10035], [220, 10035], [198, 32]],  # tiktoken's; ":\n" is one token, so the last is encoded by itself
    "chinese": [[4, 539, 3227], [4, 539, 3227], [1579]],  # sentencepiece's; a line's end is a space to it
    "stories260K": [[348, 406], [410, 348, 406], [13, 447]],  # sentencepiece's, over a model of these pieces and scores
}


# without bpe_train, which holds a corpus and the merges of a training, and no tokenizer with its pattern
@pytest.mark.parametrize("name", FILES)
def test_known_continuations(name: str, shared: Path, request: pytest.FixtureRequest) -> None:
    """The space in front of a word is inside its token."""
    expected = KNOWN[name.partition("/")[0]]
    tokenizer = Tokenizer.load(request.getfixturevalue("smollm2") if name == "smollm2" else shared / "tokenizer" / name)
    pairs = [("Question: a\nAnswer:", " yes"), ("Answer: ", " yes"), ("Answer:", "\nA")]
    assert [after for _, after in encode_pairs(tokenizer, pairs)] == expected
    with pytest.raises(InputError, match="empty continuation"):
        encode_pairs(tokenizer, [("a", "")])


def test_an_empty_context_is_one_bos_token(shared: Path) -> None:
    tokenizer = Tokenizer.load(shared / "tokenizer/llama2/tokenizer.model")
    for adds in (True, False):
        tokenizer.add_bos = adds
        assert encode_pairs(tokenizer, [("", "Hello")]) == [([1], [15043])]
        assert encode_pairs(tokenizer, [("Hello", " you")]) == [([1] * adds + [15043], [366])]
    assert encode_pairs(tokenizer, [("<s>Hello", " you")], special=True)[0][0] == [1, 15043]


def test_batches_of_one_and_of_seven_choose_alike(tiny: tuple[Decoder, Tokenizer]) -> None:
    model, tokenizer = tiny
    pairs = [[("q" * n, " " + "ab" * k) for k in (1, 2, 3)] for n in (1, 4, 9, 11, 12, 13, 14)]
    encoded = [encode_pairs(tokenizer, row) for row in pairs]
    longest = max(len(before) + len(after) for row in encoded for before, after in row)
    one, seven = (dict(score(model, encoded, tokens=size)) for size in (1, 7 * longest))
    for i in range(len(pairs)):
        sums = [[x.nats for x in found[i]] for found in (one, seven)]
        assert sums[0] == pytest.approx(sums[1], abs=1e-4)
        lengths = [2 * k for k in (1, 2, 3)]
        for metric in ("acc", "acc_norm"):
            assert outcome(sums[0], lengths).choice(metric) == outcome(sums[1], lengths).choice(metric)


def outcome(nats: list[float], characters: list[int], **more: object) -> Outcome:
    values = {"task": "t", "id": "0", "prompt": "", "subject": "", "gold": 1, "bytes": characters, "prior": []}
    return Outcome(**(values | {"nats": nats, "characters": characters} | more))  # type: ignore[arg-type]


def test_normalizations_on_worked_numbers() -> None:
    one = outcome([-10.0, -12.0], [10, 20], prior=[-9.0, -12.5])
    assert [one.choice(metric) for metric in ("acc", "acc_norm", "acc_pmi")] == [0, 1, 1]
    assert one.metrics == ["acc", "acc_norm", "acc_bytes", "acc_pmi"] and one.is_right("acc_norm")
    assert outcome([-3.0, -3.0], []).choice() == 0 and outcome([-3.0, -3.0], []).metrics == ["acc"]


def test_characters_are_not_bytes(tiny: tuple[Decoder, Tokenizer]) -> None:
    item = Item("0", (("问", " 草鱼"), ("问", " carp")), ("草鱼", "carp"), 0)
    (found,) = outcomes(*tiny, "cmmlu", [item])
    assert (found.characters, found.bytes) == ([2, 4], [6, 4])
    assert outcome([-6.0, -7.0], [2, 4], bytes=[6, 4]).choice("acc_norm") == 1
    assert outcome([-6.0, -7.0], [2, 4], bytes=[6, 4]).choice("acc_bytes") == 0


def test_items_that_lose_tokens_are_counted(tiny: tuple[Decoder, Tokenizer]) -> None:
    """A context of 64 reads 64 tokens and predicts one more: bos, 59 and 5 fit, bos, 60 and 5 do not."""
    items = [Item(str(n), (("q" * n, " abcd"), ("q" * 9, " abcd")), ("abcd", "abcd"), 0) for n in (59, 60, 9)]
    found = sorted(outcomes(*tiny, "piqa", items), key=lambda one: one.id)
    assert [(one.id, one.truncated) for one in found] == [("59", False), ("60", True), ("9", False)]
    shown = summary(TASKS["piqa"], "lm-eval", found, None)
    assert shown["truncated"] == 1
    old = {key: value for key, value in asdict(found[0]).items() if key != "truncated"}
    assert Outcome.of(old) == found[0]  # of a file from before


def test_an_answer_longer_than_the_context_is_scored_in_windows(tiny: tuple[Decoder, Tokenizer]) -> None:
    model, tokenizer = tiny
    choices = [" short", " " + "long, longer, " * 12]
    pairs = [("Question:", choice) for choice in choices]
    (found,) = outcomes(model, tokenizer, "piqa", [Item("1", tuple(pairs), tuple(choices), 0)])
    assert found.truncated and len(choices[1]) == 169 > 2 * 64
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("Question:" + choices[1])]])
    expected, begin = 0.0, ids.shape[1] - len(choices[1])
    for start, end in ((0, 64), (64, 96), (96, 128), (128, 160), (160, 169)):  # each behind what fits before it
        first, last = begin + start, begin + end
        window = ids[:, max(0, last - 1 - 64) : last - 1]
        with torch.no_grad():
            logits = model(window)[0].log_softmax(-1)
        expected += logits[-(end - start) :].gather(1, ids[0, first:last, None]).sum().item()
    assert found.nats[1] == pytest.approx(expected, rel=1e-5)


def test_prompts_have_line_ends_and_no_backslashes() -> None:
    for task in TASKS.values():
        for form in task.forms.values():
            assert "\\" not in form.prompt + form.description + form.letter
            assert not form.letter or "{letter}" in form.letter
    assert TASKS["piqa"].forms["lm-eval"].prompt == "Question: {question}\nAnswer:"


def test_rolling_windows_predict_each_token_once() -> None:
    found = [(list(a), list(b)) for a, b in windows([*range(10)], 100, 4)]
    assert found == [([100], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    assert [(list(a), list(b)) for a, b in windows([1, 2, 3], 100, 4)] == [([100], [1, 2, 3])]
    for size in range(1, 30):
        whole = [token for _, targets in windows([*range(size)], 100, 7) for token in targets]
        assert whole == [*range(size)]
        assert all(len(context) + len(targets) <= 8 for context, targets in windows([*range(size)], 100, 7))


def test_perplexity_counts_every_token_and_no_bos(tiny: tuple[Decoder, Tokenizer]) -> None:
    """A text of 150 bytes in a context of 64: bos is the first context alone, and scored never."""
    model, tokenizer = tiny
    text = "the tide comes in; " * 8 + "é"
    found = perplexity(model, tokenizer, text)
    ids, nats = tokenizer.encode(text), 0.0
    assert len(ids) == len(text.encode())
    for start in range(0, len(ids), 64):
        end = min(start + 64, len(ids))
        window = [tokenizer.bos_id, *ids[:64]] if start == 0 else ids[end - 65 : end]
        with torch.inference_mode():
            logits = model(torch.tensor([window[:-1]]))[0].log_softmax(-1)
        nats -= sum(
            logits[row, window[row + 1]].item() for row in range(len(window) - 1 - (end - start), len(window) - 1)
        )
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert (found.tokens, found.bytes) == (len(ids), len(text.encode()))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    with pytest.raises(InputError, match="nothing to be scored"):
        perplexity(model, tokenizer, "")


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("adds", [True, False])
def test_a_text_follows_one_bos_whatever_the_tokenizer_adds(
    name: str, adds: bool, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 2's bos is 1 and its eos 2; the windows are those of sentencepiece's ids, written by hand."""
    folder, text = shared / "tokenizer/llama2", "The tide comes in, and the boats turn."
    ids = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).encode(text)
    assert len(ids) == 11
    tokenizer = Tokenizer.load(folder / name)
    tokenizer.add_bos = adds
    torch.manual_seed(2)
    shape = {"dim": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 8, "max_seq_len": 8}
    model, asked = Decoder(ModelConfig(vocab_size=32003, **shape)).eval(), []

    def record(model: Decoder, items: Any, *rest: Any) -> Any:
        asked.extend((list(before), list(after)) for ((before, after),) in items)
        return score(model, items, *rest)

    monkeypatch.setattr(likelihood, "score", record)
    found = perplexity(model, tokenizer, text)
    assert asked == [([1], ids[:8]), (ids[2:8], ids[8:])]
    with torch.inference_mode():
        first, last = (model(torch.tensor([row]))[0].log_softmax(-1) for row in ([1, *ids[:7]], ids[2:10]))
    nats = -sum(first[i, token].item() for i, token in enumerate(ids[:8]))
    nats -= sum(last[5 + i, token].item() for i, token in enumerate(ids[8:]))
    assert found.nats == pytest.approx(nats, rel=1e-5) and (found.tokens, found.bytes) == (11, 38)


def test_errors_and_intervals() -> None:
    assert estimate([0, 0, 1, 1]) == pytest.approx((0.5, math.sqrt(1 / 3 / 4), 4))
    assert estimate([True]) == (1.0, 0.0, 1)
    change = paired([1, 1, 0, 1], [0, 1, 0, 0])
    assert change == pytest.approx((0.5, math.sqrt(1 / 3 / 4), 4))
    assert change.interval == pytest.approx((0.5 - 1.959964 * change.error, 0.5 + 1.959964 * change.error))
    assert average([estimate([0, 1]), estimate([1, 1])]) == pytest.approx((0.75, 0.25, 4))
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4) and wilson(0.5, 0) == (0.0, 1.0)
