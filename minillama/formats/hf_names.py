"""Parameter names of transformers' other models: parts of LLaMA's names -> theirs, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

NAMES: Mapping[str, Mapping[str, str]] = {
    "bloom": {
        "model.embed_tokens": "transformer.word_embeddings",
        "model.embed_norm": "transformer.word_embeddings_layernorm",
        "model.norm": "transformer.ln_f",
        "model.layers": "transformer.h",
        "self_attn.q_proj": "self_attention.query_key_value",
        "self_attn.k_proj": "self_attention.query_key_value",
        "self_attn.v_proj": "self_attention.query_key_value",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
    "rwkv": {
        "model.embed_tokens": "rwkv.embeddings",
        "model.embed_norm": "rwkv.blocks.0.pre_ln",
        "model.norm": "rwkv.ln_out",
        "model.layers": "rwkv.blocks",
        "lm_head": "head",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "self_attn.r_proj": "attention.receptance",
        "self_attn": "attention",
        "mlp.up_proj": "feed_forward.key",
        "mlp.down_proj": "feed_forward.value",
        "mlp.r_proj": "feed_forward.receptance",
        "mlp": "feed_forward",
    },
}
