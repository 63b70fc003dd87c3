"""The shape of a model, and what follows from it by arithmetic. No torch.

Notation: V vocabulary, D width, L layers, H query heads, K key/value heads, E head width, F feed-forward
width, T sequence length.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from minillama import config_json, shapes
from minillama.errors import InputError
from minillama.settings import Located, build, check, config_folder, config_path, located, read_toml, to_dict

__all__ = ["ModelConfig", "RopeScaling"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for contexts longer than the trained one; see `layers/rope.py`."""

    kind: Literal["linear", "ntk", "llama3"] = "linear"
    """linear: positions divided by factor; ntk: theta * factor^(E/(E-2)); llama3: slow pairs only."""
    factor: float = field(default=1.0, metadata={"min": 1})
    """How much longer the context becomes."""
    low_freq_factor: float = field(default=1.0, metadata={"above": 0})
    """llama3: pairs that turn less often than this in the original context are divided by factor."""
    high_freq_factor: float = field(default=4.0, metadata={"above": 0})
    """llama3: pairs that turn more often than this are left alone."""
    original_max_seq_len: int = field(default=8192, metadata={"min": 1})
    """llama3: the original context."""

    def __post_init__(self) -> None:
        """Refuse bands that are empty or upside down.

        Raises:
            InputError: low_freq_factor is not below high_freq_factor.
        """
        if self.low_freq_factor >= self.high_freq_factor:
            raise InputError(
                "the low and the high frequency factor leave nothing between them",
                where="low_freq_factor",
                found=f"low_freq_factor = {self.low_freq_factor}, high_freq_factor = {self.high_freq_factor}",
                expected="low_freq_factor less than high_freq_factor",
            )


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. The defaults are LLaMA 7B's (arXiv 2302.13971, Table 2)."""

    # the upper ends keep arithmetic on a forged config.json short
    dim: int = field(default=4096, metadata={"min": 1, "max": 2**20})
    """D, width of the residual stream."""
    n_layers: int = field(default=32, metadata={"min": 1, "max": 2**14})
    """L, blocks."""
    n_heads: int = field(default=32, metadata={"min": 1, "max": 2**20})
    """H, query heads."""
    n_kv_heads: int = field(default=0, metadata={"min": 0})
    """K, key/value heads; 0: as many as query heads."""
    head_dim: int = field(default=0, metadata={"min": 0})
    """E, width of a head; 0: dim / n_heads."""
    hidden_dim: int = field(default=0, metadata={"min": 0})
    """F, feed-forward width; 0: 8/3 dim, rounded up to a multiple of 256 (Meta's rule)."""
    vocab_size: int = field(default=32000, metadata={"min": 1})
    """V, rows of the embedding."""
    max_seq_len: int = field(default=2048, metadata={"min": 1})
    """The longest context, in tokens."""
    norm_eps: float = field(default=1e-6, metadata={"above": 0})
    """Added to the mean square in RMSNorm."""
    rope_theta: float = field(default=10000.0, metadata={"above": 1})
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Rescaling of the rotary frequencies."""
    tie_embeddings: bool = False
    """The head uses the embedding's matrix."""
    norm: Literal["rms", "layer", "layer-scale"] = "rms"
    """RMSNorm; LayerNorm with weight and bias; LayerNorm with its weight alone."""
    position: Literal["rope", "rope-2d", "alibi", "learned-2d", "none"] = "rope"
    """rope-2d and learned-2d take a place in the text and one in the blank that is filled (GLM)."""
    rotary_dim: int = field(default=0, metadata={"min": 0})
    """Width of a head that rope turns, the first so many values; 0: all of it."""
    mixer: Literal["attention", "wkv"] = "attention"
    """wkv: RWKV's recurrence; it has its own feed-forward layer and no positions."""
    mlp: Literal["swiglu", "gelu", "channel-mix"] = "swiglu"
    """gelu: the tanh form; channel-mix: RWKV's."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which products have one."""
    parallel_block: bool = False
    """x + attention(norm(x)) + mlp(norm(x)), one norm a block (PaLM)."""
    residual: Literal["input", "norm"] = "input"
    """norm: the norm's output times sqrt(2 n_layers) goes on, not its input (ChatGLM-6B)."""
    embedding_norm: bool = False
    """A norm behind the embedding (BLOOM, RWKV)."""
    logit_scale: float = field(default=1.0, metadata={"above": 0})
    """Logits are multiplied by it."""
    init: Literal["normal", "fan-in", "rwkv"] = "normal"
    """How fresh weights are drawn; see `initialisation.py`."""
    objective: Literal["lm", "glm"] = "lm"
    """What the model is made to minimise."""
    preset: str = ""
    """The file of configs/model that this shape came from."""

    def __post_init__(self) -> None:
        """Resolve what follows from the rest, and refuse impossible shapes.

        Raises:
            InputError: a number out of its range, heads that do not divide, an odd head width; with the
                nearest valid numbers.
        """
        check(self)
        if not self.head_dim and self.dim % self.n_heads:
            near = _nearest(self.n_heads, (n for n in range(1, self.dim + 1) if self.dim % n == 0))
            raise InputError(
                "the heads do not divide the width",
                where="n_heads",
                found=f"dim = {self.dim}, n_heads = {self.n_heads}",
                expected=f"n_heads that divides dim, such as {near}, or a head_dim of its own",
            )
        resolved = {
            "n_kv_heads": self.n_kv_heads or self.n_heads,
            "head_dim": self.head_dim or self.dim // self.n_heads,
            "hidden_dim": self.hidden_dim or _ffn_width(self.dim),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        if self.n_heads % self.n_kv_heads:
            near = _nearest(self.n_kv_heads, (n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0))
            raise InputError(
                "the key/value heads do not divide the query heads",
                where="n_kv_heads",
                found=f"n_heads = {self.n_heads}, n_kv_heads = {self.n_kv_heads}",
                expected=f"n_kv_heads that divides n_heads, such as {near}",
            )
        self._check_switches()
        self._check_rotary()
        if self.rotary_width == 2 and self.rope_scaling is not None and self.rope_scaling.kind == "ntk":
            raise InputError(
                "ntk scaling needs more than one rotary pair", where="head_dim", found=2, expected="at least 4"
            )

    def switches(self) -> dict[str, Any]:
        """What is other than LLaMA's."""
        names = (
            *("norm", "position", "mixer", "mlp", "bias", "parallel_block", "residual", "embedding_norm"),
            *("logit_scale", "objective"),
        )
        plain = {f.name: f.default for f in fields(self)}
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != plain[name]}
        return changed | ({"rotary_dim": self.rotary_dim} if self.rotary_width != self.head_dim else {})

    @property
    def rotary_width(self) -> int:
        """Width of a head that rope turns."""
        return self.rotary_dim or self.head_dim

    def _check_switches(self) -> None:
        """Refuse switches that exclude each other, by name."""
        excluded = [
            ("mixer", "wkv", "position", ("none",)),
            ("mixer", "wkv", "mlp", ("channel-mix",)),
            ("mlp", "channel-mix", "mixer", ("wkv",)),
            ("mixer", "wkv", "bias", ("none",)),
            ("mixer", "wkv", "parallel_block", (False,)),
            ("mixer", "wkv", "residual", ("input",)),
            ("residual", "norm", "parallel_block", (False,)),
            ("objective", "glm", "position", ("rope-2d", "learned-2d")),
            ("init", "rwkv", "mixer", ("wkv",)),
            *(("position", other, "rotary_dim", (0,)) for other in ("none", "alibi", "learned-2d", "rope-2d")),
        ]
        for switch, value, other, allowed in excluded:
            found = getattr(self, other)
            if getattr(self, switch) == value and found not in allowed:
                raise InputError(
                    f"{switch} and {other} exclude each other",
                    where=other,
                    found=f"{switch} = {value!r}, {other} = {found!r}",
                    expected=f"{other} = {' or '.join(map(repr, allowed))} with {switch} = {value!r}",
                )

    def _check_rotary(self) -> None:
        """Refuse widths that cannot be turned in pairs."""
        if self.position not in ("rope", "rope-2d"):
            return
        where, width = ("rotary_dim", self.rotary_dim) if self.rotary_dim else ("head_dim", self.head_dim)
        pairs = 2 if self.position == "rope" else 4
        if width % pairs:
            raise InputError(
                "rotary positions turn pairs, and this width is odd"
                if pairs == 2
                else "two-dimensional rotary positions turn two halves of pairs",
                where=where,
                found=f"{where} = {width} (dim = {self.dim}, n_heads = {self.n_heads})",
                expected=f"a multiple of {pairs}, such as {width + pairs - width % pairs}",
            )
        if width > self.head_dim:
            found, expected = f"rotary_dim = {width}", f"at most head_dim = {self.head_dim}"
            raise InputError("rope cannot turn more than a head", where=where, found=found, expected=expected)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> ModelConfig:
        """Read a shape.

        Args:
            source: the name of a file in configs/model, a TOML file (the shape alone or in its [model]
                table), or a Hugging Face folder or config.json of either generation.

        Raises:
            InputError: nothing of that name, or not a shape that this decoder has.
        """
        path = Path(source)
        if path.is_dir():
            path = path / "config.json"
        if path.suffix == ".json":
            return _load_json(path)
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
        changed = {key: value for key, value in values.items() if key != "preset"}
        try:
            if not isinstance(values["preset"], str):
                raise InputError("preset is not a name", found=repr(values["preset"]), expected="a string")
            base = cls.load(values["preset"])
        except RecursionError:
            where = origin.at(f"{prefix}.preset".lstrip(".")) if origin is not None else None
            raise InputError("the presets name each other in a circle", where=where) from None
        except InputError as error:
            if error.where is not None:  # a fault in the preset's own file
                raise
            raise located(error, origin, f"{prefix}.preset") from None
        return base.changed(changed, origin, prefix)

    def changed(self, values: Mapping[str, Any], origin: Located | None = None, prefix: str = "") -> ModelConfig:
        """This shape with other values; widths that follow from others are derived anew."""
        base = self
        if {"dim", "n_heads"} & set(values):
            if self.head_dim * self.n_heads == self.dim:
                base = _unchecked(base, head_dim=0)
            if self.n_kv_heads == self.n_heads:
                base = _unchecked(base, n_kv_heads=0)
            if self.hidden_dim == _ffn_width(self.dim):
                base = _unchecked(base, hidden_dim=0)
        return build(ModelConfig, values, origin, base, prefix)

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """A shape from the keys of a Hugging Face config.json. `to_hf` is the way back."""
        try:
            return build(cls, config_json.from_hf(values, where))
        except InputError as error:
            key = str(error.where)
            if key.startswith(where):  # it has its place already
                raise
            place = f"{where}, {config_json.KEYS.get(key, key)}"
            raise InputError(error.what, where=place, found=error.found, expected=error.expected) from None

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The keys of config.json, for transformers 4 and 5 alike."""
        return config_json.to_hf(to_dict(self), self.switches(), dtype)

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within a block -> shape, (out, in) for products; see `shapes.py`."""
        return shapes.block(self)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every parameter, in the order of the model."""
        first, last = shapes.ends(self)
        layer = self.layer_tensors()
        blocks = {f"model.layers.{i}.{name}": shape for i in range(self.n_layers) for name, shape in layer.items()}
        return first | blocks | last

    def num_params(self, embedding: bool = True) -> int:
        """Parameters; for LLaMA 2VD + L(2DHE + 2DKE + 3DF + 2D) + D, with VD once when tied.

        Args:
            embedding: count the input embedding. Without it, and the head kept, a tied matrix counts
                once, as the head.
        """
        first, last = (sum(map(math.prod, table.values())) for table in shapes.ends(self))
        layer = sum(map(math.prod, self.layer_tensors().values()))
        counted = embedding or self.tie_embeddings
        return first + self.n_layers * layer + last - (0 if counted else self.vocab_size * self.dim)

    def flops_per_token(self, seq_len: int, training: bool = True) -> float:
        """Multiplications and additions a token, averaged over a causal sequence of T tokens.

        Forward: 2 for each weight of a product (the head is one, the embedding is a lookup), and
        2 * 2 * H * E * (T + 1) / 2 a layer for scores and their sums, since a query sees half of the
        sequence on average. Training is three times that. PaLM's 6N + 12 LHET (arXiv 2204.02311, App. B)
        counts the whole square and all parameters, and so comes out higher.
        """
        matrices = (math.prod(shape) for shape in self.layer_tensors().values() if len(shape) > 1)
        products = self.n_layers * sum(matrices) + self.vocab_size * self.dim
        scores = 2 * self.n_heads * self.head_dim * (seq_len + 1) if self.mixer == "attention" else 0
        return (2 * products + self.n_layers * scores) * (3 if training else 1)

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> int:
        """Bytes that one token takes in the decode state: 2 LKE values, none in a recurrence."""
        if self.mixer == "wkv":
            return 0
        return round(2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_value)

    def state_bytes(self, seq_len: int, bytes_per_value: float = 2) -> int:
        """Bytes of a sequence's decode state: keys and values, or RWKV's five float32 vectors a layer."""
        fixed = 5 * 4 * self.n_layers * self.dim if self.mixer == "wkv" else 0
        return fixed + seq_len * self.kv_bytes_per_token(bytes_per_value)


def _ffn_width(dim: int) -> int:
    return 256 * -(-int(8 * dim / 3) // 256)


def _nearest(number: int, choices: Iterable[int]) -> str:
    every = list(choices)
    below = max((n for n in every if n <= number), default=None)
    above = min((n for n in every if n >= number), default=None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def _unchecked(config: ModelConfig, **values: int) -> ModelConfig:
    """A copy in which a width is left to be derived when the next change is made."""
    copy = object.__new__(ModelConfig)
    for name, value in {**config.__dict__, **values}.items():
        object.__setattr__(copy, name, value)
    return copy


def _load_json(path: Path) -> ModelConfig:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("no config.json in the model folder", where=path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("not a readable config.json", where=path, found=error) from error
    if not isinstance(values, dict):
        raise InputError("config.json holds no table", where=path, found=type(values).__name__)
    return ModelConfig.from_hf(values, str(path))
