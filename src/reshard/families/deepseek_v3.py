"""DeepSeek-V3: latent attention, dense layers first, then layers with experts of which some are shared.

The layer of multi-token prediction is not declared: it has the names that it has.
"""

from __future__ import annotations

from reshard.families.parts import DECODER, LAYER, experts, frame, gated, stacked_experts
from reshard.planning.mapping.mappers import Family
from reshard.planning.mapping.parts import rename

_EXPERT = LAYER + "mlp.experts.{expert}."
_MATRICES = (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight", _EXPERT + "down_proj.weight")

_ATTENTION = {
    "linear_q_proj": "q_proj",
    "linear_q_down_proj": "q_a_proj",
    "q_layernorm": "q_a_layernorm",
    "linear_q_up_proj": "q_b_proj",
    "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm",
    "linear_kv_up_proj": "kv_b_proj",
    "linear_proj": "o_proj",
}

DEEPSEEK_V3 = Family(
    "deepseek_v3",
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    namings={
        "mindspore": (
            *frame(),
            *(rename(f"{DECODER}self_attention.{ours}.weight", f"{LAYER}self_attn.{theirs}.weight") for ours, theirs in _ATTENTION.items()),
            *gated(DECODER + "mlp.", LAYER + "mlp."),
            *gated(DECODER + "mlp.shared_experts.", LAYER + "mlp.shared_experts."),
            *experts(*_MATRICES, "n_routed_experts"),
            rename(DECODER + "mlp.router.weight", LAYER + "mlp.gate.weight"),
            rename(DECODER + "mlp.router.expert_bias", LAYER + "mlp.gate.e_score_correction_bias"),
        ),
        "transformers": stacked_experts(*_MATRICES, "n_routed_experts"),
    },
)
