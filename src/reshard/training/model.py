"""The model: transformers' Qwen3, with or without experts, whole or in stages, with initial weights that no strategy changes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding, Qwen3MoeSparseMoeBlock

from reshard.config.fields import ModelSettings
from reshard.planning.naming import stage_layers
from reshard.training.config_fields import config_fields
from reshard.training.experts import RoutedExperts
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
        output: Any = super().forward(**_named(inputs, tokens=self.takes_tokens))
        return output.logits


class Qwen3MoeStage(Qwen3MoeForCausalLM):
    """The same with experts, which are `RoutedExperts`.

    The loss that balances the router's load is left out: transformers' is one over all tokens of a forward pass, so it would be another
    one for every way to split a batch.
    """

    takes_tokens = True

    def __init__(self, config: Qwen3MoeConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            if isinstance(layer.mlp, Qwen3MoeSparseMoeBlock):
                layer.mlp.experts = RoutedExperts(config)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # a stage takes one positional tensor
        """Hidden states or logits, as for `Qwen3Stage`."""
        output: Any = super().forward(**_named(inputs, tokens=self.takes_tokens))
        return output.logits


ModelStage = Qwen3Stage | Qwen3MoeStage


def _named(inputs: torch.Tensor, *, tokens: bool) -> dict[str, Any]:
    return {"input_ids" if tokens else "inputs_embeds": inputs, "use_cache": False}


class _Elsewhere(nn.Module):
    """A layer that another stage has."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


def model_config(settings: ModelSettings) -> Qwen3Config | Qwen3MoeConfig:
    """The Hugging Face configuration of a model."""
    fields = config_fields(settings)
    config = Qwen3Config(**fields) if settings.model_type == "qwen3" else Qwen3MoeConfig(**fields)
    # Its dropout is drawn from torch's own generators, which checkpoints save.
    config._attn_implementation = "sdpa"
    return config


def saved_config(settings: ModelSettings) -> dict[str, Any]:
    """The same as what a `config.json` says, for the whole model under transformers' own class."""
    config = model_config(settings)
    config.architectures = [(Qwen3MoeForCausalLM if isinstance(config, Qwen3MoeConfig) else Qwen3ForCausalLM).__name__]
    return json.loads(config.to_json_string())


def build_stage(settings: ModelSettings, stage: int = 0, stages: int = 1) -> ModelStage:
    """One pipeline stage of the model, without memory for its parameters (on torch's meta device); `materialize` gives it.

    A tied embedding stays on the last stage too, under its own name: the output layer there is the same parameter.
    """
    with torch.device("meta"):
        config = model_config(settings)
        model = Qwen3MoeStage(config) if isinstance(config, Qwen3MoeConfig) else Qwen3Stage(config)
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
        if isinstance(submodule, Qwen3RotaryEmbedding | Qwen3MoeRotaryEmbedding) and submodule.inv_freq.is_meta:
            parent, _, short = name.rpartition(".")
            kind: Any = type(submodule)
            setattr(module.get_submodule(parent), short, kind(config=submodule.config).to(device))


def _initial(path: str, parameter: nn.Parameter, settings: ModelSettings, seed: int) -> torch.Tensor:
    if path.endswith("bias"):
        return torch.zeros(parameter.shape)
    if parameter.dim() == 1:
        return torch.ones(parameter.shape)
    generator = torch.Generator().manual_seed(derived_seed(seed, "weight", path))
    return torch.empty(parameter.shape).normal_(0.0, settings.initializer_range, generator=generator)
