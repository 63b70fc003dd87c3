"""Folders that transformers saves and we load, and the other way round."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from minillama import Decoder, ModelConfig, Tokenizer
from minillama.evaluate.perplexity import score
from minillama.inference.quantize import quantize, save_gguf
from minillama.tokenizer import train_byte_bpe

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")
TOKENS = torch.tensor([[5, 77, 1, 256, 3, 3, 19, 42, 201]])
SHAPE = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 8), (8, 2, 8), (8, 1, 8), (4, 2, 24)])
def test_what_transformers_saves_we_load(
    tied: bool, shard: str, heads: int, kv_heads: int, head_dim: int, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        **SHAPE, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "50KB")
    mine = Decoder.from_pretrained(tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(mine(TOKENS), theirs(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["5GB", "50KB"])
@pytest.mark.parametrize("scaling", [None, {"kind": "llama3", "factor": 8.0, "original_max_seq_len": 32}])
def test_what_we_save_transformers_loads(tied: bool, shard: str, scaling: dict | None, tmp_path: Path) -> None:
    config = ModelConfig(dim=64, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=112, vocab_size=260, max_seq_len=64)
    config = config.changed({"tie_embeddings": tied} | ({"rope_scaling": scaling} if scaling else {}))
    mine = Decoder(config).eval()
    mine.save_pretrained(tmp_path, max_shard_size=shard)
    tokenizer = train_byte_bpe(["two donkeys and a clock " * 9], 260)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True)
    vocabulary = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    with torch.inference_mode():
        torch.testing.assert_close(theirs(TOKENS).logits, mine(TOKENS), atol=1e-5, rtol=1e-5)
    text = "two clocks, 17 donkeys"
    assert vocabulary(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_transformers_loads_int4_that_we_calibrated(tmp_path: Path) -> None:
    """Every number of the Q4_1 file means the same there."""
    tokenizer = train_byte_bpe(["two donkeys and a clock " * 9], 260)
    config = ModelConfig(dim=64, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=96, vocab_size=260, max_seq_len=64)
    mine = quantize(Decoder(config).eval().fuse(), "int4", calibration=TOKENS)
    save_gguf(mine, tmp_path / "a.gguf", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="a.gguf", dtype=torch.float32, local_files_only=True
    )
    with torch.inference_mode():
        expected = Decoder.from_pretrained(tmp_path / "a.gguf")(TOKENS)
        torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)
        assert (mine(TOKENS) - expected).norm() < 0.02 * expected.norm()  # bfloat16 inputs; the head is Q8_0 there


@pytest.fixture(scope="module")
def smollm(smollm2: Path) -> tuple[Decoder, Tokenizer, object, object]:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32, local_files_only=True
    )
    vocabulary = transformers.AutoTokenizer.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, local_files_only=True
    )
    return Decoder.from_pretrained(smollm2).eval(), Tokenizer.load(smollm2), theirs.eval(), vocabulary


@pytest.mark.slow
def test_smollm2_from_its_gguf(smollm: tuple, shared: Path) -> None:
    mine, tokenizer, theirs, vocabulary = smollm
    assert mine.config.num_params() == 134_515_008
    with torch.inference_mode():
        logits = mine(torch.tensor([tokenizer.encode("The capital of France is")]))[0, -1]
        assert logits.argmax().item() == 7042 and abs(logits.max().item() - 17.37) < 0.02
        text = (shared / "text/en/alice.txt").read_text(encoding="utf-8")
        ids = tokenizer.encode(text)[3000:3500]
        assert ids == vocabulary(text, add_special_tokens=False)["input_ids"][3000:3500]
        window = torch.tensor([ids])
        torch.testing.assert_close(mine(window), theirs(window).logits, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_smollm2s_perplexity_is_transformers(smollm: tuple, shared: Path) -> None:
    """Every eighth window of 1024 tokens of Alice (all of them took four minutes, and agreed): to four digits."""
    mine, tokenizer, theirs, _ = smollm
    ids = tokenizer.encode((shared / "text/en/alice.txt").read_text(encoding="utf-8"))
    windows = [np.array(ids[i : i + 1025]) for i in range(0, len(ids) - 1024, 8192)]
    with torch.inference_mode():
        rows = [torch.from_numpy(window)[None] for window in windows]
        losses = [theirs(row[:, :-1]).logits[0] for row in rows]
        nats = [torch.nn.functional.cross_entropy(x, row[0, 1:]) for x, row in zip(losses, rows, strict=True)]
    whole = score(mine, windows, 1.0, 4)
    assert math.exp(whole.nats_per_token) == pytest.approx(math.exp(torch.stack(nats).mean().item()), rel=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("generate", [False, True])
def test_smollm2s_chat_template_renders_as_transformers_renders_it(smollm: tuple, generate: bool) -> None:
    _, tokenizer, _, vocabulary = smollm
    messages = [
        {"role": "user", "content": "What is <|im_end|> in 东京? {{ 7 }}"},
        {"role": "assistant", "content": "  A mark.\n"},
        {"role": "user", "content": "Ok"},
    ]
    for part in (messages, [{"role": "system", "content": "Be brief."}, *messages]):
        want = vocabulary.apply_chat_template(part, tokenize=False, add_generation_prompt=generate)
        assert tokenizer.apply_chat_template(part, add_generation_prompt=generate) == want


def test_a_chat_template_travels(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    tokenizer = train_byte_bpe(["abc " * 9], 260)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([])
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    messages = [{"role": "user", "content": " hi "}]
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    want = theirs.apply_chat_template(messages, tokenize=False)
    assert Tokenizer.load(tmp_path).apply_chat_template(messages) == want == "[user]hi<|endoftext|>"
