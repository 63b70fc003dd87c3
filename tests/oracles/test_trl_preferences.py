"""Loss and gradients of DPO and of reward models against TRL's, on pairs of LLaMA-Factory's demo file."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from minillama.config import ModelConfig
from minillama.data.preference_set import Judged, Preferences, encode_answer, fitted
from minillama.data.preferences import preferences
from minillama.data.sources import Source
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.model.heads import with_score
from minillama.runs.objectives import DPOConfig
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.template import load_template
from minillama.training.gradients import accumulate
from minillama.training.objectives.compared import Compared
from minillama.training.objectives.dpo import DPO
from minillama.training.objectives.reward import RewardModel

transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
CPU = torch.device("cpu")
# ours -> loss type, divergence
LOSSES = {
    "sigmoid": ("sigmoid", "reverse_kl"),
    "hinge": ("hinge", "reverse_kl"),
    "robust": ("robust", "reverse_kl"),
    "exo": ("exo_pair", "reverse_kl"),
    "nca": ("nca_pair", "reverse_kl"),
    "bco": ("bco_pair", "reverse_kl"),
    "sppo": ("sppo_hard", "reverse_kl"),
    "apo-zero": ("apo_zero", "reverse_kl"),
    "apo-down": ("apo_down", "reverse_kl"),
    "forward-kl": ("sigmoid", "forward_kl"),
    "js": ("sigmoid", "js_divergence"),
    "ipo per token": ("ipo", "reverse_kl"),
    "sigmoid per token": ("sigmoid_norm", "reverse_kl"),
}


def pairs(shared: Path, tokenizer: Tokenizer, count: int, context: int) -> list[Judged]:
    own, found = load_template("own", tokenizer), []
    for preference in islice(preferences(Source(path=str(shared / "pref/dpo_en_demo.json"))), count):
        chosen, rejected = (encode_answer(side, own, tokenizer) for side in preference.sides)
        found.append(
            Judged.of(*fitted(chosen.prompt, [chosen.answer, rejected.answer], context), 0.25 * len(found) % 1)
        )
    return found


def moved(model: nn.Module) -> nn.Module:
    """The model, no longer its reference; the same numbers by the same names here and in transformers."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if name.endswith("norm.weight"):
                parameter.mul_(1.1)
    return model


def inputs(rows: list[Judged], pad: int) -> dict[str, torch.Tensor]:
    """A batch as TRL's collators make it: all chosen texts, then all rejected ones."""
    texts = [(row.prompt.tolist(), row.answers[side].tolist()) for side in (0, 1) for row in rows]
    longest = max(len(prompt) + len(answer) for prompt, answer in texts)
    columns = {"input_ids": [], "attention_mask": [], "completion_mask": []}  # type: dict[str, list[list[int]]]
    for prompt, answer in texts:
        rest = longest - len(prompt) - len(answer)
        columns["input_ids"].append([*prompt, *answer, *[pad] * rest])
        columns["attention_mask"].append([1] * (longest - rest) + [0] * rest)
        columns["completion_mask"].append([0] * len(prompt) + [1] * len(answer) + [0] * rest)
    return {name: torch.tensor(values) for name, values in columns.items()}


def trainer(kind: str, folder: Path, out: Path, model: Any, reference: Any = None, **settings: Any) -> Any:
    from datasets import Dataset

    common = {
        "output_dir": str(out),
        "report_to": "none",
        "activation_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
    }
    dataset = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    over = {"train_dataset": dataset, "processing_class": tokenizer}
    if kind == "dpo":
        args = trl.DPOConfig(**common, **settings)
        return trl.DPOTrainer(model=model, ref_model=reference, args=args, **over)
    return trl.RewardTrainer(model=model, args=trl.RewardConfig(**common, **settings), **over)


def compare(ours: RewardModel | DPO, theirs: Any, batches: list[list[Judged]], pad: int, tolerance: float) -> None:
    """Loss, gradient and that of each tensor, of each batch; transformers has norms and rotations in float32."""
    names = dict(theirs.model.named_parameters())
    for batch in batches:
        data = Preferences.of(batch, batch, ours.data.context)
        ours.data, ours.batch_size = data, len(batch)
        if isinstance(ours, Compared):
            ours.known = torch.full((len(batch), 2), torch.nan)
        ours.prepare(0)
        ours.model.zero_grad()
        loss = accumulate(ours, ours.batch(0), 1, CPU).loss
        order = [batch[i] for i in data.chosen(ours.seed, 0, len(batch))]
        given = inputs(order, pad)
        if isinstance(ours, RewardModel):
            given.pop("completion_mask")
            given["margin"] = torch.tensor([row.label for row in order])
        theirs.model.zero_grad()
        theirs.model.train()
        expected = theirs.compute_loss(theirs.model, given)
        expected.backward()
        assert loss == pytest.approx(expected.item(), abs=1e-5, rel=1e-5)
        distances, norms = [], []
        for name, parameter in ours.model.named_parameters():
            gradient = names[name].grad
            assert gradient is not None and parameter.grad is not None
            distances.append((parameter.grad - gradient).norm())
            norms.append(gradient.norm())
            assert distances[-1] <= 3 * tolerance * norms[-1] + 1e-9, name
        assert torch.stack(distances).norm() <= tolerance * torch.stack(norms).norm()


def small(tokenizer: Tokenizer) -> Decoder:
    shape = {"dim": 24, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 40, "max_seq_len": 160}
    model = Decoder(ModelConfig(**shape, vocab_size=tokenizer.vocab_size))  # type: ignore[arg-type]
    model.init_weights(torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model


def check_dpo(model: Decoder, tokenizer: Tokenizer, folder: Path, batches: list[list[Judged]], **options: Any) -> None:
    """One trainer and one objective, with every loss that both have."""
    model.save_pretrained(folder)
    tokenizer.save(folder)
    dtype, names = options.get("dtype", torch.float32), options.get("losses", LOSSES)
    context = max(row.longest for batch in batches for row in batch)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = trainer("dpo", folder, folder / "out", moved(load(folder, dtype=dtype)), load(folder, dtype=dtype))
    data = Preferences.of(batches[0], batches[0], context)
    ours = DPO(model.to(dtype), data, 1, len(batches[0]), 1)
    moved(ours.model)
    for name in names:
        loss, per_token = name.removesuffix(" per token"), name.endswith("per token")
        smoothing = 0.1 if loss in ("robust", "exo") else 0.0
        ours.settings = DPOConfig(loss=loss, per_token=per_token, label_smoothing=smoothing)  # type: ignore[arg-type]
        theirs.loss_types, theirs.label_smoothing = [LOSSES[name][0]], smoothing
        theirs.f_divergence_type = LOSSES[name][1]
        compare(ours, theirs, batches, tokenizer.eos_id, options.get("tolerance", 3e-5))


def check_reward(
    model: Decoder, tokenizer: Tokenizer, folder: Path, batches: list[list[Judged]], **options: Any
) -> None:
    used = {int(i) for batch in batches for row in batch for part in (row.prompt, *row.answers) for i in part}
    pad = next(i for i in range(tokenizer.vocab_size) if i not in used)  # transformers gives its row no gradient
    made = with_score(model, torch.Generator().manual_seed(9), pad)
    made.save_pretrained(folder)
    tokenizer.save(folder)
    context = max(row.longest for batch in batches for row in batch)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    dtype = options.get("dtype", torch.float32)
    loaded = load(folder, dtype=dtype)
    theirs = trainer("reward", folder, folder / "out", loaded, center_rewards_coefficient=0.01)
    theirs.model.config.pad_token_id = pad  # the trainer takes the tokenizer's, which is the end of every answer
    ours = RewardModel(made.to(dtype), Preferences.of(batches[0], batches[0], context), 1, len(batches[0]), center=0.01)
    compare(ours, theirs, batches, pad, options.get("tolerance", 3e-5))


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_trl(shared: Path, smollm2: Path, tmp_path: Path) -> None:
    """A small random model with SmolLM2's vocabulary and every loss, pairs of unequal lengths in a batch."""
    tokenizer = Tokenizer.load(smollm2)
    batches = [pairs(shared, tokenizer, 3, 80)]
    check_dpo(small(tokenizer), tokenizer, tmp_path / "dpo", batches)
    check_reward(small(tokenizer), tokenizer, tmp_path / "reward", batches)


@pytest.mark.slow
def test_losses_and_gradients_of_real_weights_are_those_of_trl(shared: Path, smollm2: Path, tmp_path: Path) -> None:
    """SmolLM2-135M in float64, 8 batches of one pair: in float32 both round more than 1e-5."""
    tokenizer = Tokenizer.load(smollm2)
    batches = [[row] for row in pairs(shared, tokenizer, 8, 24)]
    exact = {"dtype": torch.float64, "tolerance": 1e-5}

    def model() -> Decoder:
        return Decoder.from_pretrained(open_model(smollm2), torch.float32)

    check_dpo(model(), tokenizer, tmp_path / "dpo", batches, losses=["sigmoid"], **exact)
    check_reward(model(), tokenizer, tmp_path / "reward", batches, **exact)
