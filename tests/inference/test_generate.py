"""The decode loop: batches, streams, stop strings, limits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.inference.engine import Engine
from minillama.inference.generate import Chunk, StopText, generate, stream
from minillama.inference.request import Request
from minillama.inference.sampling import Sampling
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer, TokenizerTrainer

CONFIG = ModelConfig(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=260, max_seq_len=40)
GREEDY = Sampling(temperature=0)
PROMPTS = ["a", "a longer prompt", "", "middle", "x" * 30]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return TokenizerTrainer("bytes", 257)([])


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(2)
    decoder = Decoder(CONFIG)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)  # sharp enough that no two tokens are nearly equally likely
    return decoder


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=3)])
def test_batch_equals_single_and_cached_equals_uncached(
    model: Decoder, tokenizer: Tokenizer, sampling: Sampling, uncached: Callable[..., list[list[int]]]
) -> None:
    together = generate(model, tokenizer, PROMPTS, 20, sampling)
    encoded = [tokenizer.encode(prompt, bos=tokenizer.add_bos) for prompt in PROMPTS]
    expected = uncached(model, encoded, 20, sampling, [tokenizer.eos_id])
    assert [list(completion.tokens) for completion in together] == expected
    for row, prompt in enumerate(PROMPTS):
        own = Sampling(**{**sampling.__dict__, "seed": sampling.seed + row})
        assert generate(model, tokenizer, [prompt], 20, own) == [together[row]]
    assert len({completion.tokens for completion in together}) == len(PROMPTS)


def test_one_prompt_keywords_and_log_probabilities(model: Decoder, tokenizer: Tokenizer) -> None:
    expected = generate(model, tokenizer, ["Alice"], 6, GREEDY)
    assert generate(model, tokenizer, "Alice", 6, temperature=0) == expected
    assert generate(model, tokenizer, "Alice", 6, Sampling(temperature=0.7), temperature=0.0) == expected
    (found,) = generate(model, tokenizer, "Alice", 6, temperature=0, logprobs=True, ignore_eos=True)
    ids = tokenizer.encode("Alice", bos=tokenizer.add_bos)
    with torch.inference_mode():
        rows = model(torch.tensor([[*ids, *found.tokens]]))[0, len(ids) - 1 : -1].log_softmax(-1)
    chosen = rows.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.log_probabilities), chosen, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="did you mean 'temperature'"):
        generate(model, tokenizer, "Alice", temprature=0)
    with pytest.raises(InputError, match="top_p is out of range"):
        generate(model, tokenizer, "Alice", top_p=2.0)


def test_a_tokenizer_of_transformers_is_taken(model: Decoder, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own = TokenizerTrainer("byte-bpe", 260)(["two donkeys and a clock " * 9])
    own.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    before = theirs("a <|endoftext|> b").input_ids
    assert generate(model, theirs, "two", 5, GREEDY) == generate(model, own, "two", 5, GREEDY)
    assert theirs("a <|endoftext|> b").input_ids == before  # it is left as it was
    for wrong in ("gpt2", None):
        with pytest.raises(InputError, match="no tokenizer"):
            generate(model, wrong, "two")


def test_several_texts_are_not_one(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"expected: a string(?s:.*)one at a time"):
        tokenizer.encode(["a", "b"])  # type: ignore[arg-type]


def test_stream_equals_generate(model: Decoder, tokenizer: Tokenizer) -> None:
    pieces = list(stream(model, tokenizer, "once", 25, GREEDY))
    whole = generate(model, tokenizer, ["once"], 25, GREEDY)[0]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert pieces[-1].reason == whole.reason == "length"


def test_ids_and_engines_that_are_not_the_models(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"outside the vocabulary\n  where: prompt 2\n  found: -1"):
        generate(model, tokenizer, [[1, 2], [1, -1]], 2)
    with pytest.raises(InputError, match="this engine decodes another model"):
        generate(model, tokenizer, "a", 2, engine=Engine(copy.deepcopy(model), 1))


def test_several_prompts_share_an_engine_with_other_requests(model: Decoder, tokenizer: Tokenizer) -> None:
    expected = generate(model, tokenizer, PROMPTS, 12, GREEDY)
    engine = Engine(model, 3, chunk=4)
    (other,) = engine.submit(Request([1, 2, 3], 30))
    rows: list[list[Chunk]] = [[] for _ in PROMPTS]
    for chunk in stream(model, tokenizer, PROMPTS, 12, GREEDY, engine=engine):
        rows[chunk.row].append(chunk)
    assert ["".join(chunk.text for chunk in row) for row in rows] == [completion.text for completion in expected]
    assert [tuple(token for chunk in row for token in chunk.tokens) for row in rows] == [c.tokens for c in expected]
    assert [row[-1].reason for row in rows] == [completion.reason for completion in expected]
    assert all(chunk.reason is None for row in rows for chunk in row[:-1])
    while engine.is_busy:
        engine.step()
    assert len(other.tokens) == 30


def test_what_ends_without_a_token_or_elsewhere_is_said(model: Decoder, tokenizer: Tokenizer) -> None:
    assert [c.reason for c in stream(model, tokenizer, ["a", "b"], 0, GREEDY)] == ["length", "length"]
    engine = Engine(model)
    chunks = stream(model, tokenizer, "once", 30, GREEDY, engine=engine)
    first = next(chunks)
    assert engine.running is not None
    engine.cancel(engine.running.rows[0].request)
    last = [first, *chunks][-1]
    assert last.reason == "cancelled" and not engine.is_busy
    left = stream(model, tokenizer, "once", 30, GREEDY, engine=engine)
    next(left)
    left.close()  # nobody wants the rest
    assert not engine.is_busy


def test_seed_decides(model: Decoder, tokenizer: Tokenizer) -> None:
    def text(seed: int) -> str:
        return generate(model, tokenizer, ["a"], 20, Sampling(temperature=1.0, seed=seed))[0].text

    assert text(1) == text(1) != text(2)


def test_end_of_text_ends_a_row_and_is_not_written(model: Decoder, tokenizer: Tokenizer) -> None:
    free = generate(model, tokenizer, PROMPTS[:2], 20, GREEDY)
    ends = free[0].tokens[4]
    other = Tokenizer.__new__(Tokenizer)
    other.__dict__.update(tokenizer.__dict__, eos_id=ends)
    first = free[0].tokens.index(ends)
    cut = generate(model, other, PROMPTS[:2], 20, GREEDY)
    assert cut[0].tokens == free[0].tokens[: first + 1] and cut[0].reason == "eos"
    assert cut[0].text == tokenizer.decode(free[0].tokens[:first])
    ignored = generate(model, other, PROMPTS[:2], 20, GREEDY, ignore_eos=True)
    assert [c.tokens for c in ignored] == [c.tokens for c in free]


def test_a_full_context_ends_the_row_and_is_said(model: Decoder, tokenizer: Tokenizer) -> None:
    short, full = generate(model, tokenizer, ["a", "y" * 35], 10, GREEDY)
    assert (full.reason, len(full.tokens)) == ("context", 40 - 36)  # 35 bytes and the beginning-of-text token
    assert (short.reason, len(short.tokens)) == ("length", 10)
    with pytest.raises(InputError, match="context") as error:
        generate(model, tokenizer, ["a", "y" * 39], 10, GREEDY)
    assert "prompt 2" in str(error.value) and "40 tokens" in str(error.value)


def test_prompt_gets_the_beginning_of_text_only_if_trained_so(model: Decoder) -> None:
    plain = TokenizerTrainer("bytes", 257)([])
    plain.add_bos = False
    with_bos = TokenizerTrainer("bytes", 257)([])
    texts = [generate(model, t, ["abc"], 10, GREEDY)[0].tokens for t in (plain, with_bos)]
    assert texts[0] != texts[1]


def test_stop_string_ends_the_text_before_it(model: Decoder, tokenizer: Tokenizer) -> None:
    whole = generate(model, tokenizer, ["once"], 25, GREEDY)[0].text
    stop = whole[10:13]
    cut = generate(model, tokenizer, ["once"], 25, GREEDY, stop=[stop])[0]
    assert cut.text == whole[: whole.index(stop)] and cut.reason == "stop"
    streamed = "".join(piece.text for piece in stream(model, tokenizer, "once", 25, GREEDY, stop=[stop]))
    assert streamed == cut.text
    with pytest.raises(InputError, match="empty stop"):
        generate(model, tokenizer, ["a"], 1, stop=[""])


def push_all(stops: list[str], parts: list[str]) -> tuple[str, bool]:
    held, shown = StopText(stops), ""
    for part in parts:
        text, stopped = held.push(part)
        shown += text
        if stopped:
            return shown, True
    kept = held.held
    return shown + (rest := held.flush()), rest != kept


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("ab", max_size=3), max_size=12),
)
def test_stop_text_shows_what_a_search_of_the_whole_text_shows(stops: list[str], parts: list[str]) -> None:
    whole = "".join(parts)
    found = [whole.find(stop) for stop in stops if stop in whole]
    assert push_all(stops, parts) == (whole[: min(found, default=None)], bool(found))


def test_unknown_keywords_are_refused_with_all_that_are_known(model: Decoder, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"max_new_tokens, sampling, stop.*temperature") as refused:
        generate(model, tokenizer, "a", max_new_token=3)
    assert "did you mean 'max_new_tokens'?" in str(refused.value)


def test_stop_string_that_overlaps_itself() -> None:
    assert push_all(["ab"], ["a", "a", "b"]) == ("a", True)
    assert push_all(["aab"], ["a", "a", "a", "b", "c"]) == ("a", True)


def test_tokenizer_larger_than_the_model_is_refused(tokenizer: Tokenizer) -> None:
    small = Decoder(ModelConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=100, max_seq_len=8))
    with pytest.raises(InputError, match="larger than the model's vocabulary"):
        generate(small, tokenizer, ["a"], 1)
