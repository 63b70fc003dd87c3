"""Hugging Face config.json of transformers 4 and 5, to the fields of ModelConfig and back.

Plain tables on both sides, so that `config/model.py` can import this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
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
LONG = [(name, name) for name in ("short_factor", "long_factor")]
SCALING = {"linear": FACTORS[:1], "llama3": [*FACTORS, ORIGINAL], "longrope": [*LONG, ORIGINAL]}
# parts of other models that this decoder lacks -> keys of config.json that tell of them, and patterns of the
# names of their types, here or in GGUF: a config.json may hold no more than its type
LACKING = {
    "mixture of experts": (
        ("num_local_experts", "num_experts", "n_routed_experts"),
        ("mixtral", "moe", "deepseek", "dbrx", "gpt_oss", "gpt-oss", "llama4", "jamba", "qwen3_next", "grok"),
    ),
    "latent attention": (("kv_lora_rank",), ("deepseek_v", "deepseek2", "minicpm3", "kimi")),
    "soft-capping of logits": (("attn_logit_softcapping", "final_logit_softcapping"), ("gemma2", "grok")),
    "scaled embeddings": (("embedding_multiplier",), ("gemma", "granite", "minicpm")),
    "images or sound": (("vision_config", "audio_config"), ("vl", "llava", "mllama", "clip", "whisper", "mistral3")),
    "state-space layers": (("state_size", "mamba_d_state", "ssm_cfg"), ("mamba", "jamba", "zamba", "bamba")),
    "linear attention": (("linear_num_value_heads",), ("qwen3_next", "minimax", "kimi_linear")),
    "learned positions": (("n_positions",), ("gpt2", "opt", "gpt_bigcode", "starcoder$")),
    "an encoder": (("is_encoder_decoder",), ("bert", "t5", "bart", "marian", "encoder")),
    "parallel layers with biases": (("use_parallel_residual", "parallel_attn"), ("gpt_neox", "falcon$", "gptj")),
}
PLAIN = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}


def _like_llama(name: str, *free: str, **others: Any) -> dict[str, Any]:
    """Entry of MODELS with LLaMA's keys: the class, the free switches, and what else differs."""
    optional = ("head_dim", "max_seq_len", "tie_embeddings")
    return MODEL | {"class": f"{name}ForCausalLM", "free": free, "optional": optional, **others}


MODEL: dict[str, Any] = {"keys": KEYS, "switches": {}, "free": (), "defaults": {}, "also": {}, "fixed": PLAIN}
# model_type -> class of transformers; our fields -> its keys, those that a file may lack, and other spellings of them;
# our switches, and those that may have any value; its defaults; its keys that have one value here
MODELS: dict[str, dict[str, Any]] = {
    "llama": _like_llama(
        "Llama",
        optional=("n_kv_heads", "head_dim", "max_seq_len", "norm_eps", "tie_embeddings"),
    ),
    "mistral": _like_llama(
        "Mistral", "sliding_window", defaults={"sliding_window": 4096, "max_position_embeddings": 131072}
    ),
    "qwen2": _like_llama("Qwen2", "sliding_window", switches={"bias": "qkv"}, fixed={"hidden_act": "silu"}),
    "qwen3": _like_llama(
        "Qwen3", "sliding_window", switches={"qk_norm": True}, optional=("max_seq_len", "tie_embeddings")
    ),
    "smollm3": _like_llama(
        "SmolLM3",
        "nope_interval",
        defaults={"rope_theta": 2000000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
        fixed={**PLAIN, "use_sliding_window": False},
    ),
    "phi3": _like_llama(
        "Phi3",
        *("sliding_window", "rotary_dim", "rope_scaling"),
        optional=("n_kv_heads", "head_dim", "max_seq_len", "tie_embeddings"),
    ),
    "bloom": MODEL
    | {
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
    "rwkv": MODEL
    | {
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
    if not isinstance(kind, str) or kind not in MODELS:
        raise _unsupported(values, where)
    model = MODELS[kind]
    spelt = {theirs: values[other] for other, theirs in model["also"].items() if other in values}
    values = {**model["defaults"], **spelt, **{k: v for k, v in values.items() if v is not None or k not in spelt}}
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
    if model["keys"] is KEYS:
        for read in (_rope, _window, _nope):
            table |= read(values, where, model["free"])
        return table | model["switches"], KEYS
    table["hidden_dim"] = values.get("intermediate_size") or (4 * width if isinstance(width, int) else 0)
    table["tie_embeddings"] = values.get("tie_word_embeddings", kind == "bloom")
    return table | model["switches"] | ({"n_heads": 1, "init": "rwkv"} if kind == "rwkv" else {}), KEYS | model["keys"]


def _unsupported(values: Mapping[str, Any], where: str) -> InputError:
    """Error of another model type, with what it has and this decoder lacks."""
    kind = values.get("model_type")
    return InputError(
        "this model type is not supported" if kind else "model_type is missing",
        where=f"{where}, model_type",
        found=None if kind is None else with_lacking(kind, values),
        expected=f"{', '.join(MODELS)} or {OWN}",
        fix="run it with transformers, or as GGUF with llama.cpp",
    )


def with_lacking(kind: object, values: Mapping[str, Any]) -> str:
    """A model type for a message, with the parts that this decoder lacks, by its keys and its name."""
    name = str(kind)[:80]
    found = (
        part
        for part, (keys, names) in LACKING.items()
        if any(values.get(key) for key in keys) or any(re.search(other, name) for other in names)
    )
    return f"{name}, with {' and '.join(found) or 'layers that are unknown here'}"


def _rope(values: Mapping[str, Any], where: str, free: Sequence[str]) -> dict[str, Any]:
    # version 5 has the base inside the table, version 4 beside it; transformers lets version 4's table win
    tables = [table for key in ("rope_scaling", "rope_parameters") if (table := values.get(key))] or [{}]
    if not all(isinstance(table, Mapping) for table in tables):
        raise InputError("the rope parameters are not a table", where=where, found=repr(tables)[:80])
    beside, bases = ("rope_theta", "partial_rotary_factor", ORIGINAL[1]), {"rope_theta": tables[-1].get("rope_theta")}
    bases |= {key: values[key] for key in beside if values.get(key) is not None}
    rope = {key: value for key, value in {**bases, **tables[0]}.items() if value is not None}
    if (other := tables[-1].get("rope_theta")) not in (None, rope.get("rope_theta")):
        found = f"{rope['rope_theta']!r} and {other!r}"
        raise InputError("two values of rope_theta", where=f"{where}, rope_scaling and rope_parameters", found=found)
    table, factor = {"rope_theta": rope.get("rope_theta", 10000.0)}, rope.get("partial_rotary_factor", 1.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    if factor != 1:
        if "rotary_dim" not in free or not isinstance(factor, float):
            what, at = "partial_rotary_factor is not supported", f"{where}, partial_rotary_factor"
            raise InputError(what, where=at, found=repr(factor)[:80], expected=1)
        heads = _whole(values, "num_attention_heads", where)
        width = values.get("head_dim") and _whole(values, "head_dim", where)
        table["rotary_dim"] = int((width or _whole(values, "hidden_size", where) // heads) * factor)
    if kind == "default":
        return table
    if not isinstance(kind, str) or kind not in SCALING or (kind == "longrope" and "rope_scaling" not in free):
        expected, found = "default, linear or llama3, and longrope for phi3", repr(kind)[:80]
        raise InputError("this rope type is not supported", where=f"{where}, rope_type", found=found, expected=expected)
    gain = rope.get("attention_factor") or rope.get("factor") if kind == "longrope" else None
    if gain is not None:
        what, expected = "longrope with a gain of its own is not supported", "that of max_position_embeddings"
        raise InputError(what, where=f"{where}, rope parameters", found=gain, expected=expected)
    scaling = {"kind": kind}
    for ours, theirs in SCALING[kind]:
        if theirs not in rope:
            raise InputError(f"{theirs} is missing", where=f"{where}, rope parameters of type {kind}")
        scaling[ours] = rope[theirs]
    return table | {"rope_scaling": scaling}


def _window(values: Mapping[str, Any], where: str, free: Sequence[str]) -> dict[str, Any]:
    """Sliding window, where all layers have it; Qwen's may begin at a layer."""
    if "sliding_window" not in free or not values.get("use_sliding_window", True):
        return {}
    begin = values.get("max_window_layers") and _whole(values, "max_window_layers", where)
    begin, layers = begin or 0, _whole(values, "num_hidden_layers", where)
    kinds = {name for name, is_one in (("sliding", begin < layers), ("full", begin > 0)) if is_one}
    if isinstance(listed := values.get("layer_types"), list) and listed:
        kinds = {str(name).removesuffix("_attention") for name in listed}
    if kinds == {"sliding"}:
        return {"sliding_window": values.get("sliding_window") or 0}
    if kinds != {"full"}:
        what = "a sliding window in some of the layers is not supported"
        raise InputError(
            what, where=f"{where}, layer_types", found=f"from layer {begin} of {layers} on", expected="all"
        )
    return {}


def _whole(values: Mapping[str, Any], key: str, where: str) -> int:
    if type(values[key]) is not int or values[key] < 1:
        raise InputError("not a whole number above 0", where=f"{where}, {key}", found=repr(values[key])[:80])
    return int(values[key])


def _nope(values: Mapping[str, Any], where: str, free: Sequence[str]) -> dict[str, Any]:
    """Interval of the layers without RoPE."""
    if "nope_interval" not in free:
        return {}
    interval, layers = values["no_rope_layer_interval"], values.get("no_rope_layers")
    if layers is None:
        return {"nope_interval": interval}
    layers = layers[: _whole(values, "num_hidden_layers", where)] if isinstance(layers, list) else []
    interval = layers.index(0) + 1 if 0 in layers else 0
    if not layers or layers != _rotated(interval, len(layers)):
        what, expected = "layers without RoPE at irregular intervals are not supported", "every n-th layer"
        raise InputError(what, where=f"{where}, no_rope_layers", found=str(layers)[:80], expected=expected)
    return {"nope_interval": interval}


def _rotated(interval: int, layers: int) -> list[int]:
    return [int(not interval or (i + 1) % interval != 0) for i in range(layers)]


def model_type(fields: Mapping[str, Any], switches: Mapping[str, Any]) -> str:
    """model_type of a shape in config.json: one of transformers', or ours."""
    wide = fields["hidden_dim"] == 4 * fields["dim"] and fields["head_dim"] * fields["n_heads"] == fields["dim"]
    scaled = (fields.get("rope_scaling") or {}).get("kind") in ("linear", "llama3")
    excluded = {"bloom": not wide or fields["n_kv_heads"] != fields["n_heads"], "phi3": scaled}
    for kind in [fields["model_type"]] if fields["model_type"] else MODELS:
        model = MODELS[kind]
        if {name: value for name, value in switches.items() if name not in model["free"]} == model["switches"]:
            return OWN if excluded.get(kind) else kind
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
            "pad_token_id": fields["pad_id"],
            **labels,
        }
    table |= {theirs: fields[ours] for ours, theirs in model["keys"].items()}
    table |= {key: only for key, only in model["fixed"].items() if only is not None}
    if model["keys"] is not KEYS:
        widths = {"intermediate_size": fields["hidden_dim"], "attention_hidden_size": fields["dim"]}
        tied = {"tie_word_embeddings": fields["tie_embeddings"], "use_cache": True}
        return table | (widths if kind == "rwkv" else {}) | tied | ends | dtypes
    table |= _rope_to_hf(fields) | ends
    table.setdefault("pad_token_id", None)  # its defaults may lie outside the vocabulary
    window, layers = fields["sliding_window"], fields["n_layers"]
    if "sliding_window" in model["free"]:
        table["sliding_window"] = window or None
    if kind in ("qwen2", "qwen3"):
        table |= {"use_sliding_window": window > 0, "max_window_layers": 0 if window else layers}
    if kind == "smollm3":
        interval = fields["nope_interval"]
        table |= {"no_rope_layer_interval": interval, "no_rope_layers": _rotated(interval, layers)}
    return table | {"initializer_range": 0.02, "use_cache": True, **dtypes}


def _rope_to_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of rope, for version 4 beside one another and for version 5 in a table."""
    theta, scaling = fields["rope_theta"], fields.get("rope_scaling")
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None and scaling["kind"] == "ntk":
        theta *= scaling["factor"] ** (fields["head_dim"] / (fields["head_dim"] - 2))
    elif scaling is not None:
        rope = {"rope_type": scaling["kind"]} | {theirs: scaling[ours] for ours, theirs in SCALING[scaling["kind"]]}
    old, beside = None if rope["rope_type"] == "default" else rope, {"rope_theta": theta}
    if fields["rotary_dim"]:
        share = fields["rotary_dim"] / fields["head_dim"]  # the product is cut to an integer there
        exact = int(fields["head_dim"] * share) == fields["rotary_dim"]
        beside["partial_rotary_factor"] = share if exact else math.nextafter(share, 1)
    if rope["rope_type"] == "longrope":  # version 4 takes three keys in the table
        beside[ORIGINAL[1]] = rope[ORIGINAL[1]]
        old = {"type": "longrope"} | {theirs: rope[theirs] for _, theirs in LONG}
    return {**beside, "rope_scaling": old, "rope_parameters": {**rope, **beside}}
