"""The same training under every strategy: initial weights, losses, gradients, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reshard.geometry.dtypes import by_name
from reshard.planning.placement import WantedTensor, lay_out
from reshard.planning.strategy import parse_strategy
from reshard.state import model_key
from tests.processes import RankPool
from tests.training import ranks
from tests.training.pretrained_ranks import check_both_ways

Pools = Callable[[int], RankPool]


@cache
def alone(**model: Any) -> dict[str, Any]:
    found = ranks.gradients(ranks.settings(model=dict(ranks.EXPERTS if model.pop("experts", False) else {}, **model)))
    return {name: ranks.whole([value]) if isinstance(value, dict) else value for name, value in found.items()}


TIED, BIAS, EXPERTS = {"tie_word_embeddings": True}, {"attention_bias": True}, {"experts": True}


@pytest.mark.parametrize(
    ("world", "strategy", "model"),
    [
        (2, {"data": 2}, {}),
        (2, {"tensor": 2}, TIED),
        (4, {"data": 4, "shard": 2}, {}),
        (4, {"data": 2, "tensor": 2, "shard": None}, {}),
        (4, {"pipeline": 4}, TIED),
        (8, {"data": 2, "tensor": 2, "pipeline": 2}, {}),
        (2, {"tensor": 2}, EXPERTS),
        (4, {"data": 4, "expert": 2}, EXPERTS),
        (4, {"data": 4, "expert": 2, "shard": None}, EXPERTS),
        (4, {"data": 2, "tensor": 2, "expert": 2}, EXPERTS),
        (8, {"data": 4, "expert": 2, "pipeline": 2}, EXPERTS),
        (8, {"data": 4, "expert": 2, "tensor": 2}, EXPERTS),
        pytest.param(4, {"tensor": 4}, {}, marks=pytest.mark.sweep),
        pytest.param(4, {"data": 2, "tensor": 2}, BIAS, marks=pytest.mark.sweep),
        pytest.param(8, {"data": 2, "tensor": 2, "pipeline": 2}, TIED, marks=pytest.mark.sweep),
        pytest.param(4, {"data": 4, "expert": 4, "shard": 2}, EXPERTS, marks=pytest.mark.sweep),
        pytest.param(8, {"data": 8, "expert": 2, "shard": 4}, EXPERTS, marks=pytest.mark.sweep),
        pytest.param(8, {"data": 4, "expert": 2, "shard": 2, "tensor": 2}, EXPERTS, marks=pytest.mark.sweep),
        pytest.param(8, {"data": 2, "expert": 2, "tensor": 2, "pipeline": 2}, {**EXPERTS, **TIED}, marks=pytest.mark.sweep),
        pytest.param(8, {"data": 8, "expert": 8}, EXPERTS, marks=pytest.mark.sweep),
    ],
    ids=lambda value: "-".join(f"{name}{size}" for name, size in value.items()) if isinstance(value, dict) else str(value),
)
def test_every_strategy_computes_the_same(rank_pool: Pools, world: int, strategy: dict[str, Any], model: dict[str, Any]) -> None:
    expected = alone(**model)
    fields = {name: value for name, value in model.items() if name != "experts"} | (ranks.EXPERTS if "experts" in model else {})
    found = rank_pool(world).run(ranks.gradients, ranks.settings(**strategy, model=fields))
    for rank in found:
        assert rank["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert rank["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        # Clipping and saving depend on it: every rank has the very same numbers.
        assert (rank["loss"], rank["norm"]) == (found[0]["loss"], found[0]["norm"])
    weights, gradients, clipped = (ranks.whole([rank[kind] for rank in found]) for kind in ("weights", "gradients", "clipped"))
    assert weights.keys() == gradients.keys() == clipped.keys() == expected["weights"].keys()
    for name, weight in weights.items():
        assert np.array_equal(weight, expected["weights"][name]), name
        np.testing.assert_allclose(gradients[name], expected["gradients"][name], rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(clipped[name], expected["gradients"][name] / 5, rtol=1e-3, atol=1e-6, err_msg=name)
    assert_laid_out_by_name([rank["weights"] for rank in found], **strategy)
    if strategy.get("pipeline", 1) > 1:
        shared = set(found[0]["weights"]) & set(found[-1]["weights"])
        assert shared == ({"model.embed_tokens.weight"} if "tie_word_embeddings" in model else set())


def test_weights_of_transformers_go_in_and_out_under_every_kind_of_parallelism(rank_pool: Pools, tmp_path: Path) -> None:
    check_both_ways(tmp_path, rank_pool(8).run, tied=False, data=2, tensor=2, pipeline=2)


def assert_laid_out_by_name(
    held: Sequence[ranks.Parts], data: int = 1, tensor: int = 1, pipeline: int = 1, shard: int | None = -1, expert: int = 1
) -> None:
    """The strategy that `reshard plan` takes for a run's lays the parameters out as the run did, by nothing but their names."""
    sharing = {-1: data, None: 1}.get(shard, shard)
    assert sharing is not None
    text = f"dp={data // sharing},fsdp={sharing},tp={tensor},pp={pipeline},ep={expert}"
    shapes = {name: parts[0][1] for rank in held for name, parts in rank.items()}
    placement = lay_out(parse_strategy(text), [WantedTensor(model_key(name), by_name("float32"), shape) for name, shape in shapes.items()])
    for rank, parts in enumerate(held):
        mine = {wanted.key.parameter: wanted.regions[0] for wanted in placement.describe(rank).tensors}
        assert mine.keys() == parts.keys()
        for name, region in mine.items():
            theirs = [slices for slices, _, values in parts[name] if values.size]
            if name.endswith("gate_up_proj") and tensor > 1:
                # A run takes a part of either matrix; `plan` has as much of the two as one.
                assert sum(values.size for _, _, values in parts[name]) == region.size
            else:
                assert theirs == ([] if region.is_empty else [region.slices]), f"{name} on rank {rank} under {text}"


def test_experts_and_ranks_to_which_no_token_goes(rank_pool: Pools) -> None:
    """One choice on each of four ranks, which share out 16 experts: somebody has nothing to compute, and nobody waits for them."""
    fields = {"model": {**ranks.EXPERTS, "num_experts": 16, "num_experts_per_tok": 1}, "train_dataset": {"seq_length": 1}}
    expected = ranks.gradients(ranks.settings(**fields))
    found = rank_pool(4).run(ranks.gradients, ranks.settings(data=4, expert=4, **fields))
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    whole, gradients = ranks.whole([expected["gradients"]]), ranks.whole([rank["gradients"] for rank in found])
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, whole[name], rtol=1e-3, atol=1e-6, err_msg=name)
    assert all((~gradients[name].any(axis=(1, 2))).sum() >= 8 for name in gradients if "experts" in name)


def test_the_norm_is_that_of_all_gradients() -> None:
    whole = alone()
    assert whole["norm"] == pytest.approx(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in whole["gradients"].values())), rel=1e-6)
