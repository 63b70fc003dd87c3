"""Model configuration: reading, changing, writing; parameter, FLOP and cache counts in the notation of `Shape`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minillama.config import hf
from minillama.config.arguments import Positive, checked
from minillama.config.loader import Located, build, config_folder, config_path, located, read_toml, to_dict
from minillama.config.parameters import Parameter, block, table
from minillama.config.shape import Shape, ffn_width
from minillama.errors import InputError
from minillama.files import model_folder, parsing, read_json


@dataclass(frozen=True)
class ModelConfig(Shape):
    """Model configuration; the defaults are LLaMA 7B's (arXiv 2302.13971, Table 2), the fields are in `Shape`."""

    @classmethod
    @checked
    def load(cls, source: str | os.PathLike[str]) -> ModelConfig:
        """Load a model configuration.

        Args:
            source: the name of a file in configs/model, a TOML file (the shape alone or in its [model]
                table), or a Hugging Face folder or config.json of either generation.

        Raises:
            InputError: nothing of that name, or a shape that this decoder does not support.
        """
        path = model_folder(Path(source))
        if path.is_dir():
            path = path / "config.json"
        if path.suffix == ".json":
            return cls.from_hf(read_json(path), str(path))
        path = config_path("model", str(source))
        values, origin = read_toml(path)
        if isinstance(values.get("model"), Mapping):
            return cls.from_table(values["model"], origin, "model")
        config = cls.from_table(values, origin)
        return replace(config, preset=path.stem) if path.resolve().parent == config_folder("model") else config

    @classmethod
    def from_table(cls, values: Mapping[str, Any], origin: Located | None = None, prefix: str = "") -> ModelConfig:
        """A shape from a TOML table, whose `preset` key names the shape that the other keys change."""
        if not values.get("preset"):
            return build(cls, values, origin, prefix=prefix)
        changes = dict(values)
        try:
            base = cls._of_preset(changes.pop("preset"))
        except InputError as error:
            if error.where is not None:  # an error in the preset's own file
                raise
            raise located(error, origin, f"{prefix}.preset") from None
        return base.changed(changes, origin, prefix)

    @classmethod
    def _of_preset(cls, name: object) -> ModelConfig:
        if not isinstance(name, str):
            raise InputError("preset is not a name", found=repr(name), expected="a string")
        try:
            return cls.load(name)
        except RecursionError:
            raise InputError("the presets refer to each other in a cycle") from None

    def changed(self, values: Mapping[str, Any], origin: Located | None = None, prefix: str = "") -> ModelConfig:
        """This shape with other values; widths that follow from others are derived anew.

        A feed-forward width of its own, as a preset may have, keeps its proportion to dim, rounded up to a multiple of
        32 (a group of int4 weights).
        """
        derived = {
            "head_dim": self.head_dim * self.n_heads == self.dim,
            "n_kv_heads": self.n_kv_heads == self.n_heads,
            "hidden_dim": self.hidden_dim == ffn_width(self.dim),
        }
        if {"dim", "n_heads"} & set(values):
            values = {**{name: 0 for name, follows in derived.items() if follows}, **values}
        dim = values.get("dim", self.dim)
        if type(dim) is int and dim != self.dim:
            values = {"hidden_dim": 32 * -(-self.hidden_dim * dim // (32 * self.dim)), **values}
        return build(ModelConfig, values, origin, self, prefix)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """A shape from the keys of a Hugging Face config.json. `to_hf` is the way back."""
        with parsing(where):
            fields, keys = hf.from_hf(values, where)
            return cls.from_keys(fields, where, keys).named(values["model_type"])

    def named(self, kind: str) -> ModelConfig:
        """This shape, whose files have that model_type even where the fields leave it open."""
        is_open = kind in ("mistral", "phi3") and self.to_hf()["model_type"] != kind
        return replace(self, model_type=kind) if is_open else self  # type: ignore[arg-type]

    @classmethod
    def from_keys(cls, values: Mapping[str, Any], where: object, keys: Mapping[str, str] | None = None) -> ModelConfig:
        """A shape from the header of a file; errors name the file and its `keys` for the fields."""
        try:
            return build(cls, values)
        except InputError as error:
            field = str(error.where)
            raise error.at(f"{where}, {(keys or {}).get(field, field)}") from None

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The keys of config.json, for transformers 4 and 5 alike."""
        switches = {name: value for name, value in self.switches().items() if name != "head"}
        return hf.to_hf(to_dict(self), switches, dtype)

    def parameters(self) -> dict[str, Parameter]:
        """Parameters by Hugging Face name, in the order of the model; see `config/parameters.py`."""
        return table(self)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by Hugging Face name, (out, in) for linear layers."""
        return {name: row.shape(self) for name, row in self.parameters().items()}

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one block's parameters, by name within it."""
        return {name: row.shape(self) for name, row in block(self).items()}

    @checked
    def num_params(self, embedding: bool = True) -> int:
        """Parameter count; for LLaMA 2VD + L(2DHE + 2DKE + 3DF + 2D) + D, with VD once when tied.

        Without the embedding a tied matrix counts once, as the head.
        """
        count = sum(map(math.prod, self.tensors().values()))
        return count if embedding or self.tie_embeddings else count - self.vocab_size * self.dim

    @checked
    def flops_per_token(self, seq_len: Positive, training: bool = True) -> float:
        """FLOPs per token, averaged over a causal sequence of T tokens.

        Forward: 2 for each weight of a linear layer (the head is one, the embedding is a lookup), and
        2 * 2 * H * E * (T + 1) / 2 per layer for scores and their sums, since a query attends to half of the
        sequence on average, with a sliding window w < T to w - w (w - 1) / 2T tokens. Training is three times that.
        PaLM's 6N + 12 LHET (arXiv 2204.02311, App. B) counts the whole square and all parameters, and so comes out
        higher.
        """
        matrices = (math.prod(shape) for shape in self.layer_tensors().values() if len(shape) > 1)
        products = self.n_layers * sum(matrices) + (self.vocab_size if self.head == "lm" else 1) * self.dim
        window = min(self.sliding_window or seq_len, seq_len)
        keys = window - window * (window - 1) / (2 * seq_len)  # per query, on average
        scores = 4 * self.n_heads * self.head_dim * keys if self.mixer == "attention" else 0
        return (2 * products + self.n_layers * scores) * (3 if training else 1)

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """KV cache bytes per token: 2 LKE values, none in a recurrence."""
        width = self.n_kv_heads * self.head_dim if self.mixer == "attention" else 0
        return round(2 * self.n_layers * width * bytes_per_value)

    def state_bytes(self, seq_len: int, bytes_per_value: float = 2) -> int:
        """Decode state bytes per sequence: KV cache, or RWKV's five float32 vectors per layer."""
        fixed = 5 * 4 * self.n_layers * self.dim if self.mixer == "wkv" else 0
        return fixed + seq_len * self.kv_bytes_per_token(bytes_per_value)
