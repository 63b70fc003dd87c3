"""Hugging Face config.json of transformers 4 and 5, to the fields of ModelConfig and back.

Plain tables on both sides, so that `config/model.py` can import this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillama.errors import InputError

SEQUENCE, CAUSAL = "ForSequenceClassification", "ForCausalLM"  # ends of classes
OWN = "minillama"  # model_type of models unknown to transformers; the fields are under the same key
# our fields -> LLaMA's keys, where the meaning is the same
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
# rope types that both sides have -> fields of RopeScaling, each with its key
ORIGINAL = ("original_max_seq_len", "original_max_position_embeddings")
FACTORS = [(name, name) for name in ("factor", "low_freq_factor", "high_freq_factor")]
SCALING = {"linear": FACTORS[:1], "llama3": [*FACTORS, ORIGINAL]}
# model_type -> class of transformers; our fields -> its keys, those that a file may lack, other spellings of them;
# our switches; its keys that have one value here
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "class": "LlamaForCausalLM",
        "keys": KEYS,
        "optional": ("n_kv_heads", "head_dim", "max_seq_len", "norm_eps", "tie_embeddings"),
        "switches": {},
        "fixed": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    },
    "bloom": {
        "class": "BloomForCausalLM",
        "keys": {
            "dim": "hidden_size",
            "n_layers": "n_layer",
            "n_heads": "n_head",
            "norm_eps": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
            "max_seq_len": "seq_length",
        },
        "optional": ("max_seq_len",),
        "also": {"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        "switches": {"norm": "layer", "position": "alibi", "mlp": "gelu", "bias": "all", "embedding_norm": True},
        "fixed": {"apply_residual_connection_post_layernorm": False, "slow_but_exact": False, "pretraining_tp": 1},
    },
    "rwkv": {
        "class": "RwkvForCausalLM",
        "keys": {
            "dim": "hidden_size",
            "n_layers": "num_hidden_layers",
            "norm_eps": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
            "max_seq_len": "context_length",
        },
        "optional": ("max_seq_len",),
        "also": {"max_position_embeddings": "context_length"},
        "switches": {"norm": "layer", "position": "none", "mixer": "wkv", "mlp": "channel-mix", "embedding_norm": True},
        "fixed": {"rescale_every": 0},  # it halves activations for float16, which is not used here
    },
}
MISTRAL = {
    "sliding_window": 4096,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}  # transformers' defaults
SAME = ("slow_but_exact", "pretraining_tp", "rescale_every")  # keys with which transformers computes the same


def from_hf(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Mapping[str, str]]:
    """Fields of ModelConfig from the keys of config.json, and the key of each field for messages.

    Raises:
        InputError: another model type, an activation, bias or rope type that this decoder lacks, or a
            missing size; each is named.
    """
    kind = values.get("model_type")
    if kind == OWN:
        own = values.get(OWN)
        if not isinstance(own, Mapping):
            found = repr(own)[:80]
            raise InputError("the model's fields are not a table", where=f"{where}, {OWN}", found=found)
        return dict(own), {}
    if kind == "mistral":
        kind, values = "llama", _mistral(values, where)
    if not isinstance(kind, str) or kind not in MODELS:
        where, expected = f"{where}, model_type", f"llama, mistral, bloom, rwkv or {OWN}"
        raise InputError("this model type is not supported", where=where, found=kind, expected=expected)
    model = MODELS[kind]
    spelt = {theirs: values[other] for other, theirs in model.get("also", {}).items() if other in values}
    values = {**spelt, **{key: value for key, value in values.items() if value is not None or key not in spelt}}
    width, classes = values.get("hidden_size"), values.get("architectures") or [""]
    table: dict[str, Any] = {}
    if str(classes[0]).endswith(SEQUENCE):
        table = {"head": "score", "pad_id": values.get("pad_token_id") or 0}
    for ours, theirs in model["keys"].items():
        if values.get(theirs) is not None:
            table[ours] = values[theirs]
        elif ours not in model["optional"]:
            raise InputError(f"{theirs} is missing", where=where)
    for key, only in (model["fixed"] | ({"attention_hidden_size": width} if kind == "rwkv" else {})).items():
        if key not in SAME and values.get(key) not in (None, only) and (key, values[key]) != ("hidden_act", "swish"):
            raise InputError(f"{key} is not supported", where=f"{where}, {key}", found=values[key], expected=only)
    if kind == "llama":
        return table | _rope(values, where), KEYS
    table["hidden_dim"] = values.get("intermediate_size") or (4 * width if isinstance(width, int) else 0)
    table["tie_embeddings"] = values.get("tie_word_embeddings", kind == "bloom")
    return table | model["switches"] | ({"n_heads": 1, "init": "rwkv"} if kind == "rwkv" else {}), KEYS | model["keys"]


def _mistral(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """LLaMA's keys of a Mistral: up to its window, sliding-window attention is full attention."""
    values = MISTRAL | dict(values)
    window, longest = values["sliding_window"], values["max_position_embeddings"]
    if window is not None and (type(window) is not int or window < 1):
        raise InputError("not a window of tokens", where=f"{where}, sliding_window", found=repr(window)[:80])
    return values | ({"max_position_embeddings": min(longest, window)} if window and type(longest) is int else {})


def _rope(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    # version 5 has the base inside the table, version 4 beside it; transformers lets version 4's table win
    tables = [table for key in ("rope_scaling", "rope_parameters") if (table := values.get(key))]
    rope = tables[0] if tables else {}
    if not all(isinstance(table, Mapping) for table in tables):
        raise InputError("the rope parameters are not a table", where=where, found=repr(tables)[:80])
    bases = [table.get("rope_theta") for table in (rope, values, *tables)]
    theta = {"rope_theta": next((base for base in bases if base is not None), 10000.0)}
    if (other := tables[-1].get("rope_theta") if tables else None) not in (None, theta["rope_theta"]):
        found = f"{theta['rope_theta']!r} and {other!r}"
        raise InputError("two values of rope_theta", where=f"{where}, rope_scaling and rope_parameters", found=found)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta
    if not isinstance(kind, str) or kind not in SCALING:
        expected, found = "default, linear or llama3", repr(kind)[:80]
        raise InputError("this rope type is not supported", where=f"{where}, rope_type", found=found, expected=expected)
    scaling = {"kind": kind}
    for ours, theirs in SCALING[kind]:
        if theirs not in rope:
            raise InputError(f"{theirs} is missing", where=f"{where}, rope parameters of type {kind}")
        scaling[ours] = rope[theirs]
    return theta | {"rope_scaling": scaling}


def model_type(fields: Mapping[str, Any], switches: Mapping[str, Any]) -> str:
    """model_type of a shape in config.json: one of transformers', or ours."""
    wide = fields["hidden_dim"] == 4 * fields["dim"] and fields["head_dim"] * fields["n_heads"] == fields["dim"]
    for kind, model in MODELS.items():
        if switches == model["switches"]:
            return kind if kind != "bloom" or (wide and fields["n_kv_heads"] == fields["n_heads"]) else OWN
    return OWN


def to_hf(fields: Mapping[str, Any], switches: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Keys of config.json from the fields of ModelConfig.

    `ntk` is written as plain rope with a larger base.
    """
    kind = model_type(fields, switches)
    ends = {"bos_token_id": None, "eos_token_id": None}  # the defaults of transformers are 1 and 2
    dtypes: dict[str, Any] = {"torch_dtype": dtype, "dtype": dtype}
    scores = fields["head"] == "score"
    if kind == OWN or (scores and kind == "rwkv"):  # of which transformers has no class with this head
        own = {key: value for key, value in fields.items() if key != "preset"}
        return {"model_type": OWN, OWN: own, **ends, **dtypes}
    model = MODELS[kind]
    table: dict[str, Any] = {"architectures": [model["class"]], "model_type": kind}
    if scores:
        labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}, "num_labels": 1}
        table |= {
            "architectures": [model["class"].replace(CAUSAL, SEQUENCE)],
            **labels,
            "pad_token_id": fields["pad_id"],
        }
    table |= {theirs: fields[ours] for ours, theirs in model["keys"].items()}
    table |= {key: only for key, only in model["fixed"].items() if only is not None}
    if kind != "llama":
        widths = {"intermediate_size": fields["hidden_dim"], "attention_hidden_size": fields["dim"]}
        tied = {"tie_word_embeddings": fields["tie_embeddings"], "use_cache": True}
        return table | (widths if kind == "rwkv" else {}) | tied | ends | dtypes
    theta, scaling = fields["rope_theta"], fields.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and scaling["kind"] == "ntk":
        theta *= scaling["factor"] ** (fields["head_dim"] / (fields["head_dim"] - 2))
    elif scaling is not None:
        rope = {"rope_type": scaling["kind"]} | {theirs: scaling[ours] for ours, theirs in SCALING[scaling["kind"]]}
    table |= {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}
    table |= {"rope_parameters": {**rope, "rope_theta": theta}, **ends}
    return table | {"initializer_range": 0.02, "use_cache": True, **dtypes}
