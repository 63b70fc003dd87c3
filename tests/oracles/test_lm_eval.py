"""Our scorer, and lm-evaluation-harness over our adapter, against the harness's own Hugging Face backend."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from minillama import Decoder, ModelConfig
from minillama.errors import InputError
from minillama.evaluate.multiple_choice import outcomes
from minillama.evaluate.tasks import NINE, TASKS
from minillama.formats.open import open_model
from minillama.inference.generate import Completion
from minillama.inference.load import ModelArgs
from minillama.tokenizer import Tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow  # the import alone takes eight seconds
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXTS = [
    "The tide comes in, and the boats turn. ",
    "One line.\nAnother line, with 12 words or so, it seems to me. " * 6,
]


@pytest.fixture(scope="module")
def sets() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return import_module("harness_sets")
    finally:
        sys.path.remove(str(BENCHMARKS))


def backends(folder: Path) -> tuple[Any, Any]:
    """The harness's own model of a folder, and ours in the harness."""
    from lm_eval.models.huggingface import HFLM

    from minillama.evaluate.lm_eval import HarnessModel

    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)
    return theirs, HarnessModel(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights behind SmolLM2's vocabulary."""
    return write(tmp_path_factory.mktemp("small"), Tokenizer.load(smollm2))


@pytest.fixture(scope="module")
def llama(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights behind Llama 2's vocabulary, whose tokenizer adds bos."""
    tokenizer = Tokenizer.load(shared / "tokenizer/llama2/tokenizer.model")
    assert tokenizer.add_bos
    return write(tmp_path_factory.mktemp("llama"), tokenizer)


def write(folder: Path, tokenizer: Tokenizer) -> Path:
    shape = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 512}
    model = Decoder(ModelConfig(vocab_size=tokenizer.vocab_size, **shape))
    model.init_weights(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    tokenizer.save(folder, 512)
    return folder


def compare(
    sets: Any, data: Path, folder: Path, models: tuple[Any, ...], name: str, limit: int, shots: int | None
) -> None:
    """Sums per choice to 1e-4, and the same choices, of both backends and of our scorer."""
    draws = bool(shots) and not TASKS[name].first  # examples come from the whole file
    tasks = sets.write_tasks(data, folder, [name], 0 if draws else limit)[name]
    theirs, adapter = (sets.evaluate(model, folder, tasks, shots, limit if draws else None) for model in models)
    expected = sets.sums(theirs, tasks)
    assert len(expected) == limit
    for row, own in zip(expected, sets.sums(adapter, tasks), strict=True):
        assert own == pytest.approx(row, rel=1e-4)
    items = TASKS[name].load(data, "lm-eval", shots, limit)
    found = {one.id: one for one in outcomes(models[1].model, models[1]._tokenizer, name, items)}
    # theirs are task by task, ours by subject and number
    order = sorted(found, key=lambda key: (key.rpartition("/")[0], int(key.rpartition("/")[2])))
    for key, row in zip(order, expected, strict=True):
        assert found[key].nats == pytest.approx(row, rel=1e-4)
    for metric in ("acc", "acc_norm"):
        value = sets.accuracy(theirs, tasks, metric)
        if value is not None and metric in found[order[0]].metrics:
            assert sum(one.is_right(metric) for one in found.values()) / limit == pytest.approx(value)


@pytest.mark.parametrize(("shots", "names"), [(0, NINE), (0, ("cmmlu",)), (5, ("mmlu",)), (2, ("piqa", "winogrande"))])
def test_all_sets_on_a_small_model(
    shots: int, names: tuple[str, ...], sets: Any, shared: Path, small: Path, tmp_path: Path
) -> None:
    models = backends(small)
    for name in names:
        (tmp_path / name).mkdir()
        compare(sets, shared / "eval", tmp_path / name, models, name, 6, shots)


def test_rolling_sums_and_generation_on_a_small_model(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval.api.instance import Instance

    theirs, ours = backends(small)
    rolling = [Instance("loglikelihood_rolling", {}, (text * 3,), i) for i, text in enumerate(TEXTS)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), rel=1e-4)
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(TEXTS)]
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    assert "2 of 2 answers were cut at their maximum length" in capsys.readouterr().err
    long = [Instance("loglikelihood", {}, (text * 9, " it"), i) for i, text in enumerate(TEXTS)]
    for own, other in zip(ours.loglikelihood(long), theirs.loglikelihood(long), strict=True):
        assert own[0] == pytest.approx(other[0], rel=1e-4)
    assert "1 of 2 contexts were cut on the left" in capsys.readouterr().err
    empty = [Instance("loglikelihood", {}, ("", " alone"), 0), Instance("loglikelihood", {}, (" ", "blank"), 1)]
    assert ours.loglikelihood(empty[:1])[0] == pytest.approx(theirs.loglikelihood(empty[:1])[0], rel=1e-4)
    assert len(ours.loglikelihood(empty)) == 2  # a context of blanks alone stops the harness's backend


def test_prompts_that_are_cut_are_said(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness's own backend cuts them too, and asserts that there is room for one token."""
    from lm_eval.api.instance import Instance

    theirs, ours = backends(small)
    settings = {"until": ["\n\n"], "max_gen_toks": 500, "do_sample": False}
    (one,) = [Instance("generate_until", {}, (TEXTS[1], settings), 0)]
    assert ours.generate_until([one])[0].startswith(theirs.generate_until([one])[0][:200])
    assert "1 of 1 contexts were cut on the left" in capsys.readouterr().err
    full = Instance("generate_until", {}, (TEXTS[0], settings | {"max_gen_toks": 512}), 0)
    with pytest.raises(InputError, match="no room for a prompt") as error:
        ours.generate_until([full])
    assert error.value.found == 512
    with pytest.raises(AssertionError, match="must be less than"):
        theirs.generate_until([full])


def test_arguments_of_another_name_are_refused() -> None:
    """Not one is dropped that would change a result."""
    from minillama.evaluate.lm_eval import HarnessModel

    for name in ("adaptor", "max_length", "add_bos_token"):
        with pytest.raises(InputError, match="no such argument") as error:
            HarnessModel("nowhere", max_batch_size=4, trust_remote_code=True, **{name: 1})
        assert error.value.found == name


def test_a_tokenizer_that_adds_bos(sets: Any, shared: Path, llama: Path, tmp_path: Path) -> None:
    """Contexts and generation as the harness; its rolling sums count the bos that the tokenizer adds, ours do not."""
    from lm_eval.api.instance import Instance

    models = theirs, ours = backends(llama)
    for name in ("piqa", "winogrande", "mmlu", "hellaswag"):
        (tmp_path / name).mkdir()
        compare(sets, shared / "eval", tmp_path / name, models, name, 4, 0)
    settings = {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(TEXTS)]
    # the harness decodes new tokens by themselves, where the library drops the space in front of the first word
    assert [text.removeprefix(" ") for text in ours.generate_until(asked)] == theirs.generate_until(asked)
    (own,), (other,) = (
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXTS[0],), 0)]) for model in (ours, theirs)
    )
    with torch.inference_mode():
        ids = torch.tensor([[1, 1, *ours._tokenizer.encode(TEXTS[0])]])
        twice = ours.model(ids[:, :-1])[0].log_softmax(-1).gather(1, ids[0, 1:, None])
        once = ours.model(ids[:, 1:-1])[0].log_softmax(-1).gather(1, ids[0, 2:, None])
    assert own == pytest.approx(once.sum().item(), rel=1e-4) and other == pytest.approx(twice.sum().item(), rel=1e-4)


def test_new_tokens_under_every_name_of_the_harness(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance

    from minillama.evaluate import lm_eval

    counts: list[int] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, count: int, *rest: Any, **named: Any) -> list[Completion]:
        counts.append(count)
        return [Completion("", (), "stop")] * len(prompts)

    monkeypatch.setattr(lm_eval, "generate", generate)
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    asked: list[dict[str, Any]] = [{"until": "\n"}, *({"until": None, name: 3} for name in names)]
    ours = lm_eval.HarnessModel(str(small), dtype="float32", device="cpu")
    assert ours.generate_until([Instance("generate_until", {}, ("a", one), 0) for one in asked]) == [""] * 5
    assert counts == [256, 3, 3, 3, 3]


def test_real_weights(sets: Any, shared: Path, smollm2: Path, tmp_path: Path) -> None:
    model, tokenizer = Decoder.from_pretrained(open_model(smollm2), torch.float32), Tokenizer.load(smollm2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model", model.config.max_seq_len)
    known = {"arc_challenge": [-23.2584, -18.1058, -23.2850, -26.6663], "winogrande": [-27.4235, -25.0686]}
    loaded = ModelArgs(str(tmp_path / "model")).load()
    for name, expected in known.items():
        (found,) = outcomes(*loaded, name, TASKS[name].load(shared / "eval", "lm-eval", 0, 1))
        assert found.nats == pytest.approx(expected, abs=0.02)
    models = backends(tmp_path / "model")
    (tmp_path / "piqa").mkdir()
    compare(sets, shared / "eval", tmp_path / "piqa", models, "piqa", 2, 0)


def test_the_harness_s_own_command_line(sets: Any, shared: Path, small: Path, tmp_path: Path) -> None:
    sets.write_tasks(shared / "eval", tmp_path, ["piqa"], 3)
    command = [sys.executable, "-m", "minillama.evaluate.lm_eval", "run", "--model", "minillama"]
    command += ["--model_args", f"path={small}", "--tasks", "local_piqa", "--include_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "local_piqa" in done.stdout and "acc_norm" in done.stdout
