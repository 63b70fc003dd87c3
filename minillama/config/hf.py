"""Hugging Face config.json of transformers 4 and 5, to the fields of ModelConfig and back.

Plain tables on both sides, so that `config/model.py` can import this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillama.errors import InputError

# ours -> theirs, where the meaning is the same
KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# the same for the rope types that both sides have
SCALING = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": "original_max_position_embeddings",
    },
}
REQUIRED = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size")
OWN = "minillama"  # model_type of models unknown to transformers; the fields are under the same key
# transformers' model_type -> our switches, its keys for our fields, its fixed values
RELATIVES: dict[str, dict[str, Any]] = {
    "bloom": {
        "switches": {"norm": "layer", "position": "alibi", "mlp": "gelu", "bias": "all", "embedding_norm": True},
        "keys": {"dim": "hidden_size", "n_layers": "n_layer", "n_heads": "n_head", "norm_eps": "layer_norm_epsilon"},
        "fixed": {"apply_residual_connection_post_layernorm": False, "slow_but_exact": False, "pretraining_tp": 1},
        "class": "BloomForCausalLM",
        "context": "seq_length",
        "tied": True,
    },
    "rwkv": {
        "switches": {"norm": "layer", "position": "none", "mixer": "wkv", "mlp": "channel-mix", "embedding_norm": True},
        "keys": {"dim": "hidden_size", "n_layers": "num_hidden_layers", "norm_eps": "layer_norm_epsilon"},
        "fixed": {"rescale_every": 0},  # it halves activations for float16, which is not used here
        "class": "RwkvForCausalLM",
        "context": "context_length",
        "tied": False,
    },
}
# keys without a switch in the decoder -> the only supported value
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "sliding_window": None}


def from_hf(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of ModelConfig from the keys of config.json.

    Raises:
        InputError: another model type, an activation, bias or rope type that this decoder lacks, or a
            missing size; each is named.
    """
    kind = values.get("model_type")
    if kind == OWN:
        return _own(values, where)
    if kind in RELATIVES:
        return _relative(kind, values, where)
    if kind not in ("llama", "mistral"):
        expected = f"llama, mistral, {', '.join(RELATIVES)} or {OWN}"
        where = f"{where}, model_type"
        raise InputError("this model type is not supported", where=where, found=kind, expected=expected)
    if kind == "mistral":
        values = {"sliding_window": 4096, **values}  # the default of transformers
    for key, only in FIXED.items():
        if values.get(key) not in (None, only):
            raise InputError(f"{key} is not supported", where=f"{where}, {key}", found=values[key], expected=only)
    for ours in REQUIRED:
        if values.get(KEYS[ours]) is None:
            raise InputError(f"{KEYS[ours]} is missing", where=where)
    # version 5 has the base inside the table, version 4 beside it
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise InputError("the rope parameters are not a table", where=where, found=repr(rope))
    table = {ours: values[theirs] for ours, theirs in KEYS.items() if values.get(theirs) is not None}
    table.setdefault("max_seq_len", 2048)
    table.setdefault("norm_eps", 1e-6)
    table["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    scaling = _scaling(rope, where)
    if scaling is not None:
        table["rope_scaling"] = scaling
    return table


def _scaling(rope: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str):
        raise InputError("the rope type is not a string", where=f"{where}, rope_type", found=repr(kind)[:80])
    if kind == "default":
        return None
    if kind not in SCALING:
        expected = "default, linear or llama3"
        raise InputError("this rope type is not supported", where=f"{where}, rope_type", found=kind, expected=expected)
    for theirs in SCALING[kind].values():
        if theirs not in rope:
            raise InputError(f"{theirs} is missing", where=f"{where}, rope parameters of type {kind}")
    return {"kind": kind, **{ours: rope[theirs] for ours, theirs in SCALING[kind].items()}}


def _own(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    table = values.get(OWN)
    if not isinstance(table, Mapping):
        raise InputError("the model's fields are not a table", where=f"{where}, {OWN}", found=repr(table)[:80])
    return dict(table)


def _relative(kind: str, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = RELATIVES[kind]
    keys = known["keys"] | {"vocab_size": "vocab_size"}
    for theirs in keys.values():
        if values.get(theirs) is None:
            raise InputError(f"{theirs} is missing", where=where)
    if kind == "bloom" and values.get("apply_residual_connection_post_layernorm"):
        key = "apply_residual_connection_post_layernorm"
        raise InputError(f"{key} is not supported", where=f"{where}, {key}", found=values[key], expected=False)
    table = {ours: values[theirs] for ours, theirs in keys.items()} | known["switches"]
    if not isinstance(table["dim"], int):
        raise InputError("hidden_size is not a number", where=f"{where}, hidden_size", found=repr(table["dim"])[:80])
    table["hidden_dim"] = values.get("intermediate_size") or 4 * table["dim"]
    table["max_seq_len"] = values.get(known["context"]) or 2048
    table["tie_embeddings"] = values.get("tie_word_embeddings", known["tied"])
    if kind == "rwkv":
        table |= {"n_heads": 1, "init": "rwkv"}
        if values.get("attention_hidden_size") not in (None, table["dim"]):
            where = f"{where}, attention_hidden_size"
            raise InputError("a width of its own is not supported", where=where, found=values["attention_hidden_size"])
    return table


def model_type(fields: Mapping[str, Any], switches: Mapping[str, Any]) -> str:
    """model_type of a shape in config.json: one of transformers', or ours."""
    if not switches:
        return "llama"
    wide = fields["hidden_dim"] == 4 * fields["dim"] and fields["head_dim"] * fields["n_heads"] == fields["dim"]
    for kind, known in RELATIVES.items():
        if switches == known["switches"] and (kind == "rwkv" or (wide and fields["n_kv_heads"] == fields["n_heads"])):
            return kind
    return OWN


def to_hf(fields: Mapping[str, Any], switches: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Keys of config.json from the fields of ModelConfig.

    `ntk` is written as plain rope with a larger base.
    """
    kind = model_type(fields, switches)
    ends = {"bos_token_id": None, "eos_token_id": None, "torch_dtype": dtype, "dtype": dtype}
    if kind == OWN:
        return {"model_type": OWN, OWN: {key: value for key, value in fields.items() if key != "preset"}, **ends}
    if kind in RELATIVES:
        known = RELATIVES[kind]
        table = {theirs: fields[ours] for ours, theirs in known["keys"].items()}
        table |= {"vocab_size": fields["vocab_size"], known["context"]: fields["max_seq_len"], **known["fixed"]}
        if kind == "rwkv":
            table |= {"intermediate_size": fields["hidden_dim"], "attention_hidden_size": fields["dim"]}
        tied = {"tie_word_embeddings": fields["tie_embeddings"], "use_cache": True}
        return {"architectures": [known["class"]], "model_type": kind, **table, **tied, **ends}
    theta, scaling = fields["rope_theta"], fields.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and scaling["kind"] == "ntk":
        theta *= scaling["factor"] ** (fields["head_dim"] / (fields["head_dim"] - 2))
    elif scaling is not None:
        kind = scaling["kind"]
        rope = {"rope_type": kind, **{theirs: scaling[ours] for ours, theirs in SCALING[kind].items()}}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: fields[ours] for ours, theirs in KEYS.items()},
        **{key: only for key, only in FIXED.items() if only is not None},
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
        "rope_parameters": {**rope, "rope_theta": theta},
        "bos_token_id": None,  # the defaults of transformers are 1 and 2
        "eos_token_id": None,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
    }
