"""llama.cpp loads what we write, and says the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minillama import Decoder, ModelConfig, Tokenizer, TokenizerTrainer, generate
from minillama.config import RopeScaling
from minillama.convert import convert
from minillama.formats.open import open_model
from minillama.inference.quantize import quantized
from minillama.inference.sampling import Sampling
from minillama.tokenizer import byte_tokenizer, train_byte_bpe

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is the oracle here")
PROMPT = "The miller kept two donkeys and 17 clocks: 东京"


def theirs(path: Path, prompt: str, count: int) -> tuple[str, list[int]]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_predict, params.warmup = 256, count, False
    params.cpuparams.n_threads = 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as ours
    answer = xllamacpp.Server(params).handle_completions(
        {
            "prompt": prompt,
            "n_predict": count,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_tokens": True,
            "verbose": True,
        }
    )
    answer = answer[0] if isinstance(answer, list) else answer
    verbose = answer.get("__verbose", answer)
    return answer["choices"][0]["text"] if "choices" in answer else answer["content"], verbose["tokens"]


def clear_cut(config: ModelConfig, tokenizer: Tokenizer, count: int) -> tuple[Decoder, list[int]]:
    """A random model whose greedy tokens are no near ties: llama.cpp takes exponentials from float16 tables."""
    for seed in range(100):
        model, generator = Decoder(config).eval(), torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15, generator=generator)
            completion = generate(model, tokenizer, [PROMPT], count, Sampling(temperature=0), ignore_eos=True)[0]
            ids = tokenizer.encode(PROMPT, bos=tokenizer.add_bos) + list(completion.tokens)
            first, second = model(torch.tensor([ids[:-1]]))[0, -count:].topk(2).values.unbind(-1)
        if (first - second).min() > 0.02:
            return model, list(completion.tokens)
    raise AssertionError("every model has a near tie")


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaling", [None, {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 8192}])
def test_the_same_greedy_tokens(kind: str, tied: bool, scaling: dict | None, tmp_path: Path) -> None:
    """Random weights, large enough that logits differ: grouped heads, a head width of its own."""
    tokenizer = (
        train_byte_bpe(["The miller kept two donkeys and a clock. " * 20], 300) if kind == "bpe" else byte_tokenizer()
    )
    config = ModelConfig(
        dim=96, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=32, hidden_dim=160, vocab_size=tokenizer.vocab_size,
        max_seq_len=256, tie_embeddings=tied, rope_theta=500000.0,
    )  # fmt: skip
    config = config.changed({"rope_scaling": scaling}) if scaling else config
    model, mine = clear_cut(config, tokenizer, 24)
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", "f32")
    _, tokens = theirs(tmp_path / "a.gguf", PROMPT, 24)
    assert tokens == mine


LONG = RopeScaling(
    "longrope", original_max_seq_len=32, short_factor=(1.0,) * 8, long_factor=tuple(1 + i / 4 for i in range(8))
)


@pytest.mark.parametrize(
    "switches",
    [
        {"bias": "qkv", "tie_embeddings": True},
        {"qk_norm": True, "head_dim": 24},
        {"model_type": "phi3"},
        {"rope_scaling": LONG, "max_seq_len": 256},
        {"nope_interval": 4},
    ],
    ids=["qwen2", "qwen3", "phi3", "phi3 long", "smollm3"],
)
def test_the_same_greedy_tokens_of_relatives(switches: dict, tmp_path: Path) -> None:
    """llama.cpp takes long factors, as its context is longer than the original one; here the sequence is."""
    tokenizer = TokenizerTrainer("byte-bpe", 300, "qwen2")(["The miller kept two donkeys and a clock. " * 20])
    config = ModelConfig(
        dim=96, n_layers=5, n_heads=6, n_kv_heads=2, hidden_dim=160, vocab_size=300, max_seq_len=256, rope_theta=5e3,
    )  # fmt: skip
    model, mine = clear_cut(replace(config, **switches), tokenizer, 24)
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a.gguf", "gguf", "f32")
    assert theirs(tmp_path / "a.gguf", PROMPT, 24)[1] == mine
    again = Decoder.from_pretrained(tmp_path / "a.gguf")
    assert again.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    convert(tmp_path / "hf", tmp_path / "b.gguf", "gguf", "q4_1")
    four, x = open_model(tmp_path / "b.gguf"), torch.tensor([tokenizer.encode(PROMPT)])
    expected = Decoder.from_pretrained(four)(x)  # dequantized
    assert (quantized(four, "int4")(x) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_stories260k_in_every_type(dtype: str, shared: Path, tmp_path: Path) -> None:
    """A trained model with SentencePiece's vocabulary: the beginning of its story, in the words of our own reading."""
    vocabulary = shared / "tokenizer/stories260K/tok512.bin"
    path = tmp_path / "a.gguf"
    convert(shared / "models/stories260K/checkpoint_v1.bin", path, "gguf", dtype, vocabulary)  # type: ignore[arg-type]
    model, tokenizer = Decoder.from_pretrained(path, dtype=torch.float32), Tokenizer.load(path)
    mine = generate(model, tokenizer, ["Once upon a time"], 24, Sampling(temperature=0))[0]
    text, _ = theirs(path, "Once upon a time", 24)
    same = 24 if dtype in ("f16", "bf16") else 12  # llama.cpp rounds activations too where weights are quantized
    assert tokenizer.encode(text)[:same] == tokenizer.encode(mine.text)[:same]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["q8_0", "q4_1"])
def test_smollm2_through_our_hands(smollm2: Path, dtype: str, tmp_path: Path) -> None:
    """Its GGUF, read and written again: the capital of France."""
    convert(smollm2, tmp_path / "again.gguf", "gguf", dtype)  # type: ignore[arg-type]
    text, _ = theirs(tmp_path / "again.gguf", "The capital of France is", 8)
    assert text.startswith(" Paris")


@pytest.mark.slow
def test_smollm2_in_four_bits_says_the_same(smollm2: Path) -> None:
    """The numbers of its own Q4_1, inputs in bfloat16 here and in eight bits there: the same greedy tokens."""
    model, tokenizer = quantized(open_model(smollm2), "int4"), Tokenizer.load(smollm2)
    prompt = "Once upon a time, there was a little"
    mine = generate(model, tokenizer, [prompt], 8, Sampling(temperature=0))[0]
    text, _ = theirs(smollm2, prompt, 8)
    assert text == mine.text
