"""GLM's blank infilling: spans, the layout of a row, who sees whom, the loss."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from minillama.config import ModelConfig
from minillama.data.corpus import Corpus, Split
from minillama.data.shards import Shard
from minillama.errors import InputError
from minillama.evaluate.likelihood import score
from minillama.layers.cache import CacheRange as Slots
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.runs.config import load_run_config
from minillama.runs.objectives import GLMConfig
from minillama.tokenizer.blanks import BLANK_TOKENS, Blanks, Layout
from minillama.tokenizer.train import TokenizerTrainer
from minillama.training.gradients import accumulate
from minillama.training.objectives.glm import BlankInfilling, Example
from minillama.training.spans import documents, long_span, sentence_ends, sentence_spans, short_spans, span_lengths

BLANKS = Blanks(token=90, sentence=91, document=92, start=93, end=94)
SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 97, "max_seq_len": 64}
MODEL = ModelConfig.load("glm-tiny").changed({**SHAPE, "tie_embeddings": False})


@pytest.fixture
def corpus() -> Corpus:
    ids = np.random.default_rng(0).integers(1, 90, 4000)
    ids[::150] = 0
    splits = [Split([Shard(Path("x"), ids.astype(np.uint16))], 97, 9000, "test")]
    return Corpus(splits, splits, separator=0)


def objective(
    context: int = 64, model: Decoder | None = None, data: Corpus | None = None, seed: int = 1, **config: float
) -> BlankInfilling:
    ends = np.zeros(97, bool)
    ends[[5, 17, 33, 60]] = True
    over = model or Decoder(MODEL), data or Corpus([], [], separator=0), seed, 6, context
    return BlankInfilling(*over, BLANKS, ends, 0, GLMConfig(**config))


# ---------------------------------------------------------------- the worked example of the paper, §2.1 and figure 2


def test_the_worked_example_token_by_token() -> None:
    text = np.array([10, 11, 12, 13, 14, 15])
    example = Example(text, [(4, 6), (2, 3)], BLANKS.token, BLANKS)  # the second span comes first
    assert example.layout.tokens == [10, 11, 90, 13, 90, 93, 14, 15, 93, 12]
    assert example.layout.positions == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3), (2, 1), (2, 2)]
    assert example.layout.prefix == 5
    assert example.targets == [0, 0, 0, 0, 0, 14, 15, 94, 12, 94]


def test_the_worked_example_mask_cell_by_cell() -> None:
    batch = objective(10).collate([Example(np.arange(10, 16), [(4, 6), (2, 3)], BLANKS.token, BLANKS)])
    allowed = batch.mask.for_kernel(Slots(0, 10, 10), torch.device("cpu")).allowed
    assert allowed is not None
    part_a = "1111100000"
    expected = [*[part_a] * 5, "1111110000", "1111111000", "1111111100", "1111111110", "1111111111"]
    assert ["".join(map(str, row)) for row in allowed[0, 0].int().tolist()] == expected
    assert batch.weights.tolist() == [[0] * 5 + [1] * 5]
    assert batch.positions is not None
    assert batch.positions[0].tolist() == [[0, 1, 2, 3, 4, 4, 4, 4, 2, 2], [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]]


# ---------------------------------------------------------------------------------------------------- which spans


def test_the_lengths_are_poisson_without_zero() -> None:
    weights = span_lengths(3)
    expected = [0.157187, 0.235781, 0.235781, 0.176835, 0.106101, 0.053051]
    assert weights[:6] == pytest.approx(expected, abs=1e-6)
    assert weights @ np.arange(1, 40) == pytest.approx(3.157187, abs=1e-6)


def test_short_spans_cover_their_share_with_a_token_between() -> None:
    separators = np.zeros(400, bool)
    separators[[100, 101, 300]] = True
    for seed in range(50):
        spans = short_spans(separators, 0.15, 3, np.random.default_rng(seed))
        assert all(left[1] < right[0] for left, right in pairwise(spans))
        for start, stop in documents(separators):
            covered = sum(b - a for a, b in spans if start <= a < stop)
            assert int(0.15 * (stop - start)) <= covered < int(0.15 * (stop - start)) + 39
        assert not any(separators[a:b].any() for a, b in spans)


def test_every_layout_of_short_spans_is_equally_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    only_two = np.zeros(39)
    only_two[1] = 1
    monkeypatch.setattr("minillama.training.spans.span_lengths", lambda mean: only_two)
    drawn = Counter(tuple(short_spans(np.zeros(9, bool), 0.45, 3, np.random.default_rng(seed))) for seed in range(3000))
    ways = [((a, a + 2), (b, b + 2)) for a, b in combinations(range(8), 2) if a + 2 < b]
    assert set(drawn) == set(ways)
    assert max(drawn.values()) < 1.3 * min(drawn.values())


def test_sentences_are_whole() -> None:
    ends, separators = np.zeros(60, bool), np.zeros(60, bool)
    ends[[9, 14, 29, 44]], separators[50] = True, True
    whole = {(10, 15), (15, 30), (30, 45), (45, 50)}  # the first may have begun earlier, the last may go on
    seen = set()
    for seed in range(40):
        spans = sentence_spans(ends, separators, 0.15, np.random.default_rng(seed))
        assert sum(b - a for a, b in spans) >= 9 and spans == sorted(spans)
        seen |= set(spans)
    assert seen == whole


def test_a_long_span_has_half_of_the_document_or_more() -> None:
    separators = np.zeros(100, bool)
    separators[20] = True
    spans = [long_span(separators, 0.5, 0.5, np.random.default_rng(seed))[0] for seed in range(400)]
    lengths = [stop - start for start, stop in spans]
    assert min(lengths) == 39 and max(lengths) == 77 and all(start > 20 for start, _ in spans)
    assert 0.5 < sum(stop == 100 for _, stop in spans) / 400 < 0.65


def test_the_ends_of_sentences_are_read_from_the_vocabulary() -> None:
    made = TokenizerTrainer("char", 0, special=BLANK_TOKENS)(["a b. c? d\n, \u3002x"])
    found = sentence_ends(made, 64)
    names = {made.backend.id_to_token(i) for i in np.flatnonzero(found).tolist()}
    assert names == {".", "?", "\n", "\u3002"} and len(found) == 64


# ------------------------------------------------------------------------------------------------ batches and loss


@pytest.mark.parametrize("kind", ["tokens", "sentences", "document"])
def test_a_batch_fits_and_gives_the_text_back(corpus: Corpus, kind: str) -> None:
    made = objective(data=corpus, seed=3, **{"tokens": 0.0, "sentences": 0.0, "document": 0.0, kind: 1.0})
    windows = corpus.batch(3, 7, 6, made.window)[:, : made.window if kind == "document" else made.short]
    batch = made.batch(7)
    assert batch.tokens.shape == batch.targets.shape == (6, 64)
    for row, text in enumerate(windows):
        assert batch.mask.prefix is not None
        prefix = int(batch.mask.prefix[row])
        used = int(batch.weights[row].sum())
        part_a, part_b = batch.tokens[row, :prefix].tolist(), batch.tokens[row, prefix : prefix + used].tolist()
        fills: list[list[int]] = []
        places: list[int] = []
        for slot, token in enumerate(part_b, prefix):
            if token == BLANKS.start:
                fills.append([])
                places.append(int(batch.positions[row, 0, slot]))  # type: ignore[index]
            else:
                fills[-1].append(token)
        filled = {place: ids for place, ids in zip(places, fills, strict=True)}
        whole = [part for i, token in enumerate(part_a) for part in (filled.get(i, [token]))]
        assert whole == text.tolist()
        assert {part_a[i] for i in filled} <= set(BLANKS.masks)


def test_windows_reach_to_the_context(corpus: Corpus) -> None:
    made = objective(data=corpus, document=1.0, tokens=0.0, sentences=0.0)
    batches = [made.batch(step) for step in range(20)]
    assert max(int(b.positions[:, 1].max()) for b in batches if b.positions is not None) > 55
    short = objective(data=corpus)
    assert short.short < 62 == short.window
    assert all((short.batch(step).weights.sum(1) > 0).all() for step in range(20))


def test_text_without_sentences_gets_short_spans(corpus: Corpus) -> None:
    made = objective(data=corpus, tokens=0, document=0)
    made.ends = np.zeros(97, bool)
    batches = [made.batch(step) for step in range(10)]
    assert sum(float(b.weights.sum()) for b in batches) / 60 > 8
    assert all(not ((b.targets == 0) & (b.weights > 0)).any() for b in batches)  # no separator is predicted


def test_a_batch_is_a_function_of_seed_and_step(corpus: Corpus) -> None:
    one, again, other = (objective(data=corpus, seed=3).batch(step) for step in (7, 7, 8))
    assert torch.equal(one.tokens, again.tokens) and torch.equal(one.targets, again.targets)
    assert not torch.equal(one.tokens, other.tokens)


def test_all_kinds_of_masks_occur_in_their_shares(corpus: Corpus) -> None:
    batches = [objective(data=corpus).batch(step) for step in range(40)]
    rows = torch.cat([batch.tokens for batch in batches])
    shares = [float((rows == mask).any(1).float().mean()) for mask in BLANKS.masks]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.1)


def test_the_loss_is_the_sum_over_the_blanks(corpus: Corpus) -> None:
    torch.manual_seed(0)
    model = Decoder(MODEL)
    made = objective(model=model, data=corpus)
    batch = made.batch(2)
    loss, weight = made.loss(batch)[0]["loss"], batch.total("loss")
    expected = torch.zeros(())
    for row in range(6):  # each row alone, without padding
        size = int((batch.weights[row].nonzero().max() + 1).item())
        assert batch.positions is not None
        part = batch.rows(row, row + 1)
        assert part.positions is not None
        logits = model(part.tokens[:, :size], positions=part.positions[..., :size], mask=part.mask)[0].log_softmax(-1)
        chosen = part.weights[0, :size] > 0
        expected = expected - logits[chosen].gather(-1, part.targets[0, :size][chosen, None]).sum()
    torch.testing.assert_close(loss, expected)
    assert weight == batch.weights.sum()


def test_micro_batches_change_nothing(corpus: Corpus) -> None:
    """Rows of very unequal numbers of masked tokens: sums over the batch, and no means of means."""
    found = []
    for micro in (6, 4, 1):
        torch.manual_seed(0)
        made = objective(model=Decoder(MODEL), data=corpus)
        losses = accumulate(made, made.batch(2), micro, torch.device("cpu"))
        found.append((losses.loss, [p.grad for p in made.model.parameters()]))
    counts = made.batch(2).weights.sum(1)
    assert counts.max() > 2 * counts.min()
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        torch.testing.assert_close(gradients, found[0][1], atol=1e-6, rtol=1e-4)


def test_part_a_sees_nothing_of_part_b() -> None:
    model = Decoder(MODEL)
    batch = objective(16).collate([Example(np.arange(10, 22), [(8, 12), (2, 4)], BLANKS.token, BLANKS)])
    changed = batch.tokens.clone()
    changed[0, 11] = 50  # the second token of the first blank
    before, after = (model(tokens, positions=batch.positions, mask=batch.mask)[0] for tokens in (batch.tokens, changed))
    moved = (before - after).abs().amax(-1) > 0
    assert moved.tolist() == [False] * 11 + [True] * 5


def test_the_first_token_of_the_text_sees_its_end() -> None:
    model = Decoder(MODEL)
    batch = objective(16).collate([Example(np.arange(10, 22), [(2, 4)], BLANKS.token, BLANKS)])
    changed = batch.tokens.clone()
    changed[0, 10] = 50
    before, after = (model(tokens, positions=batch.positions, mask=batch.mask)[0] for tokens in (batch.tokens, changed))
    assert (before[0] - after[0]).abs().max() > 0


def test_held_out_blanks_are_the_same_every_time(corpus: Corpus) -> None:
    made = objective(data=corpus)
    first = made.validate(4, 600)
    assert first == made.validate(4, 600)
    assert first["val_loss"] == pytest.approx(made.validate(5, 600)["val_loss"], rel=1e-5)


def test_processes_share_a_batch(corpus: Corpus) -> None:
    made = objective(data=corpus)
    whole, parts = made.batch(3), [made.batch(3, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert [part.total("loss") for part in parts] == [whole.weights.sum().item()] * 2


# --------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("preset", "words", "what"),
    [
        ("glm-tiny", ["--objective.name", "lm"], "made for another objective"),
        ("llama-tiny", ["--objective.name", "glm"], "made for another objective"),
        ("llama-tiny", ["--objective.name", "cloze"], "made for another objective"),
        ("glm-tiny", ["--train.context", "4"], "no masked span fits"),
        ("glm-tiny", ["--objective.pattern", "{a} [MASK]"], "unknown key 'pattern'"),
        ("glm-tiny", ["--data.mask_documents", "true"], "read the whole sequence"),
        (
            "glm-tiny",
            ["--objective.tokens", "0", "--objective.sentences", "0", "--objective.document", "0"],
            "needs a weight",
        ),
    ],
)
def test_what_excludes_blank_infilling_is_refused(preset: str, words: list[str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        load_run_config("tiny", words, preset)


def test_auto_and_the_name_mean_the_same() -> None:
    assert load_run_config("tiny", [], "chatglm-tiny").objective.name == "glm"
    assert load_run_config("tiny", ["--objective.name", "glm"], "glm-tiny").objective.name == "glm"
    assert load_run_config("tiny", ["--objective.name", "lm"], "chatglm2-tiny").objective.name == "lm"


def test_a_tokenizer_without_marks_is_named() -> None:
    with pytest.raises(InputError, match="no special tokens for infilling"):
        Blanks.of(TokenizerTrainer("bytes")([]))


@pytest.mark.parametrize("kind", ["byte-bpe", "bpe", "unigram", "sentencepiece", "wordpiece", "word", "char", "bytes"])
def test_every_kind_of_tokenizer_takes_the_marks(kind: str, tmp_path: Path) -> None:
    from minillama.tokenizer import Tokenizer

    texts = ["the grey heron stands in the shallow water, waiting; the fish are late.\n" * 20, "abcdefghij klmnopq"]
    made = TokenizerTrainer(kind, 300, special=BLANK_TOKENS)(texts)  # type: ignore[arg-type]
    blanks = Blanks.of(made)
    assert sorted([*blanks.masks, blanks.start, blanks.end]) == list(range(made.vocab_size - 5, made.vocab_size))
    assert made.vocab_size <= (300 if kind != "bytes" else 262)
    made.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert Blanks.of(again) == blanks
    assert again.encode("heron [MASK]") == made.encode("heron [MASK]")
    assert blanks.token not in made.encode("heron [MASK]")  # a text's own brackets are text


def test_a_layout_counts_the_places_in_a_blank() -> None:
    layout = Layout.of([7, 90, 8]).fill(1, [93, 5])
    assert layout.positions == [(0, 0), (1, 0), (2, 0), (1, 1), (1, 2)] and layout.prefix == 3


def test_a_text_is_scored_from_left_to_right_as_one_blank(corpus: Corpus) -> None:
    model = Decoder(MODEL)
    window = corpus.batch(1, 1, 2, 20)
    pairs = [[(row[:1], row[1:])] for row in window.tolist()]
    found = [likelihoods[0].nats for _, likelihoods in score(model, pairs, BLANKS)]
    nats = 0.0
    for row in window.tolist():
        for size in range(1, len(row)):  # one prediction after another
            layout = Layout.of([row[0], BLANKS.document]).fill(1, [BLANKS.start, *row[1:size]])
            places = torch.tensor([layout.positions]).mT
            logits = model(torch.tensor([layout.tokens]), positions=places, mask=Mask(prefix=torch.tensor([2])))
            nats -= logits[0, -1].log_softmax(-1)[row[size]].item()
    assert -sum(found) == pytest.approx(nats, rel=1e-5)
