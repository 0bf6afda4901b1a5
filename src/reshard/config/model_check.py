"""What the fields of `model` must fulfil together: a shape that can be built, and experts where the family has some."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NoReturn

from reshard.config.document import Document
from reshard.config.fields import ModelSettings, RunConfig
from reshard.errors import ConfigError

# What a model with experts must say, and a dense one can't.
_EXPERTS = {
    "num_experts": "the number of experts of a layer",
    "num_experts_per_tok": "the number of experts that a token goes to",
    "moe_intermediate_size": "the width of an expert",
}


def check_model(run: RunConfig, document: Document) -> None:
    """Check the fields of `model` against each other, the data and the family.

    Raises:
        ConfigError: naming the first that doesn't fit.
    """
    refuse = partial(_refuse, document)
    _check_shape(run, refuse)
    if run.model.model_type == "qwen3":
        _check_no_experts(run.model, refuse)
    else:
        _check_experts(run.model, refuse)


def _refuse(document: Document, name: str, what: str, found: object, expected: str, fix: str | None = None) -> NoReturn:
    raise ConfigError(what, file=document.where(("model", name)), field=f"model.{name}", found=found, expected=expected, fix=fix)


def _check_shape(run: RunConfig, refuse: Callable[..., NoReturn]) -> None:
    model = run.model
    if model.vocab_size < 256:
        refuse("vocab_size", "the vocabulary is smaller than the data: tokens are bytes", model.vocab_size, "at least 256")
    if model.head_dim is None and model.hidden_size % model.num_attention_heads:
        refuse(
            "hidden_size",
            "the width can't be divided among the heads",
            f"hidden_size {model.hidden_size}, num_attention_heads {model.num_attention_heads}",
            "a multiple of num_attention_heads, or an explicit head_dim",
        )
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    if head_dim % 2:
        refuse("head_dim", "the rotary embedding turns pairs: the width of a head is even", head_dim, "an even number")
    if model.num_key_value_heads is not None and model.num_attention_heads % model.num_key_value_heads:
        refuse(
            "num_key_value_heads",
            "query heads can't be shared evenly among the key and value heads",
            f"num_attention_heads {model.num_attention_heads}, num_key_value_heads {model.num_key_value_heads}",
            "a divisor of num_attention_heads",
        )
    if run.train_dataset.seq_length > model.max_position_embeddings:
        refuse(
            "max_position_embeddings",
            "samples are longer than the model's longest sequence",
            model.max_position_embeddings,
            f"at least train_dataset.seq_length, {run.train_dataset.seq_length}",
        )


def _check_no_experts(model: ModelSettings, refuse: Callable[..., NoReturn]) -> None:
    for name in (*_EXPERTS, "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"):
        value = getattr(model, name)
        if value != ModelSettings.model_fields[name].default:
            refuse(name, "a dense model has no experts", value, "no such field", "take the line out, or set model_type: qwen3_moe")


def _check_experts(model: ModelSettings, refuse: Callable[..., NoReturn]) -> None:
    for name, meaning in _EXPERTS.items():
        if getattr(model, name) is None:
            refuse(name, f"a model of type qwen3_moe needs {name}", "nothing", meaning)
    experts, chosen = model.num_experts or 0, model.num_experts_per_tok or 0
    if chosen > experts:
        refuse("num_experts_per_tok", "a token can't go to more experts than there are", chosen, f"at most model.num_experts, {experts}")
    layers = range(model.num_hidden_layers)
    for layer in model.mlp_only_layers:
        if layer not in layers:
            refuse("mlp_only_layers", "a layer that the model doesn't have", layer, f"0 to {layers[-1]}")
    if not any(model.has_experts(layer) for layer in layers):
        refuse(
            "mlp_only_layers" if model.mlp_only_layers else "decoder_sparse_step",
            "no layer has experts",
            f"decoder_sparse_step {model.decoder_sparse_step}, mlp_only_layers {model.mlp_only_layers}, {len(layers)} layers",
            "at least one layer with experts",
            "change them, or set model_type: qwen3",
        )
