"""DeepSeek-V3's layers that predict further tokens: named where the run has them, and skipped with a word where it hasn't."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import reshard
from reshard.families import family
from reshard.storage.memory import MemoryStorage

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "n_routed_experts": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}


def published() -> dict[str, np.ndarray]:
    """Two layers, and one behind them, with the names of the published files."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    for layer in range(3):
        place = f"model.layers.{layer}."
        shapes |= {place + "input_layernorm.weight": (4,), place + "self_attn.q_a_proj.weight": (6, 4)}
        for part, shape in (("gate", (3, 4)), ("up", (3, 4)), ("down", (4, 3))):
            if layer == 0:
                shapes[f"{place}mlp.{part}_proj.weight"] = shape
            else:
                shapes |= {f"{place}mlp.experts.{expert}.{part}_proj.weight": shape for expert in range(2)}
    place = "model.layers.2."
    shapes |= {place + "enorm.weight": (4,), place + "hnorm.weight": (4,), place + "eh_proj.weight": (4, 8)}
    shapes[place + "shared_head.norm.weight"] = (4,)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays[place + "embed_tokens.weight"] = arrays["model.embed_tokens.weight"].copy()
    arrays[place + "shared_head.head.weight"] = arrays["lm_head.weight"].copy()
    return arrays


@pytest.fixture
def storage() -> MemoryStorage:
    held = MemoryStorage()
    reshard.save("/c", 1, model=published(), storage=held, extra={"config": CONFIG})
    return held


def test_a_run_that_has_such_a_layer_gets_it(storage: MemoryStorage) -> None:
    view = reshard.Checkpoint("/c", storage, mapping="deepseek_v3", naming="mindspore")
    ours = {name: np.zeros(view[name].shape, np.float32) for name in view if not name.startswith("model.")}
    place = "mtp.layers.0."
    assert not any("layers.2." in name for name in ours)
    assert {name.removeprefix(place) for name in ours if name.startswith(place)} == {
        "enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight", "transformer_layer.input_layernorm.weight",
        "transformer_layer.self_attention.linear_q_down_proj.weight", "transformer_layer.mlp.experts.weight1",
        "transformer_layer.mlp.experts.weight2",
    }  # fmt: skip
    report = reshard.load("/c", model=ours, storage=storage, mapping="deepseek_v3")
    theirs = published()
    np.testing.assert_array_equal(ours[place + "final_layernorm.weight"], theirs["model.layers.2.shared_head.norm.weight"])
    np.testing.assert_array_equal(ours[place + "eh_proj.weight"], theirs["model.layers.2.eh_proj.weight"])
    expert = "model.layers.2.mlp.experts.{}.{}_proj.weight"
    fused = [np.concatenate([theirs[expert.format(e, "gate")], theirs[expert.format(e, "up")]]).T for e in range(2)]
    np.testing.assert_array_equal(ours[place + "transformer_layer.mlp.experts.weight1"], np.concatenate(fused))
    assert report.unexpected == ()
    assert len([note for note in report.notes if "was not read: it is" in note]) == 2
    # And back, under the published names.
    sizes = {name: value for name, value in CONFIG.items() if isinstance(value, int)}
    reshard.save("/d", 1, model=ours, storage=storage, mapping=family("deepseek_v3", **sizes).saving_as("huggingface"))
    back = reshard.Checkpoint("/d", storage)
    assert set(back) == {name for name in theirs if "layers.2.embed" not in name and "shared_head.head" not in name}
    for name in back:
        np.testing.assert_array_equal(back[name][...], theirs[name], name)


@pytest.mark.parametrize("mapping", [None, "deepseek_v3"])
def test_a_run_without_such_a_layer_skips_it_and_says_so(storage: MemoryStorage, mapping: str | None) -> None:
    naming = "mindspore" if mapping else "huggingface"
    view = reshard.Checkpoint("/c", storage, mapping="deepseek_v3", naming=naming)
    run = {name: np.zeros(view[name].shape, np.float32) for name in view if not name.startswith(("mtp.", "model.layers.2."))}
    report = reshard.load("/c", model=run, storage=storage, mapping=mapping)
    assert report.unexpected == ()
    assert [note for note in report.notes if note.startswith("layer 2 predicts further tokens")] == [
        "layer 2 predicts further tokens (num_nextn_predict_layers), which the run hasn't: 14 tensors were not read"
    ]
