"""The step in C++ against the layers in float32: every kind of weight, rows of unequal length, windows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama.config import ModelConfig, RopeScaling
from minillama.formats.open import open_model
from minillama.inference.engine import Engine
from minillama.inference.load import load_model
from minillama.inference.quantize import quantize
from minillama.inference.request import Request
from minillama.inference.sampling import Sampling
from minillama.layers.mask import Mask
from minillama.layers.quantized_linear import Quantization
from minillama.model import Decoder
from minillama.native import build
from minillama.native.decode import NativeStep, unsupported
from minillama.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not build.can_build(), reason="no C++ compiler, or not Linux")

# 6 query heads on 2 key/value heads of another width than D / H; a vocabulary that is no multiple of 4 rows
CONFIG = ModelConfig(
    dim=64,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    head_dim=16,
    hidden_dim=160,
    vocab_size=83,
    max_seq_len=64,
    rope_theta=500.0,
)


def model(dtype: torch.dtype = torch.float32, kind: Quantization = "none", **changes: object) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(replace(CONFIG, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in decoder.parameters():  # norms that are no ones, biases that are no zeros
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return quantize(decoder.to(dtype).fuse(), kind)


def exact(found: Decoder) -> Decoder:
    """The same weights, multiplied out, with the layers in float32."""
    twin = Decoder(found.config).fuse()
    with torch.no_grad():
        for name, part in twin.named_modules():
            other = found.get_submodule(name) if name else found
            if isinstance(part, torch.nn.Linear) and part is not twin.lm_head:
                part.weight.copy_(other.weight)
                if part.bias is not None:
                    part.bias.copy_(other.bias)
            elif hasattr(part, "weight") and part is not twin.lm_head:
                part.weight.copy_(other.weight)
    head = found.lm_head if found.lm_head is not None else found.model.embed_tokens
    twin.lm_head = torch.nn.Linear(found.config.dim, found.config.vocab_size, bias=False)
    twin.lm_head.weight = torch.nn.Parameter(head.weight.detach().float().clone())
    return twin


INTEGERS = {"none": 1e-5, "int8": 4e-4, "int4": 2e-3}  # relative error of logits; int8 inputs would have 2e-2
VARIANTS = [
    (torch.float32, "none", {}, 1e-5),
    (torch.float32, "none", {"tie_embeddings": True, "bias": "qkv"}, 1e-5),
    (torch.float32, "none", {"n_kv_heads": 6, "rope_scaling": RopeScaling("linear", 4.0)}, 1e-5),
    (torch.float32, "none", {"qk_norm": True}, 1e-5),
    (torch.float32, "none", {"nope_interval": 2, "sliding_window": 5}, 1e-5),
    (torch.bfloat16, "none", {}, 1e-2),  # keys and values are kept in bfloat16
    (torch.float32, "int8", {"tie_embeddings": True}, INTEGERS["int8"]),  # inputs in 16 bits
    (torch.float32, "int4", {}, INTEGERS["int4"]),  # inputs and weights in 14
    (torch.bfloat16, "int4", {"bias": "qkv"}, 3e-2),
]


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 13, 17, 40])  # from 32 on threads prepare inputs together
@pytest.mark.parametrize(("dtype", "kind", "changes", "bound"), VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_the_layers(
    dtype: torch.dtype, kind: Quantization, changes: dict[str, object], bound: float, rows: int
) -> None:
    native = model(dtype, kind, **changes)
    plain = exact(native)
    step = NativeStep(native)
    lengths = torch.tensor([9 - row % 8 for row in range(rows)])  # every row of another length
    prompts = torch.randint(0, 83, (rows, 9), generator=torch.Generator().manual_seed(1))
    states = native.state(rows, 20), plain.state(rows, 20)
    for state in states:  # the same past, which quantized products would round otherwise
        plain.hidden(prompts, mask=Mask(lengths=lengths), state=state)
    for token in range(6):
        tokens = [(13 * row + 7 * token) % 83 for row in range(rows)]
        found = step([[token] for token in tokens], states[0], Mask())
        expected = plain(torch.tensor(tokens)[:, None], state=states[1])[:, -1]
        assert found is not None
        assert ((found - expected).norm(dim=-1) < bound * expected.norm(dim=-1)).all()
        assert states[0].lengths == states[1].lengths


@pytest.mark.hardware("avx2")
@pytest.mark.parametrize("rows", [1, 9, 40])
@pytest.mark.parametrize(("dtype", "kind", "changes", "bound"), VARIANTS[4:])
@pytest.mark.parametrize("march", ["haswell", pytest.param("x86-64", marks=pytest.mark.slow)])
def test_logits_by_shorter_vectors(
    march: str,
    dtype: torch.dtype,
    kind: Quantization,
    changes: dict[str, object],
    bound: float,
    rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AVX2, and four floats without intrinsics, as on processors whose own are not used."""
    monkeypatch.setenv(build.MARCH, march)
    test_logits_are_those_of_the_layers(dtype, kind, changes, bound, rows)


@pytest.mark.hardware("avx2")
@pytest.mark.parametrize(("generates", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_emulated_bfloat16_stays_as_stored_where_the_step_reads_all(
    generates: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With AVX2 the step alone multiplies it, in float32; the layers would take five times as long."""
    for name, value in ((build.MARCH, "haswell"), ("ATEN_CPU_CAPABILITY", "avx2")):
        monkeypatch.setenv(name, value)
    Decoder(CONFIG).to(torch.bfloat16).save_pretrained(tmp_path)
    opened = open_model(tmp_path)
    found = load_model(opened, "auto", "cpu", compiles=True, generates=generates)
    assert found.dtype == dtype and isinstance(found.step, NativeStep)
    monkeypatch.setattr("minillama.inference.load.attach_fast_step", lambda model: None)
    assert load_model(opened, "auto", "cpu", compiles=True, generates=generates).dtype == torch.float32


@pytest.mark.usefixtures("emulated_tiles")
@pytest.mark.parametrize("rows", [8, 17])
@pytest.mark.parametrize(("dtype", "kind", "changes", "bound"), VARIANTS[5:])  # those that take tiles
def test_logits_by_emulated_tiles(
    dtype: torch.dtype, kind: Quantization, changes: dict[str, object], bound: float, rows: int
) -> None:
    assert NativeStep(model(dtype, kind, **changes)).at_once == 96
    test_logits_are_those_of_the_layers(dtype, kind, changes, bound, rows)


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@torch.no_grad()
def test_several_tokens_a_row(kind: Quantization) -> None:
    native = model(kind=kind)
    plain = exact(native)
    step = NativeStep(native)
    step.at_once = 31  # whatever pays on this processor
    states = native.state(3, 40), plain.state(3, 40)
    for counts in ([5, 1, 3], [1, 7, 2], [2, 20, 9]):
        tokens = [[(7 * row + 5 * t + 3) % 83 for t in range(count)] for row, count in enumerate(counts)]
        found = step(tokens, states[0], Mask(window=6, sinks=1))
        padded = torch.tensor([row + [0] * (max(counts) - len(row)) for row in tokens])
        mask = Mask(lengths=torch.tensor(counts), window=6, sinks=1)
        expected = plain(padded, mask=mask, state=states[1])[torch.arange(3), torch.tensor(counts) - 1]
        assert found is not None
        assert ((found - expected).norm(dim=-1) < INTEGERS[kind] * expected.norm(dim=-1)).all()
        assert states[0].lengths == states[1].lengths
    assert step([[1] * 12] * 3, states[0], Mask()) is None  # so many the layers read faster


@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (3, 2), (5, 9), (40, 4)])
def test_a_window_with_sinks(
    window: int,
    sinks: int,
    monkeypatch: pytest.MonkeyPatch,
    decode: Callable[..., list[list[int]]],
    uncached: Callable[..., list[list[int]]],
) -> None:
    monkeypatch.setattr("minillama.config.cost.SPARE", 1)
    plain, native = model(), model()
    native.step = NativeStep(native)
    prompts = [[5, 6, 7, 8, 9, 10, 11] * (1 + sinks // 2), [1, 2]]
    expected = [run(plain, prompts, 20, window=window, sinks=sinks) for run in (decode, uncached)]
    assert expected[0] == expected[1]
    assert decode(native, prompts, 20, window=window, sinks=sinks) == expected[0]
    everything = decode(plain, prompts, 20)
    assert (everything == expected[0]) == (window == 40)


@pytest.mark.parametrize("kind", ["none", "int8", "int4"])
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.0, top_p=0.9, seed=3)])
def test_batches_that_stay_full_say_the_same(
    kind: Quantization, sampling: Sampling, decode: Callable[..., list[list[int]]]
) -> None:
    native = model(kind=kind)
    plain = exact(native)
    native.step = step = NativeStep(native)
    step.at_once = 31  # also where torch would read prompts, whose quantized kernels round
    prompts = [[5, 6, 7], [1], [8, 9, 10, 11, 12], [3, 4], [80, 2, 2]]
    said = [decode(decoder, prompts, 12, sampling, max_rows=2) for decoder in (native, plain)]
    assert said[0] == said[1]


def test_requests_reach_it_and_go_on_after_a_change_of_weights() -> None:
    native = model()
    plain, calls = exact(native), []
    step = NativeStep(native)
    native.step = lambda *args: calls.append(1) or step(*args)
    native.step.refresh = step.refresh  # type: ignore[attr-defined]
    said: list[list[list[int]]] = []
    for decoder in (native, plain):
        engine = Engine(decoder, 3, chunk=4)
        mine = [engine.submit(Request([i + 1] * (3 * i + 2), 12, Sampling(seed=i), logprobs=True))[0] for i in range(5)]
        for _ in range(9):
            engine.step()
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.mul_(1.01)
        engine.refresh()
        while engine.is_busy:
            engine.step()
        said.append([request.tokens for request in mine])
    assert said[0] == said[1] and len(calls) > 20


def test_what_it_does_not_take() -> None:
    assert unsupported(Decoder(CONFIG)) is not None  # not fused
    assert unsupported(model()) is None
    long = RopeScaling("longrope", original_max_seq_len=32, short_factor=(1.0,) * 8, long_factor=(2.0,) * 8)
    others = {"head_dim": 8}, {"logit_scale": 0.5}, {"parallel_block": True}, {"norm": "layer"}, {"rope_scaling": long}
    for changes in others:
        assert unsupported(model(**changes)) is not None
    native = model()
    step = NativeStep(native)
    assert step([[1]], native.state(1, 8, torch.int8), Mask()) is None
    assert step([[1]], native.state(1, 8), Mask(prefix=torch.tensor([1]))) is None
    rows = step([[1], [], [2]], native.state(3, 8), Mask())  # a row without tokens is left alone
    both = step([[1], [2]], native.state(2, 8), Mask())
    assert rows is not None and both is not None and torch.equal(rows[[0, 2]], both) and not rows[1].any()
    full = native.state(1, 1)
    step([[1]], full, Mask())
    with pytest.raises(ValueError, match="do not fit"):
        step([[1]], full, Mask())
    with pytest.raises(ValueError, match="2 rows"):
        step([[1], [2]], native.state(1, 8), Mask())
    for token in (-1, CONFIG.vocab_size):
        with pytest.raises(IndexError, match="token id"):
            step([[token]], native.state(1, 8), Mask())


@pytest.mark.parametrize("change", ["hook", "attention kernel", "mlp kernel", "mlp"])
@torch.no_grad()
def test_what_was_changed_by_hand_turns_the_step_off(change: str) -> None:
    """In the next generation: the layers decode, as they do without a step, and the step again when all is undone."""
    native, seen, block = model(), [], model().blocks[0]
    native.step = NativeStep(native)
    asked = lambda: Engine(native).run([Request([3, 1, 4], 6)])[0].tokens  # noqa: E731
    steps, plain, block = [], asked(), native.blocks[0]
    native.step.library, library = None, native.step.library  # whoever takes it fails
    if change == "hook":
        undo = block.self_attn.o_proj.register_forward_hook(lambda *args: seen.append(1) or -args[-1]).remove
    elif change == "mlp":
        old, block.mlp = block.mlp, torch.nn.Identity()
        undo = lambda: setattr(block, "mlp", old)  # noqa: E731
    else:
        part = block.mlp if change == "mlp kernel" else block.self_attn
        old, part.kernel = part.kernel, lambda *args: args[0] * 2
        undo = lambda: setattr(part, "kernel", old)  # noqa: E731
    changed = asked()
    native.step, kept = None, native.step
    assert changed == asked() != plain and (change != "hook" or len(seen) >= 12)
    native.step = kept
    undo()
    native.step.library = library
    native.step.__class__.__call__, call = (
        (lambda *args: steps.append(1) or call(*args)),
        native.step.__class__.__call__,
    )
    try:
        assert asked() == plain and steps
    finally:
        native.step.__class__.__call__ = call


def test_fewer_threads_beside_other_programs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    native = model(torch.bfloat16, "int4")
    step, found = NativeStep(native), []
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    for free in (3, 1, 2, 3):
        monkeypatch.setattr("minillama.native.decode.free_threads", lambda wanted, free=free: min(wanted, free))
        state = native.state(9, 8)
        found.append([step([[row + token] for row in range(9)], state, Mask()) for token in range(3)])
    torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for other in found[1:] for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("change", ["norm", "matrix", "type"])
@torch.no_grad()
def test_a_step_that_is_stale_cannot_be_used(change: str) -> None:
    native = model(torch.bfloat16)
    step = NativeStep(native)
    before = step([[3]], native.state(1, 4), Mask())
    if change == "norm":
        native.model.norm.weight.mul_(2)
    elif change == "matrix":
        native.blocks[1].mlp.down_proj.weight.add_(0.1)
    else:
        native.float()
    with pytest.raises(RuntimeError, match="refresh"):
        step([[3]], native.state(1, 4), Mask())
    step.refresh()
    after = step([[3]], native.state(1, 4), Mask())
    assert before is not None and after is not None
    torch.testing.assert_close(after, native.float()(torch.tensor([[3]]))[:, -1], rtol=2e-2, atol=2e-2)
    assert change == "type" or not torch.allclose(before, after, rtol=1e-2)


def test_other_weights_leave_no_step() -> None:
    native = model()
    native.step = NativeStep(native)
    native.load_state_dict({name: tensor + 1 for name, tensor in native.state_dict().items()}, assign=True)
    assert native.step is None


def test_a_copy_of_the_model_has_no_step(decode: Callable[..., list[list[int]]]) -> None:
    native = model()
    native.step = NativeStep(native)
    twin = copy.deepcopy(native)
    assert twin.step is None
    assert decode(twin, [[5, 6, 7]], 5) == decode(native, [[5, 6, 7]], 5)


PROMPTS = [  # of over 32 tokens each, so that quantized weights are multiplied out to read them
    "The lighthouse keeper had written the same line in his log every evening for eleven years, and on the first night "
    "that the lamp did not burn he wrote it again, and then he sat down and",
    "def merge(left, right):\n    # Merge two sorted lists into one sorted list, without changing either of them.\n"
    "    result = []\n    i = j = 0\n    while i < len(left) and j < len(right):\n",
    "Bread needs four things: flour, water, salt and time. Of these the last is the one that most people leave out, "
    "and it is the one that cannot be bought. To make a good loaf at home, first",
    "Question: A train leaves the station at nine o'clock and travels at sixty kilometers an hour. A second train "
    "leaves an hour later at ninety. When does the second one overtake the first? Answer:",
    "Rivers carry sand and gravel from the mountains to the sea. Where the water slows down it drops the heaviest "
    "stones first, then the gravel, then the sand, and at last the finest mud, which",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.float32, "none"), (torch.float32, "int8"), (torch.float32, "int4"), (torch.bfloat16, "none")],
)
def test_greedy_tokens_of_a_real_model(
    smollm2: Path, dtype: torch.dtype, kind: Quantization, decode: Callable[..., list[list[int]]]
) -> None:
    """256 tokens of five prompts: the layers' own choice after each in float32; rounded, as good as that."""
    tokenizer = Tokenizer.load(smollm2)
    native = quantize(Decoder.from_pretrained(smollm2, dtype).fuse(), kind)
    plain = exact(native)
    native.step = NativeStep(native)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    assert min(map(len, prompts)) >= 32
    for prompt, tokens in zip(prompts, decode(native, prompts, 256), strict=True):
        with torch.inference_mode():
            logits = plain(torch.tensor([prompt + tokens[:-1]]))[0, len(prompt) - 1 :]
        chosen = torch.tensor(tokens)
        if dtype == torch.float32 and kind != "int4":  # whose inputs are rounded to 14 bits
            assert torch.equal(logits.argmax(1), chosen)
        gaps = logits.max(1).values - logits.gather(1, chosen[:, None])[:, 0]
        print(f"{dtype}: {(gaps > 0).sum()} other tokens, whose logit is at most {gaps.max():.3f} below the best")
        assert gaps.max() < 0.3
