"""What a Hugging Face `config.json` says of a model, as plain values."""

from __future__ import annotations

from typing import Any

from reshard.config.fields import ModelSettings

_OF_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")


def config_fields(settings: ModelSettings) -> dict[str, Any]:
    """The fields of the configuration's class in transformers, by name."""
    heads = settings.num_attention_heads
    fields: dict[str, Any] = {
        "vocab_size": settings.vocab_size,
        "hidden_size": settings.hidden_size,
        "intermediate_size": settings.intermediate_size,
        "num_hidden_layers": settings.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.num_key_value_heads or heads,
        "head_dim": settings.head_dim or settings.hidden_size // heads,
        "hidden_act": settings.hidden_act,
        "max_position_embeddings": settings.max_position_embeddings,
        "initializer_range": settings.initializer_range,
        "rms_norm_eps": settings.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rope_theta},
        "attention_bias": settings.attention_bias,
        "attention_dropout": settings.attention_dropout,
        "tie_word_embeddings": settings.tie_word_embeddings,
        "use_cache": False,
    }
    if settings.num_experts is not None:
        fields |= {name: getattr(settings, name) for name in _OF_EXPERTS}
    return fields
