"""The tensors of DeepSeek-V3 and of its optimizer: names and shapes, no values.

Source: the configuration of deepseek-ai/DeepSeek-V3 and the names of its checkpoint on Hugging Face, without the module for multi-token
prediction: 671 billion parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reshard.geometry.dtypes import by_name
from reshard.planning.placement import WantedTensor
from reshard.state import model_key, slot_key

BFLOAT16, FLOAT32 = by_name("bfloat16"), by_name("float32")


@dataclass(frozen=True)
class DeepSeek:
    """The configuration, by the names of its JSON file; smaller ones are for tests.

    Attributes:
        layers: `num_hidden_layers`.
        dense: `first_k_dense_replace`, the layers without experts.
        experts: `n_routed_experts` of each of the others.
        hidden: `hidden_size`.
        heads: `num_attention_heads`.
        intermediate: `intermediate_size`.
        expert_intermediate: `moe_intermediate_size`.
        vocabulary: `vocab_size`.
    """

    layers: int = 61
    dense: int = 3
    experts: int = 256
    hidden: int = 7168
    heads: int = 128
    intermediate: int = 18432
    expert_intermediate: int = 2048
    vocabulary: int = 129_280

    # Of one attention head, and the ranks of the low-rank projections; the same in every size.
    nope: int = 128
    rope: int = 64
    value: int = 128
    query_rank: int = 1536
    key_value_rank: int = 512

    def parameters(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of the parameters."""
        hidden = self.hidden
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            yield f"{at}.self_attn.q_a_proj.weight", (self.query_rank, hidden)
            yield f"{at}.self_attn.q_a_layernorm.weight", (self.query_rank,)
            yield f"{at}.self_attn.q_b_proj.weight", (self.heads * (self.nope + self.rope), self.query_rank)
            yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (self.key_value_rank + self.rope, hidden)
            yield f"{at}.self_attn.kv_a_layernorm.weight", (self.key_value_rank,)
            yield f"{at}.self_attn.kv_b_proj.weight", (self.heads * (self.nope + self.value), self.key_value_rank)
            yield f"{at}.self_attn.o_proj.weight", (hidden, self.heads * self.value)
            if layer < self.dense:
                yield from self._feed_forward(f"{at}.mlp", self.intermediate)
            else:
                for expert in range(self.experts):
                    yield from self._feed_forward(f"{at}.mlp.experts.{expert}", self.expert_intermediate)
                yield f"{at}.mlp.gate.weight", (self.experts, hidden)
                yield from self._feed_forward(f"{at}.mlp.shared_experts", self.expert_intermediate)
            yield f"{at}.input_layernorm.weight", (hidden,)
            yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    def _feed_forward(self, at: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{at}.gate_proj.weight", (width, self.hidden)
        yield f"{at}.up_proj.weight", (width, self.hidden)
        yield f"{at}.down_proj.weight", (self.hidden, width)

    def tensors(self) -> list[WantedTensor]:
        """Parameters in bfloat16, the routers' biases (buffers) and AdamW's two moments per parameter in float32."""
        parameters = list(self.parameters())
        model = [WantedTensor(model_key(name), BFLOAT16, shape) for name, shape in parameters]
        biases = [
            WantedTensor(model_key(f"model.layers.{layer}.mlp.gate.e_score_correction_bias"), FLOAT32, (self.experts,))
            for layer in range(self.dense, self.layers)
        ]
        moments = [WantedTensor(slot_key(slot, name), FLOAT32, shape) for slot in ("adam_m", "adam_v") for name, shape in parameters]
        return [*model, *biases, *moments]
