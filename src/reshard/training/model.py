"""The model: transformers' Qwen3, whole or as one stage of a pipeline, with the same initial weights whatever the strategy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from reshard.config.fields import ModelSettings
from reshard.planning.naming import stage_layers
from reshard.training.seeds import derived_seed


class Qwen3Stage(Qwen3ForCausalLM):
    """A Qwen3 of which this rank may have only some layers.

    Layers of other stages are passed through, so that names and layer numbers stay those of the whole model and its forward pass is used
    as it is. The first stage takes token ids of shape (samples, tokens), the others hidden states of shape (samples, tokens,
    hidden_size); the last one gives logits of shape (samples, tokens, vocab_size), the others hidden states.
    """

    takes_tokens = True

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # a stage takes one positional tensor
        """Hidden states or logits, as the class says."""
        given: dict[str, Any] = {"input_ids": inputs} if self.takes_tokens else {"inputs_embeds": inputs}
        output: Any = super().forward(**given, use_cache=False)
        return output.logits


class _Elsewhere(nn.Module):
    """A layer that another stage has."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


def qwen3_config(settings: ModelSettings) -> Qwen3Config:
    """The Hugging Face configuration of a model."""
    heads = settings.num_attention_heads
    config = Qwen3Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=settings.num_key_value_heads or heads,
        head_dim=settings.head_dim or settings.hidden_size // heads,
        hidden_act=settings.hidden_act,
        max_position_embeddings=settings.max_position_embeddings,
        initializer_range=settings.initializer_range,
        rms_norm_eps=settings.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rope_theta},
        attention_bias=settings.attention_bias,
        attention_dropout=settings.attention_dropout,
        tie_word_embeddings=settings.tie_word_embeddings,
        use_cache=False,
    )
    # Its dropout is drawn from torch's own generators, which checkpoints save.
    config._attn_implementation = "sdpa"
    return config


def build_stage(settings: ModelSettings, stage: int = 0, stages: int = 1) -> Qwen3Stage:
    """One pipeline stage of the model, without memory for its parameters (on torch's meta device); `materialize` gives it.

    A tied embedding stays on the last stage too, under its own name: the output layer there is the same parameter.
    """
    with torch.device("meta"):
        model = Qwen3Stage(qwen3_config(settings))
    mine = stage_layers(settings.num_hidden_layers, stages, stage)
    layers = model.model.layers
    for index in range(settings.num_hidden_layers):
        if index not in mine:
            layers[index] = _Elsewhere()
    first, last = stage == 0, stage == stages - 1
    model.takes_tokens = first
    if not first and not (last and settings.tie_word_embeddings):
        # Typed as the modules of a whole model, which a stage is not.
        model.model.embed_tokens = None  # type: ignore[assignment]
    if not last:
        # Likewise.
        model.model.norm = nn.Identity()  # type: ignore[assignment]
        model.lm_head = nn.Identity()  # type: ignore[assignment]
    model.train()
    return model


def materialize(module: nn.Module, prefix: str, settings: ModelSettings, seed: int, device: torch.device) -> None:
    """Give a module's parameters memory and initial values, in place.

    Every parameter draws from a generator of its own, seeded by the run's seed and its name, so that it begins the same under every
    strategy. Tied parameters stay tied.

    Args:
        module: has its parameters on the meta device.
        prefix: its name in the model, with a dot at the end, or empty.
        settings: the model's.
        seed: the run's.
        device: where to.
    """
    made: dict[int, nn.Parameter] = {}
    for name, submodule in module.named_modules():
        for short, parameter in list(submodule.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                path = ".".join(part for part in (prefix.rstrip("."), name, short) if part)
                made[id(parameter)] = nn.Parameter(_initial(path, parameter, settings, seed).to(device))
            submodule.register_parameter(short, made[id(parameter)])
    # Derived constants, not saved: computed anew.
    for name, submodule in list(module.named_modules()):
        if isinstance(submodule, Qwen3RotaryEmbedding) and submodule.inv_freq.is_meta:
            parent, _, short = name.rpartition(".")
            setattr(module.get_submodule(parent), short, Qwen3RotaryEmbedding(config=submodule.config).to(device))


def _initial(path: str, parameter: nn.Parameter, settings: ModelSettings, seed: int) -> torch.Tensor:
    if path.endswith("bias"):
        return torch.zeros(parameter.shape)
    if parameter.dim() == 1:
        return torch.ones(parameter.shape)
    generator = torch.Generator().manual_seed(derived_seed(seed, "weight", path))
    return torch.empty(parameter.shape).normal_(0.0, settings.initializer_range, generator=generator)
