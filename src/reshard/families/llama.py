"""Llama, and the families that differ from it in biases only: Qwen2, Mistral."""

from __future__ import annotations

from reshard.families.parts import DECODER, LAYER, attention, frame, gated
from reshard.planning.mapping.mappers import Family

LLAMA = Family(
    "llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    namings={"mindspore": (*frame(), *attention(bias=True), *gated(DECODER + "mlp.", LAYER + "mlp."))},
)

QWEN2 = Family(
    "qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    namings={"mindspore": (*frame(), *attention(bias=True), *gated(DECODER + "mlp.", LAYER + "mlp."))},
)

MISTRAL = Family(
    "mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    namings={"mindspore": (*frame(), *attention(), *gated(DECODER + "mlp.", LAYER + "mlp."))},
)
