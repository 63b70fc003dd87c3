"""Training objectives, one file each, and the one place where a name becomes one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from minillama.data.corpus import Corpus
from minillama.data.instructions import Instructions
from minillama.data.preference_set import Preferences
from minillama.data.prompts import Prompts
from minillama.data.records import Records
from minillama.device import choose_dtype
from minillama.evaluate.cloze import Cloze
from minillama.evaluate.rewards import Rewards
from minillama.model import Decoder
from minillama.runs.config import RunConfig
from minillama.runs.feedback import GRPOConfig, PPOConfig
from minillama.runs.objectives import ClozeConfig, DPOConfig, GLMConfig, KTOConfig, LMConfig, RewardConfig
from minillama.tokenizer import Tokenizer
from minillama.tokenizer.blanks import Blanks
from minillama.training.objectives.base import MODEL, Batch, Objective
from minillama.training.objectives.cloze import ClozeQuestions
from minillama.training.objectives.dpo import DPO
from minillama.training.objectives.glm import BlankInfilling
from minillama.training.objectives.grpo import GRPO
from minillama.training.objectives.kto import KTO
from minillama.training.objectives.lm import LanguageModel
from minillama.training.objectives.ppo import PPO
from minillama.training.objectives.reward import RewardModel
from minillama.training.objectives.sft import FineTuning
from minillama.training.objectives.staged import Part, Staged
from minillama.training.spans import sentence_ends

Data = Corpus | Instructions | Preferences | Prompts | Records
MakeObjective = Callable[[RunConfig, Decoder, Tokenizer, Data], Objective]


__all__ = ["MODEL", "Batch", "Objective"]  # the rest is defined here


def make(config: RunConfig, model: Decoder, tokenizer: Tokenizer, data: Data) -> Objective:
    """The objective that the configuration asks for, over what `load_data` found for it."""
    rows, context, settings = config.train.batch_size, config.context, config.objective
    if isinstance(settings, ClozeConfig):
        assert isinstance(data, Records)
        return ClozeQuestions(model, data, config.seed, rows, Cloze(settings, tokenizer, context))
    if isinstance(settings, GRPOConfig | PPOConfig):
        assert isinstance(data, Prompts)
        rewards = Rewards(settings.rewards, tokenizer, data.end_id, model.device)
        start, micro = (model, data, config.seed, rows), config.micro_batch_size
        dtype = choose_dtype(config.train.dtype, model.device)
        if isinstance(settings, PPOConfig):
            return PPO(*start, settings, rewards, micro, dtype, data.text, context)
        return GRPO(*start, settings, rewards, micro, dtype)
    if isinstance(data, Preferences):
        if isinstance(settings, RewardConfig):
            return RewardModel(model, data, config.seed, rows, settings.center)
        assert isinstance(settings, DPOConfig | KTOConfig)
        compared = model, data, config.seed, rows, config.micro_batch_size
        return DPO(*compared, settings) if isinstance(settings, DPOConfig) else KTO(*compared, settings)
    if isinstance(data, Instructions):
        assert isinstance(settings, LMConfig)
        return FineTuning(model, data, config.seed, rows, settings.z_loss)
    assert isinstance(data, Corpus)
    over = model, data, config.seed, rows, context
    if isinstance(settings, GLMConfig):
        ends = sentence_ends(tokenizer, config.model.vocab_size)
        return BlankInfilling(*over, Blanks.of(tokenizer), ends, data.separator, settings)
    assert isinstance(settings, LMConfig)
    return LanguageModel(*over, data.separator if config.data.mask_documents else None, settings.z_loss)


def make_staged(
    config: RunConfig,
    model: Decoder,
    tokenizer: Tokenizer,
    data: Data,
    stages: Sequence[Data | None],
    make: MakeObjective = make,
) -> Objective:
    """The objective of `make`, or a curriculum of several where stages have data of their own."""
    whole = make(config, model, tokenizer, data)
    if all(own is None for own in stages):
        return whole
    parts, first = [], 0
    for stage, own in zip(config.stages, stages, strict=True):
        settings = replace(config, data=stage.data or config.data)
        parts.append(Part(first, whole if own is None else make(settings, model, tokenizer, own)))
        first = stage.until_step
    return Staged(whole, parts)
