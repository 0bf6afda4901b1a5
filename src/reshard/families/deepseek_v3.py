"""DeepSeek-V3: latent attention, dense layers first, then layers with experts of which some are shared, and behind them those that predict
further tokens.
"""

from __future__ import annotations

from reshard.families.parts import DECODER, LAYER, experts, frame, gated, moved_rule, stacked_experts
from reshard.planning.mapping.mappers import Family, further_layers
from reshard.planning.mapping.names import Rule
from reshard.planning.mapping.parts import rename
from reshard.planning.mapping.sizes import Sizes

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

_MINDSPORE = (
    *frame(),
    *(rename(f"{DECODER}self_attention.{ours}.weight", f"{LAYER}self_attn.{theirs}.weight") for ours, theirs in _ATTENTION.items()),
    *gated(DECODER + "mlp.", LAYER + "mlp."),
    *gated(DECODER + "mlp.shared_experts.", LAYER + "mlp.shared_experts."),
    *experts(*_MATRICES, "n_routed_experts"),
    rename(DECODER + "mlp.router.weight", LAYER + "mlp.gate.weight"),
    rename(DECODER + "mlp.router.expert_bias", LAYER + "mlp.gate.e_score_correction_bias"),
)

# What such a layer has beside what every layer has. It shares embedding and output layer with the model.
_OF_FURTHER = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}


def _further(sizes: Sizes) -> dict[str, tuple[Rule, ...]]:
    """The layers that predict further tokens: with numbers behind the others', or in a block of their own."""
    rules: list[Rule] = []
    for number, layer in enumerate(further_layers(sizes)):
        ours, theirs = f"mtp.layers.{number}.", f"model.layers.{layer}."
        rules += [rename(f"{ours}{mine}.weight", f"{theirs}{published}.weight") for mine, published in _OF_FURTHER.items()]
        rules += [moved_rule(rule, (DECODER, f"{ours}transformer_layer."), (LAYER, theirs)) for rule in _MINDSPORE if DECODER in rule.name]
    return {"mindspore": tuple(rules)}


DEEPSEEK_V3 = Family(
    "deepseek_v3",
    model_types=("deepseek_v3",),
    architectures=("DeepseekV3ForCausalLM",),
    namings={
        "mindspore": _MINDSPORE,
        "transformers": stacked_experts(*_MATRICES, "n_routed_experts"),
    },
    further=_further,
)
