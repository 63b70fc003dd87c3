"""Model folder of a run: all weights, or a PEFT adapter beside the base that it belongs to."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minillama.formats import generation_config, hf, peft
from minillama.formats.layout import check_writable
from minillama.formats.model_file import LazyTensors, ModelFile
from minillama.formats.open import open_model
from minillama.model import Decoder
from minillama.model.lora import DEFAULT, adapters, lora_parameters
from minillama.tokenizer import Tokenizer
from minillama.training.sharded import load


@dataclass
class ModelFolder:
    """Model folder, as checkpoints and the end of a run write it.

    Args:
        model: with or without an adapter.
        tokenizer: written beside the weights.
        base: the model that the adapter belongs to; None for a model without one.
    """

    model: Decoder
    tokenizer: Tokenizer
    base: ModelFile | None = None

    def __post_init__(self) -> None:
        if self.base is not None:  # before training: files may change meanwhile
            self.fingerprint = peft.fingerprint(self.base.tensors)
            peft.check_sites(self.model.config, adapters(self.model))
            # as they are before processes divide them
            self.parts = {site: copy.deepcopy(part).to("meta") for site, part in adapters(self.model).items()}

    def check(self) -> None:
        """Refuse a model that cannot be written, before it is trained."""
        if self.base is None:
            check_writable(self.model.state_dict(), self.model.config)

    def tensors(self) -> Mapping[str, Tensor]:
        """What `write` takes: all parameters, or those of the adapter."""
        tensors = self.model.state_dict()  # as they are at rest: FSDP leaves some cast to the dtype of the passes
        return tensors if self.base is None else {name: tensors[name] for name in lora_parameters(self.model)}

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a folder.

        Args:
            path: the folder.
            tensors: values of `tensors()`, which the model may have left since.
        """
        if self.base is None:
            hf.write(path, self.model.config, tensors)
        else:
            parts = copy.deepcopy(self.parts)
            for site, part in parts.items():
                own = {name: tensors[f"{site}.adapters.{DEFAULT}.{name}"] for name in part.state_dict()}
                part.load_state_dict(own, assign=True)
            peft.write(path, self.model.config, parts, str(self.base.path), self.fingerprint)
            text = json.dumps(self.model.config.to_hf(), indent=2) + "\n"
            (path / "config.json").write_text(text, encoding="utf-8")
        self.tokenizer.save(path)
        bos = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        stops = [self.tokenizer.eos_id, *sorted(self.tokenizer.stop_ids | self.model.stop_ids)]
        generation_config.write(path, bos_id=bos, eos_ids=stops, sampling=self.model.sampling)

    @torch.no_grad()
    def read(self, path: Path) -> None:
        """Take the weights of a folder that was written by `write`.

        Raises:
            InputError: an adapter of another base.
        """
        self.model.stop_ids, self.model.sampling = generation_config.stop_ids(path), generation_config.defaults(path)
        if self.base is None:
            saved = open_model(path).tensors
            load(self.model, LazyTensors(saved, lambda name: saved[name].float()))
            return
        file = peft.read(path, self.model.config)
        file.check_base(self.base.tensors)
        own = adapters(self.model)
        for site, part in file.adapters.items():
            load(own[site], part.state_dict())
