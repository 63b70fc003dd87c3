"""Scalar heads: where they read, and the folders that transformers and PEFT open."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minillama.config import ModelConfig
from minillama.config.lora import LoRAConfig
from minillama.errors import InputError
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.model.heads import last, open_scores, scores, with_score
from minillama.model.lora import add_lora, load_adapter, save_adapter

CONFIG = ModelConfig(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=40, vocab_size=53, max_seq_len=32)
LENGTHS = torch.tensor([9, 4, 17])


def language_model(**changes: object) -> Decoder:
    model = Decoder(replace(CONFIG, **changes))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(4))
    return model.eval()


def reward_model(pad_id: int = 0, **changes: object) -> Decoder:
    return with_score(language_model(**changes), torch.Generator().manual_seed(5), pad_id)


def texts(pad: int, longer: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 53, (3, 17), generator=torch.Generator().manual_seed(6))
    return F.pad(ids.where(torch.arange(17) < LENGTHS[:, None], pad), (0, longer), value=pad)


@torch.no_grad()
def test_the_score_is_that_of_the_last_token_whatever_the_padding() -> None:
    model = reward_model()
    found = last(scores(model, texts(0)), LENGTHS)
    assert found.dtype == torch.float32 and len(set(found.tolist())) == 3
    for pad, longer in ((0, 5), (2, 0), (52, 9)):
        torch.testing.assert_close(last(scores(model, texts(pad, longer)), LENGTHS), found, atol=1e-6, rtol=0)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = scores(model, texts(0)[row : row + 1, :length])[0, -1]
        torch.testing.assert_close(alone, found[row], atol=1e-6, rtol=0)
        hidden = model.hidden(texts(0)[row : row + 1, :length])[0, -1]
        torch.testing.assert_close(hidden @ model.state_dict()["score.weight"][0], found[row], atol=1e-6, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_the_folder_with_equal_scores(tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = reward_model(tie_embeddings=tied, pad_id=1)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "LlamaForSequenceClassification" and theirs.config.num_labels == 1
    with torch.no_grad():
        expected = theirs(texts(1)).logits[:, 0]
        torch.testing.assert_close(last(scores(model, texts(1)), LENGTHS), expected, atol=1e-6, rtol=1e-5)
        theirs.save_pretrained(tmp_path / "again")
        again = open_scores(tmp_path / "again")
        assert (again.config.head, again.config.pad_id) == ("score", 1) and again.config.tie_embeddings == tied
        torch.testing.assert_close(last(scores(again, texts(0)), LENGTHS), expected, atol=1e-6, rtol=1e-5)


def test_peft_opens_the_adapter_with_equal_scores(tmp_path: Path) -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    base = language_model()
    base.save_pretrained(tmp_path / "base")
    opened = open_model(tmp_path / "base")
    model = add_lora(with_score(base), LoRAConfig(rank=3, alpha=6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, tmp_path / "adapter", base=opened)
    hf_base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=1, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(hf_base, tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = theirs(texts(1)).logits[:, 0]
        torch.testing.assert_close(last(scores(model, texts(0)), LENGTHS), expected, atol=1e-5, rtol=1e-4)
        theirs.save_pretrained(tmp_path / "again")
        for folder in ("adapter", "again"):
            found = last(scores(open_scores(tmp_path / folder), texts(0)), LENGTHS)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="adapter is of a reward model"):
        load_adapter(Decoder.from_pretrained(opened), tmp_path / "adapter")


def test_a_reward_model_writes_no_text_and_a_language_model_gives_no_scores(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gives scores, and no tokens"):
        reward_model()(texts(0))
    with pytest.raises(InputError, match="no scalar head"):
        scores(language_model(), texts(0))
    language_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no reward model"):
        open_scores(tmp_path)
