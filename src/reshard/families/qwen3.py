"""Qwen3, dense."""

from __future__ import annotations

from reshard.families.parts import DECODER, LAYER, attention, frame, gated
from reshard.planning.mapping.mappers import Family

QWEN3 = Family(
    "qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    namings={"mindspore": (*frame(), *attention(norms=True), *gated(DECODER + "mlp.", LAYER + "mlp."))},
)
