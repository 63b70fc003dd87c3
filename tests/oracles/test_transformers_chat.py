"""Chat models as transformers saves them, with real templates: the same prompt and answer, from GGUF too."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from tokenizers.processors import ByteLevel, TemplateProcessing

from minillama.commands.cli import main
from minillama.inference.chat import ChatPrompts
from minillama.tokenizer import Tokenizer, byte_tokenizer

TEMPLATES = Path(trl.__file__).with_name("chat_templates")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
IM, LLAMA = ("<|im_start|>", "<|im_end|>", "<|endoftext|>"), ("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>")
LLAMA += ("<|start_header_id|>", "<|end_header_id|>")
PHI = ("<|user|>", "<|end|>", "<|endoftext|>", "<|assistant|>", "<|system|>")
CASES = {  # kind, template, special tokens: of them the second ends a turn; bos, eos, what generation_config stops at
    "Qwen2.5": ("Qwen2", "qwen2_5", IM, None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "Qwen3": ("Qwen3", "qwen3", IM, None, "<|im_end|>", ["<|im_end|>", "<|endoftext|>"]),
    "Llama 3": ("Llama", "llama3", LLAMA, LLAMA[0], "<|eot_id|>", ["<|end_of_text|>", "<|eot_id|>"]),
    "Llama 3, first release": ("Llama", "llama3", LLAMA, LLAMA[0], "<|end_of_text|>", ["<|end_of_text|>"]),
    "Phi-3": ("Phi3", "phi3", PHI, None, "<|endoftext|>", ["<|endoftext|>", "<|assistant|>", "<|end|>"]),
    "Mistral": ("Mistral", "", ("<s>", "</s>"), "<s>", "</s>", ["</s>"]),
}


def save(name: str, folder: Path) -> Any:
    """Their model, which says `Fine` after any prompt, ends the turn, and would go on; and their tokenizer."""
    kind, template, special, bos, eos, stops = CASES[name]
    byte_tokenizer().with_special(special).save(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, bos_token=bos, eos_token=eos)
    begins = ByteLevel(trim_offsets=False)  # as theirs: BOS in front of every text, of Llama and Mistral alone
    if bos is not None:
        begins = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begins
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if template else MISTRAL
    vocab, width = len(tokenizer), -(-len(tokenizer) // 32) * 32
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=vocab, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    last = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)[-1]
    chain = [last, *tokenizer("Fine", add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids(special[1])]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.zero_() if parameter.dim() > 1 or "bias" in key else parameter.fill_(1.0)
        model.get_input_embeddings().weight.copy_(torch.eye(vocab, width))
        for before, after in pairwise([*chain, 88, 89, 88]):
            model.get_output_embeddings().weight[after, before] = 10.0
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(stop) for stop in stops]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


ASKED = [{"role": "user", "content": "How is the tide?"}]


@pytest.mark.parametrize("name", CASES)
def test_a_newcomers_question_is_answered(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, file = save(name, tmp_path / "model"), tmp_path / "model.gguf"
    ids = theirs.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=False)
    assert ChatPrompts(Tokenizer.load(tmp_path / "model"))(ASKED) == ids
    assert main(["convert", str(tmp_path / "model"), str(file), "--to", "gguf"]) == 0
    for path in (tmp_path / "model", file):
        capsys.readouterr()
        words = ["--temperature", "0", "--max-new-tokens", "12"]
        assert main(["generate", "--model", str(path), "--prompt", "How is the tide?", *words]) == 0
        assert capsys.readouterr().out == "Fine"
        monkeypatch.setattr("sys.stdin", io.StringIO("How is the tide?\nAnd now?\n"))
        assert main(["chat", str(path), *words]) == 0
        assert capsys.readouterr().out == "Fine\nFine\n"
