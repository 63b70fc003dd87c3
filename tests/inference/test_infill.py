"""Filling blanks: the decode loop against full passes, several blanks, and what a person writes and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.inference.generate import generate
from minillama.inference.infill import MaskedText, infill
from minillama.inference.sampling import Sampling
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import BLANK_TOKENS, Blanks, Layout
from minillama.tokenizer.train import TokenizerTrainer

GREEDY = Sampling(temperature=0)
TEXT = "the grey heron stands in the shallow water and waits for a fish to pass"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return TokenizerTrainer("byte-bpe", 300, special=BLANK_TOKENS)([TEXT * 9])


@pytest.fixture(params=["learned-2d", "rope-2d"])
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Decoder:
    """Weights large enough that a wrong place shows."""
    shape = {"dim": 48, "n_layers": 2, "n_heads": 6, "hidden_dim": 80, "max_seq_len": 96, "tie_embeddings": False}
    shape |= {"vocab_size": tokenizer.vocab_size, "position": request.param}
    config = ModelConfig.load("glm-tiny").changed(shape)
    torch.manual_seed(2)
    decoder = Decoder(config).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return decoder


def greedy(model: Decoder, layout: Layout, end: int, count: int) -> list[int]:
    """The blank by full passes, nothing kept between them."""
    place, within = layout.positions[-1]
    tokens, places, out = list(layout.tokens), list(layout.positions), list[int]()
    for _ in range(count):
        mask = Mask(prefix=torch.tensor([layout.prefix]))
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), positions=torch.tensor([places]).mT, mask=mask)[0, -1]
        token = int(logits.argmax())
        if token == end:
            break
        out.append(token)
        within += 1
        tokens, places = [*tokens, token], [*places, (place, within)]
    return out


def test_blanks_are_filled_as_full_passes_fill_them(model: Decoder, tokenizer: Tokenizer) -> None:
    blanks = Blanks.of(tokenizer)
    texts = ["the [MASK] heron stands [MASK] water", "[sMASK] a fish to pass", "the grey heron [gMASK]"]
    for text, filled in zip(texts, infill(model, tokenizer, texts, 7), strict=True):
        masked = MaskedText(text, tokenizer)
        layout, written = masked.layout, []
        for place in masked.positions:
            ids = greedy(model, layout.fill(place, [blanks.start]), blanks.end, 7)
            layout = layout.fill(place, [blanks.start, *ids])
            written.append(tokenizer.decode(ids))
        assert filled.spans == tuple(written)
        assert filled.text == masked.join(written)


def test_a_batch_equals_one_by_one(model: Decoder, tokenizer: Tokenizer) -> None:
    texts = ["the [MASK] heron [MASK]", "[sMASK]", TEXT + " [gMASK] and [MASK] then [MASK]"]
    sampling = Sampling(temperature=1, seed=5)
    together = infill(model, tokenizer, texts, 6, sampling)
    for i, text in enumerate(texts):
        assert together[i] == infill(model, tokenizer, [text], 6, Sampling(temperature=1, seed=5 + i))[0]


def test_decoding_with_and_without_a_state_agree(
    model: Decoder,
    tokenizer: Tokenizer,
    decode: Callable[..., list[list[int]]],
    uncached: Callable[..., list[list[int]]],
) -> None:
    blanks = Blanks.of(tokenizer)
    prompts = [blanks.continuation(tokenizer.encode(text)) for text in ("the grey", "the shallow water and waits")]
    runs = [run(model, prompts, 12) for run in (decode, uncached)]
    assert runs[0] == runs[1] and [len(tokens) for tokens in runs[0]] == [12, 12]


def test_generate_continues_a_text_as_one_long_blank(model: Decoder, tokenizer: Tokenizer) -> None:
    blanks = Blanks.of(tokenizer)
    tokenizer.add_bos = False
    done = generate(model, tokenizer, ["the grey", "a fish"], 9, GREEDY)
    for prompt, completion in zip(["the grey", "a fish"], done, strict=True):
        expected = greedy(model, blanks.continuation(tokenizer.encode(prompt)), blanks.end, 9)
        assert list(completion.tokens)[: len(expected)] == expected
        assert completion.reason == ("length" if len(expected) == 9 else "eos")


def test_a_blank_ends_where_the_model_says(model: Decoder, tokenizer: Tokenizer) -> None:
    blanks = Blanks.of(tokenizer)
    with torch.no_grad():  # the end is what is always likeliest
        model.model.embed_tokens.weight[blanks.end] = 0
        model.model.norm.weight.zero_()
        model.model.norm.bias.copy_(torch.ones(48))  # type: ignore[arg-type]
        model.output_weight[blanks.end] = 9
    filled = infill(model, tokenizer, ["the [MASK] heron"], 5)[0]
    assert filled.spans == ("",) and filled.reasons == ("eos",) and filled.text == "the heron"
    assert generate(model, tokenizer, ["the"], 5, GREEDY)[0].reason == "eos"


@pytest.mark.parametrize(
    ("text", "blanks", "whole"),
    [
        ("the [MASK] heron", [" grey"], "the grey heron"),
        ("the [MASK] heron", ["grey"], "the grey heron"),
        ("[MASK] heron", ["The"], "The heron"),
        ("un[MASK]able, [MASK]", ["believ", " truly"], "unbelievable, truly"),
        ("a [MASK]", [""], "a"),
    ],
)
def test_the_space_before_a_mask_belongs_to_the_blank(
    text: str, blanks: list[str], whole: str, tokenizer: Tokenizer
) -> None:
    assert MaskedText(text, tokenizer).join(blanks) == whole


def test_part_a_is_the_text_with_the_masks_in_their_places(tokenizer: Tokenizer) -> None:
    tokenizer.add_bos = False
    masked = MaskedText("the [MASK] heron[gMASK]", tokenizer)
    the, heron = tokenizer.encode("the"), tokenizer.encode(" heron")
    blanks = Blanks.of(tokenizer)
    assert masked.layout.tokens == [*the, blanks.token, *heron, blanks.document]
    assert masked.positions == [len(the), len(the) + 1 + len(heron)]


def test_sentencepiece_puts_no_second_space_behind_a_mask() -> None:
    made = TokenizerTrainer("bpe", 400, special=BLANK_TOKENS)([TEXT * 9])
    made.add_bos = False
    assert MaskedText("the [MASK] heron", made).layout.tokens[-len(made.encode("heron")) :] == made.encode("heron")


@pytest.mark.parametrize(
    ("text", "what"), [("no mask", "no mask to fill"), (TEXT * 9 + " [MASK]", "leaves no room"), ("", "no mask")]
)
def test_texts_that_cannot_be_filled(model: Decoder, tokenizer: Tokenizer, text: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        infill(model, tokenizer, [text])


def test_a_blank_without_room_is_left_empty_and_the_rest_is_kept(model: Decoder, tokenizer: Tokenizer) -> None:
    text = TEXT + " [MASK] and [MASK] then [MASK]"
    filled = infill(model, tokenizer, ["the [MASK]", text + " x" * 20], 90)
    assert filled[0] == infill(model, tokenizer, ["the [MASK]"], 90)[0]
    assert "context" in filled[1].reasons and filled[1].reasons[-1] == "context" and filled[1].spans[-1] == ""


def test_a_model_of_another_objective_is_refused(tokenizer: Tokenizer) -> None:
    config = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=300, max_seq_len=32)
    with pytest.raises(InputError, match="not trained for infilling"):
        infill(Decoder(config), tokenizer, ["a [MASK]"])


def test_the_command_fills_one_text_and_a_file(
    model: Decoder, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    words = ["infill", "--model", str(tmp_path / "model"), "--max-new-tokens", "5"]
    assert main([*words, "--text", "the [MASK] heron"]) == 0
    one = capsys.readouterr().out
    assert one.startswith("the") and one.endswith(" heron\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "the [MASK] heron"}\n{"text": "[gMASK]"}\n')
    assert main([*words, "--texts", str(tmp_path / "texts.jsonl")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["filled"] + "\n" == one and len(lines[0]["blanks"]) == len(lines[1]["finish_reasons"]) == 1
    assert main([*words]) == 1 and "either --text or --texts" in capsys.readouterr().err
