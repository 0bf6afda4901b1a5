"""Qwen3 with experts; layers without them are as in the dense model."""

from __future__ import annotations

from reshard.families.parts import DECODER, LAYER, attention, experts, frame, gated, stacked_experts
from reshard.planning.mapping.mappers import Family
from reshard.planning.mapping.parts import rename

_EXPERT = LAYER + "mlp.experts.{expert}."
_MATRICES = (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight", _EXPERT + "down_proj.weight")

QWEN3_MOE = Family(
    "qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    namings={
        "mindspore": (
            *frame(),
            *attention(norms=True),
            *gated(DECODER + "mlp.", LAYER + "mlp."),
            *experts(*_MATRICES, "num_experts"),
            rename(DECODER + "mlp.router.weight", LAYER + "mlp.gate.weight"),
        ),
        "transformers": stacked_experts(*_MATRICES, "num_experts"),
    },
)
