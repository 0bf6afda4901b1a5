"""Models of transformers and checkpoints under other names than theirs: loaded, trained on, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import reshard
from tests import golden

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}

MODELS: dict[str, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, {"num_key_value_heads": 2, **EXPERTS}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"num_key_value_heads": 2}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"num_key_value_heads": 1}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"num_key_value_heads": 4, "head_dim": 4}),
    "mixtral": (
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        {"num_key_value_heads": 2, "num_local_experts": 3, "head_dim": 4},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        {
            "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_group": 1,
            "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
            "v_head_dim": 4, "n_shared_experts": 1,
        },
    ),
}  # fmt: skip


def model(family: str, seed: int) -> Any:
    config, kind, own = MODELS[family]
    torch.manual_seed(seed)
    return kind(config(**SMALL, **own, pad_token_id=None, bos_token_id=None, eos_token_id=None))


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_of_transformers_loads_and_moves_to_the_other_framework_and_back(family: str, tmp_path: Path) -> None:
    saved, other, third = model(family, 1), model(family, 2), model(family, 3)
    saved.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    report = reshard.load(tmp_path / "hf", model=other, mapping=family)
    assert not report.unexpected
    tokens = torch.arange(12).reshape(1, 12)
    expected = saved.eval()(tokens).logits
    torch.testing.assert_close(other.eval()(tokens).logits, expected, rtol=0, atol=0)
    # Under the names of MindSpore Transformers, every tensor of the model among them.
    reshard.save(tmp_path / "ms", 1, model=other, mapping=family)
    names = list(reshard.Checkpoint(tmp_path / "ms"))
    assert all(name.startswith(("decoder.", "embedding.", "output_layer.")) for name in names)
    assert not reshard.load(tmp_path / "ms", model=third, mapping=family).unexpected
    torch.testing.assert_close(third.eval()(tokens).logits, expected, rtol=0, atol=0)
    # And the checkpoint shows the names and values of the folder.
    view, folder = (
        reshard.Checkpoint(tmp_path / "ms", mapping=reshard.families.family(family, **sizes(saved))),
        reshard.Checkpoint(tmp_path / "hf"),
    )
    assert set(view) == set(folder)
    for name in folder:
        np.testing.assert_array_equal(view[name][...], folder[name][...], name)


def sizes(given: Any) -> dict[str, int]:
    return {name: value for name, value in given.config.to_dict().items() if type(value) is int or type(value) is bool}


def test_a_run_of_mindspore_goes_on_in_torch_with_its_optimizer_and_comes_back(tmp_path: Path) -> None:
    case = golden.GOLDEN / "single_real_train"
    kind: Any = transformers.Qwen3Config
    config = kind(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    qwen3 = transformers.Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(qwen3.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    strict = reshard.Strictness(rules={"learning_rate": {"unexpected": "ignore"}})
    reshard.load(case / "checkpoint", model=qwen3, optimizer=optimizer, mapping="qwen3", strict=strict)
    reshard.save(tmp_path / "back", 1, model=qwen3, optimizer=optimizer, mapping="qwen3")
    expected, back = golden.expected("single_real_train"), reshard.Checkpoint(tmp_path / "back")
    assert set(expected) - {"learning_rate"} == set(back)
    for name in back:
        np.testing.assert_array_equal(back[name][...], expected[name], name)
    tokens = torch.from_numpy(np.load(case / "input_ids.npy")).long()
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        mask = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1])
        logits = qwen3(input_ids=tokens, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 128), tokens.reshape(-1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx([4.336116, 4.022907], abs=2e-5)
