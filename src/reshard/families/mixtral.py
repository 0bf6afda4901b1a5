"""Mixtral: its files have names of their own for the experts."""

from __future__ import annotations

from reshard.families.parts import DECODER, LAYER, attention, experts, frame, stacked_experts
from reshard.planning.mapping.mappers import Family
from reshard.planning.mapping.parts import rename

_BLOCK = LAYER + "block_sparse_moe."
_MATRICES = (_BLOCK + "experts.{expert}.w1.weight", _BLOCK + "experts.{expert}.w3.weight", _BLOCK + "experts.{expert}.w2.weight")

MIXTRAL = Family(
    "mixtral",
    model_types=("mixtral",),
    architectures=("MixtralForCausalLM",),
    namings={
        "mindspore": (
            *frame(),
            *attention(),
            *experts(*_MATRICES, "num_local_experts"),
            rename(DECODER + "mlp.router.weight", _BLOCK + "gate.weight"),
        ),
        "transformers": (
            *stacked_experts(*_MATRICES, "num_local_experts"),
            rename(LAYER + "mlp.gate.weight", _BLOCK + "gate.weight"),
        ),
    },
)
