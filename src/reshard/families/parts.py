"""What families have in common: the names of Megatron-core, as MindSpore Transformers has them, made of those in Hugging Face files."""

from __future__ import annotations

from reshard.planning.mapping.names import Rule
from reshard.planning.mapping.parts import concatenate, either, flatten, interleave, rename, stack, transpose
from reshard.planning.mapping.rules import Expression, Size, renamed

LAYER = "model.layers.{layer}."
DECODER = "decoder.layers.{layer}."

# Queries of a group, then its key, then its value; the groups one after the other.
_HEADS = ("num_attention_heads", "num_key_value_heads", "num_key_value_heads")


def frame() -> tuple[Rule, ...]:
    """What surrounds the layers, and the norms in them."""
    return (
        rename("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        rename("decoder.final_layernorm.weight", "model.norm.weight"),
        rename("output_layer.weight", "lm_head.weight"),
        rename(DECODER + "input_layernorm.weight", LAYER + "input_layernorm.weight"),
        rename(DECODER + "pre_mlp_layernorm.weight", LAYER + "post_attention_layernorm.weight"),
    )


def attention(*, bias: bool = False, norms: bool = False) -> tuple[Rule, ...]:
    """Attention with groups of heads.

    Args:
        bias: whether queries, keys and values may have a bias.
        norms: whether queries and keys have norms.
    """
    ours, theirs = DECODER + "self_attention.", LAYER + "self_attn."

    def fused(kind: str) -> Rule:
        parts = (f"{theirs}{part}_proj.{kind}" for part in "qkv")
        return Rule(f"{ours}linear_qkv.{kind}", interleave(*parts, groups="num_key_value_heads", shares=_HEADS))

    rules = (fused("weight"), rename(ours + "linear_proj.weight", theirs + "o_proj.weight"))
    if bias:
        rules += (fused("bias"),)
    if norms:
        rules += tuple(rename(f"{ours}{part}_layernorm.weight", f"{theirs}{part}_norm.weight") for part in "qk")
    return rules


def gated(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A feed-forward layer with a gate: gate and up in one matrix, by rows or one after the other."""
    gate, up = theirs + "gate_proj.weight", theirs + "up_proj.weight"
    both = either("use_interleaved_weight_layout_mlp", interleave(gate, up), concatenate(gate, up), default=True)
    return (Rule(ours + "linear_fc1.weight", both), rename(ours + "linear_fc2.weight", theirs + "down_proj.weight"))


def experts(gate: str, up: str, down: str, count: Size) -> tuple[Rule, ...]:
    """The matrices of all experts in two parameters, transposed, one expert below the other; gate and up side by side.

    Args:
        gate: the pattern of an expert's matrix, with `{expert}`.
        up: likewise.
        down: likewise.
        count: the number of experts.
    """
    return (
        Rule(DECODER + "mlp.experts.weight1", _below(concatenate(gate, up), count)),
        Rule(DECODER + "mlp.experts.weight2", _below(down, count)),
    )


def _below(matrix: str | Expression, count: Size) -> Expression:
    return flatten(stack(transpose(matrix), "expert", count), count)


def moved_rule(rule: Rule, ours: tuple[str, str], theirs: tuple[str, str]) -> Rule:
    """A rule about the same in another place.

    Args:
        rule: about a tensor of a layer.
        ours: what its name begins with, and what instead.
        theirs: likewise, of the names that it is made of.
    """
    return Rule(rule.name.replace(*ours), renamed(rule.of, lambda name: name.replace(*theirs)))


def stacked_experts(gate: str, up: str, down: str, count: Size) -> tuple[Rule, ...]:
    """The same in the modules of transformers from release 5 on: stacked as they are, gate above up.

    Args:
        gate: as in `experts`, and so are the others.
        up: see there.
        down: see there.
        count: see there.
    """
    return (
        Rule(LAYER + "mlp.experts.gate_up_proj", stack(concatenate(gate, up), "expert", count)),
        Rule(LAYER + "mlp.experts.down_proj", stack(down, "expert", count)),
    )
