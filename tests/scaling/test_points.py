"""Tables of runs: CSV files, run folders that were really trained, and runs that do not compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minillama.commands.cli import main
from minillama.config import ModelConfig
from minillama.errors import InputError
from minillama.scaling.points import BITS, NATS, counts, read_csv, read_runs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params,tokens,loss\n2e6,4e7,3.5\n", (2e6, 4e7, 4.8e14, 3.5)),
        ("name,N,C,val_loss\na,2e6,4.8e14,3.5\n", (2e6, 4e7, 4.8e14, 3.5)),
        ("Training FLOP,D,loss\n4.8e14,4e7,3.5\n\n", (2e6, 4e7, 4.8e14, 3.5)),
        ("n,d,c,loss\n2e6,4e7,5e14,3.5\n", (2e6, 4e7, 5e14, 3.5)),
    ],
)
def test_two_sizes_give_the_third(tmp_path: Path, text: str, expected: tuple[float, ...]) -> None:
    (tmp_path / "runs.csv").write_text(text)
    (point,) = read_csv(tmp_path / "runs.csv").points
    assert (point.params, point.tokens, point.flops, point.loss) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params,tokens\n1,2\n", "columns are missing"),
        ("params,loss\n1,2\n", "columns are missing"),
        ("", "columns are missing"),
        ("params,tokens,loss\n", "no runs in the table"),
        ("params,tokens,loss\n1,2,3\n1,x,3\n", "runs.csv:3, tokens"),
        ("params,tokens,loss\n1,2,-3\n", "runs.csv:2, loss"),
        ("params,tokens,loss\n1,2\n", "runs.csv:2, loss"),
        ("params,tokens,loss\n1,2,nan\n", "runs.csv:2, loss"),
    ],
)
def test_a_table_is_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_csv(tmp_path / "runs.csv")


# dim, layers, heads, head width of Chinchilla's Table A4, and the ratio of its FLOPs to 6ND
TABLE_A4 = [
    (640, 10, 10, 64, 1.026),
    (1024, 20, 16, 64, 1.102),
    (1280, 24, 10, 128, 1.084),
    (1792, 26, 14, 128, 1.045),
    (2048, 28, 16, 128, 1.033),
    (3584, 40, 28, 128, 0.994),
]


@pytest.mark.parametrize(("d", "layers", "heads", "width", "ratio"), TABLE_A4)
def test_flops_are_chinchillas(d: int, layers: int, heads: int, width: int, ratio: float) -> None:
    """Their count without embedding and logits, which the table leaves out: the whole square of scores, the softmax."""
    shape = ModelConfig(
        dim=d, n_layers=layers, n_heads=heads, head_dim=width, hidden_dim=4 * d, mlp="gelu", vocab_size=32000
    )
    length, inner = 2048, heads * width
    ours = length * shape.flops_per_token(length) - 3 * length * 2 * 32000 * d
    other_half = 3 * layers * (4 * length * length * inner - 2 * length * (length + 1) * inner)
    softmax = 3 * layers * 3 * heads * length * length
    params = layers * (5 * d * inner + 8 * d * d) + 32000 * d
    assert (ours + other_half + softmax) / (6 * params * length) == pytest.approx(ratio, abs=6e-4)


def test_three_counts() -> None:
    shape = ModelConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=2048)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 192 + 2 * 64
    head, norm = 2048 * 64, 64
    assert counts(shape) == {"head": 3 * block + head + norm, "all": 3 * block + 2 * head + norm, "matrices": 3 * block}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("\n".join(f"Line {i} of {i * i % 91}, the tide is in." for i in range(400)))
    for name, dim, steps in (("a", 16, 6), ("b", 32, 9)):
        words = [
            "train",
            "--model.dim",
            str(dim),
            "--model.n_layers",
            "1",
            "--model.n_heads",
            "2",
            "--model.n_kv_heads",
        ]
        words += ["2", "--model.hidden_dim", "24", "--model.vocab_size", "300", "--model.max_seq_len", "16"]
        words += ["--train.steps", str(steps), "--train.batch_size", "2", "--validate.every", "9"]
        words += ["--data.sources", str(folder / "text.txt"), "--data.cache", str(folder / "cache")]
        words += ["--sample.max_new_tokens", "0", "--train.compile", "false", "--optim.warmup_steps", "1"]
        assert main([*words, "--out", str(folder / name)]) == 0
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "runs")
    return tmp_path / "runs"


def test_run_folders(runs: Path) -> None:
    table = read_runs([runs])
    assert [point.name for point in table.points] == ["a", "b"] and not table.notes and table.unit == NATS
    for point, dim, steps in zip(table.points, (16, 32), (6, 9), strict=True):
        last = json.loads((runs / point.name / "metrics.jsonl").read_text().splitlines()[-1])
        shape = ModelConfig.load(runs / point.name / "model")
        assert shape.dim == dim and point.tokens == steps * 2 * 16 == last["tokens"]
        assert point.flops == point.tokens * shape.flops_per_token(16)
        assert point.counts == tuple(counts(shape).values()) and point.params == shape.num_params(embedding=False)
        assert point.loss == last["val_loss"] and point.measures == (last["val_loss"], last["val_bits_per_byte"])
    bits = read_runs([runs / "b", runs / "a"], "bits")
    assert bits.unit == BITS and bits.points[0].loss == table.points[1].measures[1]
    assert bits.counted("all").points[0].params == table.points[1].counts[1]


def change(path: Path, *pairs: tuple[str, str]) -> None:
    text = path.read_text()
    for before, after in pairs:
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)


def test_what_is_no_finished_run_is_left_out(runs: Path) -> None:
    change(runs / "a/config.toml", ("steps = 6", "steps = 7"))
    table = read_runs([runs])
    assert [point.name for point in table.points] == ["b"]
    assert "a was left out: stopped after step 6" in table.notes[0]
    change(runs / "a/config.toml", ("steps = 7", "steps = 6"), ('init_from = ""', 'init_from = "x"'))
    assert "another model's weights" in read_runs([runs]).notes[0]


def test_a_run_is_one_point_whatever_its_name(runs: Path) -> None:
    """Named twice it counts once, and an unfinished run of its name in another folder is another one."""
    assert len(read_runs([runs, runs / "a", runs / "b/../a"]).points) == 2
    shutil.copytree(runs / "a", runs / "other/a")
    change(runs / "other/a/config.toml", ("steps = 6", "steps = 7"))
    table = read_runs([runs, runs / "other"])
    assert [point.name for point in table.points] == ["a", "b"] and len(table.notes) == 1
    with pytest.raises(InputError, match=r"no finished run[^$]*a was left out: stopped"):
        read_runs([runs / "other"])


def test_a_loss_that_is_no_number_is_left_out(runs: Path) -> None:
    change(runs / "a/metrics.jsonl", ('"val_bits_per_byte": ', '"val_bits_per_byte": NaN, "x": '))
    table = read_runs([runs])
    assert [point.name for point in table.points] == ["b"] and "its held-out loss is nan" in table.notes[0]


@pytest.mark.parametrize("file", ["a/metrics.jsonl", "a/provenance.jsonl"])
def test_damaged_runs_are_named(runs: Path, file: str) -> None:
    change(runs / file, ('"tokens": ', '"x": ') if "metrics" in file else ('"tokenizer": ', '"x": '))
    with pytest.raises(InputError, match="damaged"):
        read_runs([runs])


def test_a_learning_rate_that_did_not_decay_is_noted(runs: Path) -> None:
    lines = [json.loads(line) for line in (runs / "a/metrics.jsonl").read_text().splitlines()]
    flat = [line | ({"lr": 1e-3} if "lr" in line else {}) for line in lines]
    (runs / "a/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in flat))
    (note,) = read_runs([runs]).notes
    assert note.startswith("a: the learning rate did not decay")


def edited(folder: Path, key: str) -> Callable[[], None]:
    def edit() -> None:
        path = folder / "a/provenance.jsonl"
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {key: "other"}) + "\n")

    return edit


def test_runs_that_do_not_compare_are_refused(runs: Path) -> None:
    edited(runs, "data")()
    with pytest.raises(InputError, match="different data"):
        read_runs([runs])
    edited(runs, "tokenizer")()
    with pytest.raises(InputError, match="different tokenizers"):
        read_runs([runs])
    assert len(read_runs([runs], "bits").points) == 2  # which compare
    change(runs / "a/config.toml", ("val_fraction = 0.05", "val_fraction = 0.1"))
    with pytest.raises(InputError, match="different data"):
        read_runs([runs], "bits")


def test_other_contexts_are_refused(runs: Path) -> None:
    change(runs / "a/config.toml", ("context = 0", "context = 8"))
    with pytest.raises(InputError, match="held-out losses are of different text"):
        read_runs([runs])
