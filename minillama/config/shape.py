"""Fields of the model configuration, and the rules between them. No torch.

Notation: V vocabulary, D width, L layers, H query heads, K key/value heads, E head width, F feed-forward
width, T sequence length.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from minillama.config.loader import check, suggestion
from minillama.errors import InputError


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling for contexts longer than the trained one; see `layers/rope.py`."""

    kind: Literal["linear", "ntk", "llama3", "longrope"] = "linear"
    """linear: positions divided by factor; ntk: theta * factor^(E/(E-2)); llama3: low frequencies only; longrope: each
    frequency by a factor of its own (Phi-3), see `layers/long_rope.py`."""
    factor: float = field(default=1.0, metadata={"min": 1, "max": 2**20})
    """Context extension factor."""
    low_freq_factor: float = field(default=1.0, metadata={"above": 0, "max": 2**20})
    """llama3: frequencies with fewer rotations than this in the original context are divided by factor."""
    high_freq_factor: float = field(default=4.0, metadata={"above": 0, "max": 2**20})
    """llama3: frequencies with more rotations than this are unchanged."""
    original_max_seq_len: int = field(default=8192, metadata={"min": 1, "max": 2**31})
    """llama3, longrope: the original context length."""
    short_factor: tuple[float, ...] = field(default=(), metadata={"above": 0, "max": 2**20})
    """longrope: divisors of the frequencies in sequences up to the original context length."""
    long_factor: tuple[float, ...] = field(default=(), metadata={"above": 0, "max": 2**20})
    """longrope: divisors of the frequencies in longer ones."""

    def __post_init__(self) -> None:
        if self.low_freq_factor >= self.high_freq_factor:
            what, where = "the band between the low and the high frequency factor is empty", "low_freq_factor"
            found = f"low_freq_factor = {self.low_freq_factor}, high_freq_factor = {self.high_freq_factor}"
            raise InputError(what, where=where, found=found, expected="low_freq_factor less than high_freq_factor")


@dataclass(frozen=True)
class Shape:
    """The fields of a `ModelConfig` and the rules between them; LLaMA 7B's by default (arXiv 2302.13971, Table 2)."""

    # beyond the upper bounds no model computes anything, and arithmetic on a forged config.json stays short
    dim: int = field(default=4096, metadata={"min": 1, "max": 2**20})
    """D, width of the residual stream."""
    n_layers: int = field(default=32, metadata={"min": 1, "max": 2**14})
    """L, number of blocks."""
    n_heads: int = field(default=32, metadata={"min": 1, "max": 2**20})
    """H, query heads."""
    n_kv_heads: int = field(default=0, metadata={"min": 0, "max": 2**20})
    """K, key/value heads; 0: as many as query heads."""
    head_dim: int = field(default=0, metadata={"min": 0, "max": 2**20})
    """E, width of a head; 0: dim / n_heads."""
    hidden_dim: int = field(default=0, metadata={"min": 0, "max": 2**24})
    """F, feed-forward width; 0: 8/3 dim, rounded up to a multiple of 256 (Meta's rule). With another dim than the
    preset's and no hidden_dim: in the preset's proportion, rounded up to a multiple of 32."""
    vocab_size: int = field(default=32000, metadata={"min": 1, "max": 2**28})
    """V, vocabulary size, rows of the embedding."""
    max_seq_len: int = field(default=2048, metadata={"min": 1, "max": 2**31})
    """Maximum context length, in tokens."""
    norm_eps: float = field(default=1e-6, metadata={"above": 0, "max": 0.1})
    """Added to the mean square in RMSNorm."""
    rope_theta: float = field(default=10000.0, metadata={"above": 1, "max": 1e12})
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """RoPE scaling."""
    tie_embeddings: bool = False
    """Weight tying of head and embedding."""
    norm: Literal["rms", "layer", "layer-scale"] = "rms"
    """RMSNorm; LayerNorm with weight and bias; LayerNorm with its weight alone."""
    position: Literal["rope", "rope-2d", "alibi", "learned-2d", "none"] = "rope"
    """rope-2d and learned-2d have two position ids per token: in the text and within the masked span (GLM)."""
    rotary_dim: int = field(default=0, metadata={"min": 0})
    """Rotary dimension, the first values of a head that rope rotates; 0: all of it."""
    nope_interval: int = field(default=0, metadata={"min": 0})
    """Every n-th layer has no position embedding (NoPE; SmolLM3); 0: all have."""
    qk_norm: bool = False
    """RMSNorm of every query and key head, before rope (Qwen3)."""
    sliding_window: int = field(default=0, metadata={"min": 0})
    """Sliding-window attention: tokens that a token attends to, its own included (Mistral); 0: all."""
    mixer: Literal["attention", "wkv"] = "attention"
    """wkv: RWKV's recurrence; it has its own feed-forward layer and no position embedding."""
    mlp: Literal["swiglu", "gelu", "channel-mix"] = "swiglu"
    """gelu: the tanh approximation; channel-mix: RWKV's."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Linear layers with a bias."""
    parallel_block: bool = False
    """x + attention(norm(x)) + mlp(norm(x)), one norm per block (PaLM)."""
    residual: Literal["input", "norm"] = "input"
    """norm: the skip connection carries the norm's output times sqrt(2 n_layers), not its input (ChatGLM-6B)."""
    embedding_norm: bool = False
    """A norm after the embedding (BLOOM, RWKV)."""
    logit_scale: float = field(default=1.0, metadata={"above": 0, "max": 2**20})
    """Factor of the logits."""
    init: Literal["normal", "fan-in", "rwkv"] = "normal"
    """Weight initialization; see `model/init.py`."""
    objective: Literal["lm", "glm"] = "lm"
    """Training objective of the model."""
    head: Literal["lm", "score"] = "lm"
    """score: one value per token in the place of the logits, as of a reward model."""
    pad_id: int = field(default=0, metadata={"min": 0})
    """Padding of a model with scores, no text's last token: transformers reads the score in front of the padding."""
    model_type: Literal["", "mistral", "phi3"] = ""
    """model_type of files, where the other fields leave it open; it changes no result."""
    preset: str = ""
    """Name of the file in configs/model that this shape came from."""

    def __new__(cls, *args: Any, **values: Any) -> Self:
        """Refuse unknown names as the loader does."""
        names = [f.name for f in fields(cls)]
        for name in values:
            if name not in names:
                raise InputError(f"unknown key {name!r}", where=cls.__name__, fix=suggestion(name, names))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check(self)
        if not self.head_dim:
            self._check_divisor("n_heads", "dim", "the heads do not divide the width", ", or a head_dim of its own")
        resolved = {
            "n_kv_heads": self.n_kv_heads or self.n_heads,
            "head_dim": self.head_dim or self.dim // self.n_heads,
            "hidden_dim": self.hidden_dim or ffn_width(self.dim),
        }
        for name, value in resolved.items():
            object.__setattr__(self, name, value)
        self._check_divisor("n_kv_heads", "n_heads", "the key/value heads do not divide the query heads")
        self._check_switches()
        if self.position in ("rope", "rope-2d"):
            self._check_rotary()

    def switches(self) -> dict[str, Any]:
        """Switches that differ from LLaMA's."""
        names = (
            *("norm", "position", "mixer", "mlp", "bias", "parallel_block", "residual", "embedding_norm"),
            *("logit_scale", "objective", "head", "nope_interval", "qk_norm", "sliding_window"),
        )
        plain = {f.name: f.default for f in fields(self)}
        changed = {name: getattr(self, name) for name in names if getattr(self, name) != plain[name]}
        changed |= {"rope_scaling": "longrope"} if self.is_longrope else {}
        if self.sliding_window >= self.max_seq_len:  # without effect
            changed.pop("sliding_window", None)
        return changed | ({"rotary_dim": self.rotary_dim} if self.rotary_width != self.head_dim else {})

    @property
    def is_longrope(self) -> bool:
        """Whether the rotary frequencies depend on the length of a sequence."""
        return self.rope_scaling is not None and self.rope_scaling.kind == "longrope"

    @property
    def short_context(self) -> int:
        """Length up to which sequences have the same rotary frequencies: max_seq_len, with longrope the original."""
        if self.rope_scaling is None or not self.is_longrope:
            return self.max_seq_len
        return min(self.max_seq_len, self.rope_scaling.original_max_seq_len)

    @property
    def rotary_width(self) -> int:
        """Rotary dimension, values of a head that rope rotates."""
        return self.rotary_dim or self.head_dim

    def _check_divisor(self, name: str, whole: str, what: str, otherwise: str = "") -> None:
        number, total = getattr(self, name), getattr(self, whole)
        if total % number:
            divisors = [n for n in range(1, total + 1) if total % n == 0]
            near = [n for n in divisors if n < number][-1:] + [n for n in divisors if n > number][:1]
            found, such = f"{whole} = {total}, {name} = {number}", " or ".join(map(str, near))
            expected = f"{name} that divides {whole}, such as {such}{otherwise}"
            raise InputError(what, where=name, found=found, expected=expected)

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
            ("mixer", "wkv", "qk_norm", (False,)),
            ("qk_norm", True, "nope_interval", (0,)),
            ("mixer", "wkv", "sliding_window", (0,)),
            *(("position", other, "rotary_dim", (0,)) for other in ("none", "alibi", "learned-2d", "rope-2d")),
            *(("position", other, "nope_interval", (0,)) for other in ("none", "alibi", "learned-2d", "rope-2d")),
        ]
        for switch, value, other, allowed in excluded:
            found = getattr(self, other)
            if getattr(self, switch) == value and found not in allowed:
                what, both = f"{switch} and {other} exclude each other", f"{switch} = {value!r}, {other} = {found!r}"
                expected = f"{other} = {' or '.join(map(repr, allowed))} with {switch} = {value!r}"
                raise InputError(what, where=other, found=both, expected=expected)

    def _check_rotary(self) -> None:
        """Refuse widths that cannot be rotated in pairs."""
        where, width = ("rotary_dim", self.rotary_dim) if self.rotary_dim else ("head_dim", self.head_dim)
        found, what, pairs = f"{where} = {width}", "rotary positions rotate pairs, and this width is odd", 2
        if self.position == "rope-2d":
            what, pairs = "two-dimensional rotary positions rotate two halves of pairs", 4
        if width % pairs:
            found += f" (dim = {self.dim}, n_heads = {self.n_heads})"
            whole = width + pairs - width % pairs
            expected = f"a multiple of {pairs}, such as {whole}"
            expected += f" (dim = {whole * self.n_heads})" if width * self.n_heads == self.dim else ""
            raise InputError(what, where=where, found=found, expected=expected)
        if width > self.head_dim:
            expected = f"at most head_dim = {self.head_dim}"
            raise InputError("rope cannot rotate more than a head", where=where, found=found, expected=expected)
        scaling = self.rope_scaling
        if width == 2 and scaling is not None and scaling.kind == "ntk":
            what = "ntk scaling needs more than one rotary pair"
            raise InputError(what, where="head_dim", found=2, expected="at least 4")
        for name in ("short_factor", "long_factor") if scaling is not None and self.is_longrope else ():
            count, pairs = len(getattr(scaling, name)), self.rotary_width // 2
            if count != pairs or self.position != "rope":
                what, where = "longrope has a factor per rotary pair", f"rope_scaling.{name}"
                raise InputError(what, where=where, found=f"{count}, position = {self.position!r}", expected=pairs)


def ffn_width(dim: int) -> int:
    """Feed-forward width: 8/3 of the width, rounded up to a multiple of 256, as Meta has it."""
    return 256 * -(-int(8 * dim / 3) // 256)
