"""What the name of a parameter says: its layer, its expert, and which of its dimensions tensor parallelism splits.

The names are those of Hugging Face's transformers, of Megatron-LM and of MindSpore Transformers. A module that takes a whole input and
gives a part of the output splits its weight by output (column-parallel in Megatron's words), one that takes a part and gives the whole
splits it by input (row-parallel). An embedding and an output layer are split by vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Role:
    """Which dimension of a module's tensors tensor parallelism splits, counted from the last one: -1 is the last.

    Counted from the end the same role holds for a single matrix and for the stacked matrices of many experts.

    Attributes:
        weight: of the weight; None for none.
        bias: of the bias; None for none.
    """

    weight: int | None
    bias: int | None


# A weight of shape (output, input), as torch.nn.Linear and torch.nn.Embedding have it.
_BY_OUTPUT = Role(-2, -1)
_BY_INPUT = Role(-1, None)
# GPT-2's Conv1D has a weight of shape (input, output); so have stacked experts in MindSpore Transformers and Megatron-LM.
_TRANSPOSED_BY_OUTPUT = Role(-1, -1)
_TRANSPOSED_BY_INPUT = Role(-2, None)
_WHOLE = Role(None, None)

_MODULES: tuple[tuple[Role, str], ...] = (
    # Attention: queries, keys and values by heads.
    (_BY_OUTPUT, "q_proj k_proj v_proj qkv_proj query key value query_key_value Wqkv wq wk wv q_b_proj kv_b_proj"),
    (_BY_OUTPUT, "linear_qkv linear_q linear_k linear_v linear_q_proj linear_q_up_proj linear_kv_up_proj linear_qb linear_kvb"),
    (_BY_INPUT, "o_proj out_proj wo linear_proj dense"),
    # Feed-forward layers.
    (_BY_OUTPUT, "gate_proj up_proj gate_up_proj fc1 w1 w3 linear_fc1 dense_h_to_4h"),
    (_BY_INPUT, "down_proj fc2 w2 linear_fc2 dense_4h_to_h"),
    (_TRANSPOSED_BY_OUTPUT, "c_attn c_fc"),
    (_TRANSPOSED_BY_INPUT, "c_proj"),
    # By vocabulary.
    (_BY_OUTPUT, "embed_tokens word_embeddings tok_embeddings wte embed_in lm_head output_layer embed_out"),
    # Known and never split: routers, low-rank projections, norms, positions.
    (_WHOLE, "gate router shared_expert_gate q_a_proj kv_a_proj_with_mqa linear_q_down_proj linear_kv_down_proj linear_qkv_down_proj"),
    (_WHOLE, "wpe position_embeddings embed_positions eh_proj"),
)

# Matrices of all experts in one parameter without a module of its own.
_STACKED: Mapping[str, Role] = MappingProxyType({"weight1": _TRANSPOSED_BY_OUTPUT, "weight2": _TRANSPOSED_BY_INPUT})

ROLES: Mapping[str, Role] = MappingProxyType({module: role for role, modules in _MODULES for module in modules.split()})
"""By the name of the module that has the weight; in a stack of experts by the name of the parameter itself."""

_FINAL_NORMS = frozenset(("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "layer_norm"))
_OUTPUT_LAYERS = frozenset(("lm_head", "output_layer", "embed_out"))

# What surrounds the layers stands before them, unless a part of its name is one of these.
_AFTER_LAYERS = _FINAL_NORMS | _OUTPUT_LAYERS | {"output", "head", "score", "classifier", "mtp"}

_EMBEDDINGS = frozenset(("embed_tokens", "word_embeddings", "tok_embeddings", "wte", "embed_in"))

_EXPERTS = frozenset(("experts", "local_experts"))

# Transformer Engine's grouped matrices: one parameter per expert, with the expert's number at its end.
_GROUPED = re.compile(r"(weight|bias)(\d{1,9})", re.ASCII)

# A number of more digits is none of a layer or an expert.
_MOST_DIGITS = 9


@dataclass(frozen=True, slots=True)
class ParameterName:
    """A parameter's name, understood.

    Attributes:
        stack: what stands before the layer's number; empty when there is none.
        layer: the layer's number, None outside the layers.
        is_after: whether it, or its stack, comes after the layers where it isn't one of them.
        is_of_experts: whether it belongs to the experts that expert parallelism spreads (shared experts don't).
        expert: the expert's number; None when the parameter holds all experts in its first dimension, or none.
        role: how tensor parallelism splits it; None when the table doesn't know the name.
        is_bias: whether it is a bias.
        is_embedding: whether it is the embedding of tokens.
        is_output: whether it is the weight of the output layer.
    """

    stack: str
    layer: int | None
    is_after: bool
    is_of_experts: bool
    expert: int | None
    role: Role | None
    is_bias: bool
    is_embedding: bool
    is_output: bool

    def tensor_dimension(self, dimensions: int) -> int | None:
        """The dimension that tensor parallelism splits, of a tensor of so many dimensions; None for none."""
        if self.role is None:
            return None
        from_end = self.role.bias if self.is_bias else self.role.weight
        return None if from_end is None or dimensions + from_end < 0 else dimensions + from_end


def understand(name: str) -> ParameterName:
    """What a parameter's name says."""
    parts = name.split(".")
    leaf = parts[-1]
    stack, layer, expert = "", None, None
    is_of_experts = False
    for index, part in enumerate(parts):
        if part in _EXPERTS:
            is_of_experts = True
        elif len(part) <= _MOST_DIGITS and part.isdecimal() and part.isascii():
            if is_of_experts and expert is None and parts[index - 1] in _EXPERTS:
                expert = int(part)
            elif layer is None and not is_of_experts:
                stack, layer = ".".join(parts[:index]), int(part)
    grouped = _GROUPED.fullmatch(leaf) if is_of_experts and parts[-2] not in _EXPERTS else None
    if grouped is not None:
        leaf, expert = grouped[1], int(grouped[2])
    around = set(parts if layer is None else stack.split("."))
    module = parts[-2] if len(parts) > 1 else ""
    role, is_bias = ROLES.get(module), leaf == "bias"
    if module in _EXPERTS:
        role, is_bias = _STACKED.get(leaf) or ROLES.get(leaf.removesuffix("_bias")), leaf.endswith("_bias")
    return ParameterName(
        stack=stack,
        layer=layer,
        is_after=not around.isdisjoint(_AFTER_LAYERS),
        is_of_experts=is_of_experts,
        expert=expert,
        role=role,
        is_bias=is_bias,
        is_embedding=layer is None and not around.isdisjoint(_EMBEDDINGS),
        is_output=layer is None and not around.isdisjoint(_OUTPUT_LAYERS),
    )


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """The layers of a pipeline stage: as even as can be, the first stages have one more."""
    size, more = divmod(layers, stages)
    first = stage * size + min(stage, more)
    return range(first, first + size + (stage < more))


def stage_of_layer(layer: int, layers: int, stages: int) -> int:
    """The pipeline stage that has a layer: the inverse of `stage_layers`."""
    size, more = divmod(layers, stages)
    ends_larger = more * (size + 1)
    return layer // (size + 1) if layer < ends_larger else more + (layer - ends_larger) // size
