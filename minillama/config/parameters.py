"""Parameter names and shapes under each switch of the configuration. No torch.

Names are Hugging Face's for LLaMA; what LLaMA lacks is named after its neighbors. (out, in) for linear layers.
"""

from __future__ import annotations

from minillama.config.shape import Shape

Shapes = dict[str, tuple[int, ...]]


def norm(config: Shape, name: str) -> Shapes:
    """Weight of a norm, and its bias where it has one."""
    shapes: Shapes = {f"{name}.weight": (config.dim,)}
    return shapes | ({f"{name}.bias": (config.dim,)} if config.norm == "layer" else {})


def block(config: Shape) -> Shapes:
    """Parameters of one block."""
    mixer = _attention(config) if config.mixer == "attention" else _time_mix(config)
    second = {} if config.parallel_block else norm(config, "post_attention_layernorm")
    mlp = {"swiglu": _swiglu, "gelu": _gelu, "channel-mix": _channel_mix}[config.mlp](config)
    return norm(config, "input_layernorm") | mixer | second | mlp


def ends(config: Shape) -> tuple[Shapes, Shapes]:
    """Parameters before the blocks, and those after them."""
    first: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.dim)}
    if config.position == "learned-2d":
        rows = (config.max_seq_len + 1, config.dim)
        first |= {f"model.embed_positions.{name}.weight": rows for name in ("position", "block_position")}
    if config.embedding_norm:
        first |= norm(config, "model.embed_norm")
    last = norm(config, "model.norm")
    if not config.tie_embeddings:
        last["lm_head.weight"] = (config.vocab_size, config.dim)
    return first, last


def _linear(name: str, out: int, width: int, bias: bool) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (out, width)}
    return shapes | ({f"{name}.bias": (out,)} if bias else {})


def _attention(config: Shape) -> Shapes:
    d, q, kv = config.dim, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    shapes: Shapes = {}
    for name, out in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        shapes |= _linear(f"self_attn.{name}", out, d, config.bias != "none")
    return shapes | _linear("self_attn.o_proj", d, q, config.bias == "all")


def _swiglu(config: Shape) -> Shapes:
    d, f, bias = config.dim, config.hidden_dim, config.bias == "all"
    gate_up = _linear("mlp.gate_proj", f, d, bias) | _linear("mlp.up_proj", f, d, bias)
    return gate_up | _linear("mlp.down_proj", d, f, bias)


def _gelu(config: Shape) -> Shapes:
    d, f, bias = config.dim, config.hidden_dim, config.bias == "all"
    return _linear("mlp.up_proj", f, d, bias) | _linear("mlp.down_proj", d, f, bias)


def _time_mix(config: Shape) -> Shapes:
    d = config.dim
    vectors = ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance")
    shapes: Shapes = {f"self_attn.{name}": (d,) for name in vectors}
    return shapes | {f"self_attn.{name}_proj.weight": (d, d) for name in ("k", "v", "r", "o")}


def _channel_mix(config: Shape) -> Shapes:
    d, f = config.dim, config.hidden_dim
    shapes: Shapes = {f"mlp.{name}": (d,) for name in ("time_mix_key", "time_mix_receptance")}
    return shapes | {"mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f), "mlp.r_proj.weight": (d, d)}
