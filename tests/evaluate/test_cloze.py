"""Cloze questions: the score of an answer, the record as a text, fine-tuning by the command line, bad records."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.data.reading import Record
from minillama.data.records import Records
from minillama.data.sources import Source
from minillama.errors import InputError
from minillama.evaluate.cloze import Cloze
from minillama.evaluate.question import Question
from minillama.inference.infill import MaskedText
from minillama.layers.mask import Mask
from minillama.model import Decoder
from minillama.runs.config import load_run_config
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import BLANK_TOKENS, Blanks
from minillama.tokenizer.train import TokenizerTrainer
from minillama.training.objectives import make

GOOD, BAD = ["lovely", "fresh", "warm", "kind"], ["stale", "cold", "rude", "bitter"]
THINGS = ["soup", "host", "room", "bread", "song", "walk"]
FORMS = ["The {} was {} today.", "What a {}: {} all the way.", "My friend called the {} {}."]
QUESTION = Question("{text} It was [MASK].", ("positive=good", "negative=quite bad"))
WORDS = ["--objective.pattern", QUESTION.pattern, "--objective.verbalizers", *QUESTION.verbalizers]


def reviews() -> list[dict[str, str]]:
    """Sentences whose label hangs on one word; more of them are positive."""
    made = []
    for form, thing, word in product(FORMS, THINGS, GOOD + BAD[:3]):
        label = "positive" if word in GOOD else "negative"
        made.append({"text": form.format(thing, word), "label": label})
    return made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [record["text"] + " It was good. It was quite bad." for record in reviews()]
    made = TokenizerTrainer("byte-bpe", 340, special=BLANK_TOKENS)(texts)
    made.add_bos = False
    return made


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Decoder:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_seq_len": 64, "tie_embeddings": False}
    torch.manual_seed(1)
    return Decoder(ModelConfig.load("glm-tiny").changed({**shape, "vocab_size": tokenizer.vocab_size})).eval()


def write(path: Path, records: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_a_score_is_the_likelihood_of_the_whole_answer(model: Decoder, tokenizer: Tokenizer) -> None:
    cloze, blanks = Cloze(QUESTION, tokenizer, 64), Blanks.of(tokenizer)
    records = [Record({"text": "The soup was cold today."}, "1"), Record({"text": "A walk."}, "2")]
    scores = cloze.collate([cloze.layouts(record) for record in records]).scores(model).detach()
    for i, record in enumerate(records):
        before, after = tokenizer.encode(record.value["text"] + " It was"), tokenizer.encode(".")
        part_a, place = [*before, blanks.token, *after], len(before)
        for j, words in enumerate([" good", " quite bad"]):
            expected = 0.0
            read = [blanks.start]
            for token in [*tokenizer.encode(words), blanks.end]:
                places = [(k, 0) for k in range(len(part_a))] + [(place, k + 1) for k in range(len(read))]
                mask = Mask(prefix=torch.tensor([len(part_a)]))
                logits = model(torch.tensor([part_a + read]), positions=torch.tensor([places]).mT, mask=mask)[0, -1]
                expected += logits.log_softmax(-1)[token].item()
                read.append(token)
            assert float(scores[i, j]) == pytest.approx(expected, rel=1e-4)
    rows = list(cloze.log_probabilities(model, [cloze.layouts(record) for record in records]))
    torch.testing.assert_close(torch.tensor(rows), scores.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_a_long_record_loses_the_end_of_its_longest_field(tokenizer: Tokenizer) -> None:
    question = Question("{passage} So: {ask}? [MASK]", ("true=Yes", "false=No"))
    cloze = Cloze(question, tokenizer, 40)
    record = {"passage": "The soup was cold today. " * 20, "ask": "was the soup cold"}
    layouts = cloze.layouts(Record(record, ""))
    text = tokenizer.decode(layouts[0].tokens)
    assert text.startswith("The soup was cold") and "So: was the soup cold?" in text
    assert 30 < max(len(layout.tokens) for layout in layouts) < 40
    assert [cloze.label(Record({"label": value}, "")) for value in (True, False)] == [0, 1]


def test_a_mark_in_a_record_is_text(tokenizer: Tokenizer) -> None:
    cloze = Cloze(QUESTION, tokenizer, 64)
    tokens = cloze.layouts(Record({"text": "a [MASK] b {text} [gMASK]"}, ""))[0].tokens
    assert sum(token in Blanks.of(tokenizer).masks for token in tokens) == 1
    assert "{text}" in tokenizer.decode(tokens)


def test_fine_tuning_learns_and_classify_tells(
    model: Decoder, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    source = write(tmp_path / "reviews.jsonl", reviews())  # type: ignore[arg-type]
    words = ["--data.sources", source, "--data.val_fraction", "0.25", "--objective.name", "cloze"]
    words += ["--train.init_from", str(tmp_path / "base"), "--train.context", "0", *WORDS]
    words += ["--train.steps", "80", "--train.batch_size", "16", "--optim.lr", "3e-3", "--optim.muon_lr", "0"]
    words += ["--train.compile", "false", "--sample.max_new_tokens", "0", "--validate.every", "40"]
    words += ["--checkpoint.every", "40", "--train.dtype", "float32"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "val_accuracy" in line]
    assert measured[0]["val_accuracy"] < 0.8 and measured[-1]["val_accuracy"] == 1
    assert 0.4 < measured[-1]["val_majority"] < 0.8
    capsys.readouterr()
    ask = ["--pattern", QUESTION.pattern, "--verbalizers", *QUESTION.verbalizers]
    run = ["classify", "--model", str(tmp_path / "run/model"), *ask]
    assert main([*run, "--text", "The bread was lovely today.", "The song was rude today."]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["label"] for answer in answers] == ["positive", "negative"]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert main([*run, "--records", source]) == 0
    assert "accuracy 1.0000 of 126 records" in capsys.readouterr().err


def test_micro_batches_sum_to_the_whole(model: Decoder, tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = load_run_config(
        "tiny", ["--objective.name", "cloze", "--train.batch_size", "6", "--train.context", "64", *WORDS], "glm-tiny"
    )
    data = Records.load([Source(path=write(tmp_path / "r.jsonl", reviews()))], 0.2)  # type: ignore[arg-type]
    objective = make(config, model, tokenizer, data)
    batch = objective.batch(3)
    whole, metrics = objective.loss(batch)
    parts = [objective.loss(batch.rows(start, start + 2)) for start in (0, 2, 4)]
    torch.testing.assert_close(sum(part[0]["loss"] for part in parts), whole["loss"])
    assert batch.total("accuracy") == batch.total("loss") == 6
    assert sum(int(part[1]["accuracy"]) for part in parts) == int(metrics["accuracy"])


def test_records_are_read_once_an_epoch_and_held_out_by_their_content(tmp_path: Path) -> None:
    source = Source(path=write(tmp_path / "r.jsonl", reviews()))  # type: ignore[arg-type]
    data = Records.load([source], 0.2)
    count = len(data.train)
    assert count + len(data.val) == 126 and 10 < len(data.val) < 45
    steps = [data.batch(1, step, 1)[0].where for step in range(2 * count)]
    assert sorted(steps[:count]) == sorted(steps[count:]) == sorted(record.where for record in data.train)
    assert steps[:count] != steps[count:]
    fewer = Records.load([Source(path=write(tmp_path / "s.jsonl", reviews()[:100]))], 0.2)  # type: ignore[arg-type]
    assert {str(r.value) for r in fewer.val} <= {str(r.value) for r in data.val}
    assert fewer.fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("pattern", "verbalizers", "what"),
    [
        ("{text}", ("a=b", "c=d"), "exactly one"),
        ("{text} [MASK] [MASK]", ("a=b", "c=d"), "exactly one"),
        ("It was [MASK]", ("a=b", "c=d"), "names no plain field"),
        ("{a.b} [MASK]", ("a=b", "c=d"), "names no plain field"),
        ("{} [MASK]", ("a=b", "c=d"), "names no plain field"),
        ("{text!r} [MASK]", ("a=b", "c=d"), "names no plain field"),
        ("{text:d} [MASK]", ("a=b", "c=d"), "names no plain field"),
        ("[gMASK] {text} [MASK]", ("a=b", "c=d"), "exactly one"),
        ("{text} [MASK]", ("a= ", "c=d"), "without words"),
        ("{text} [MASK]", ("a=b", "c= b"), "the same words"),
        ("{text [MASK]", ("a=b", "c=d"), "braces do not match"),
        ("{text} [MASK]", ("a=b",), "needs two answers"),
        ("{text} [MASK]", ("a=b", "c"), "without words"),
        ("{text} [MASK]", ("a=b", "c=b"), "the same words"),
        ("{text} [MASK]", ("a=b", "a=c"), "the same label"),
    ],
)
def test_questions_that_are_none(pattern: str, verbalizers: tuple[str, ...], what: str) -> None:
    with pytest.raises(InputError, match=what):
        Question(pattern, verbalizers)


@pytest.mark.parametrize(
    ("record", "what", "reason"),
    [
        ({"label": "positive"}, "a field of the pattern is missing", "does not fit the question"),
        ({"text": 3, "label": "positive"}, "a field of the pattern is not a string", "does not fit the question"),
        ({"text": "a"}, "the record has no label", "does not fit the question"),
        ({"text": "a", "label": "so-so"}, "a label without a verbalizer", "does not fit the question"),
        ({"text": "a\ud800", "label": "positive"}, "not valid Unicode", "invalid Unicode"),
    ],
)
def test_records_that_do_not_fit_the_question(
    record: dict[str, object], what: str, reason: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    cloze = Cloze(QUESTION, tokenizer, 64)

    def check(one: Record) -> None:
        cloze.layouts(one), cloze.label(one)

    source = Source(path=write(tmp_path / "r.jsonl", [record, *reviews()]))  # type: ignore[list-item]
    with pytest.raises(InputError, match=what) as caught:
        Records.load([source], 0.2, "stop", check)
    assert "r.jsonl:1" in str(caught.value)
    data = Records.load([source], 0.2, "skip", check)
    assert data.skipped.counts == {reason: 1} and len(data.train) + len(data.val) == 126


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("r.jsonl", '{"text": "a"}\nnot json\n', "not JSON"),
        ("r.jsonl", "[1, 2]\n", "not a JSON object"),
        ("r.jsonl", '{"text": "a"}\n', "too few records"),
        ("r.txt", "a\n", "holds no records"),
    ],
)
def test_files_that_hold_no_records(name: str, text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=what):
        Records.load([Source(path=str(tmp_path / name))], 0.2)


def test_fine_tuning_without_a_model_or_a_question_is_refused(
    model: Decoder, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "r.jsonl", reviews())  # type: ignore[arg-type]
    words = ["--model.preset", "glm-tiny", "--data.sources", source, "--objective.name", "cloze"]
    assert main(["train", *words, *WORDS, "--out", str(tmp_path / "run")]) == 1
    assert "records train no tokenizer" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    words = ["--train.init_from", str(tmp_path / "base"), *words[2:]]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 1
    assert "there is no question" in capsys.readouterr().err


def test_a_bad_record_is_found_before_step_0(
    model: Decoder, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    source = write(tmp_path / "r.jsonl", [*reviews(), {"label": "positive"}])  # type: ignore[list-item]
    words = ["train", "--data.sources", source, "--objective.name", "cloze", "--train.init_from"]
    words += [str(tmp_path / "base"), *WORDS, "--train.steps", "1", "--sample.max_new_tokens", "0"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "r.jsonl:127, text" in said.err and "step 0" not in said.out
    assert main([*words, "--data.on_error", "skip", "--out", str(tmp_path / "run")]) == 0
    assert "1 document left out: 1 does not fit the question" in capsys.readouterr().out


def test_answers_that_are_the_same_tokens_are_refused() -> None:
    words = TokenizerTrainer("word", 0, special=BLANK_TOKENS)(["the soup was good"])
    with pytest.raises(InputError, match="cannot tell two answers apart"):
        Cloze(Question("{text} It was [MASK].", ("a=splendid", "b=horrid")), words, 64)


@pytest.mark.parametrize("kind", ["byte-bpe", "bpe", "unigram", "sentencepiece", "char", "bytes"])
def test_text_around_a_blank_is_cut_as_the_whole_text_is(kind: str) -> None:
    texts = [record["text"] + " It was good. It was quite bad, unreadable." for record in reviews()]
    made = TokenizerTrainer(kind, 330, special=BLANK_TOKENS)(texts)  # type: ignore[arg-type]
    made.add_bos = False
    cloze, blanks = Cloze(Question("{text} It was [MASK] today.", ("a=good", "b=bad")), made, 200), Blanks.of(made)
    layout = cloze.layouts(Record({"text": "The soup."}, ""))[0]
    place = layout.tokens.index(blanks.token)
    filled = [*layout.tokens[:place], *layout.tokens[layout.prefix + 1 :], *layout.tokens[place + 1 : layout.prefix]]
    assert filled == made.encode("The soup. It was good today.")
    cut = MaskedText("un[MASK]able", made)
    inside = made.encode_inside("able")
    assert cut.layout.tokens[-len(inside) :] == inside and made.decode([*made.encode("un"), *inside]) == "unable"


def test_classify_and_infill_name_what_is_wrong(
    model: Decoder, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ModelConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16, vocab_size=tokenizer.vocab_size, max_seq_len=32)
    Decoder(shape).save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    ask = ["--pattern", QUESTION.pattern, "--verbalizers", *QUESTION.verbalizers]
    assert main(["classify", "--model", str(tmp_path / "llama"), *ask, "--text", "a"]) == 1
    assert "not trained for infilling" in capsys.readouterr().err
    assert main(["classify", "--model", str(tmp_path / "llama"), "--text", "a"]) == 1
    assert "--pattern" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "glm")
    tokenizer.with_special(["extra"]).save(tmp_path / "glm")
    table = json.loads((tmp_path / "glm/tokenizer.json").read_text())
    table["added_tokens"][-1]["special"] = False  # a special one may lack its row
    (tmp_path / "glm/tokenizer.json").write_text(json.dumps(table))
    for words in (["classify", *ask, "--text", "a"], ["infill", "--text", "a [MASK]"]):
        assert main([*words, "--model", str(tmp_path / "glm")]) == 1
        assert "larger than the model's vocabulary" in capsys.readouterr().err
    tokenizer.save(tmp_path / "glm")
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n{"test": "b"}\n')
    assert main(["classify", "--model", str(tmp_path / "glm"), *ask, "--records", str(tmp_path / "r.jsonl")]) == 1
    assert "r.jsonl:2, text" in capsys.readouterr().err
    (tmp_path / "r.jsonl").write_text("\n")
    assert main(["classify", "--model", str(tmp_path / "glm"), *ask, "--records", str(tmp_path / "r.jsonl")]) == 1
    assert "holds no record" in capsys.readouterr().err
