"""The same training under every strategy: initial weights, losses, gradients, norms; and one run that wanders through many."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.processes import RankPool
from tests.training import ranks

Pools = Callable[[int], RankPool]


@cache
def alone(*, tied: bool, bias: bool = False) -> dict[str, Any]:
    return ranks.gradients(ranks.settings(model={"tie_word_embeddings": tied, "attention_bias": bias}))


@pytest.mark.parametrize(
    ("world", "strategy", "tied"),
    [
        (2, {"data": 2}, False),
        (2, {"tensor": 2}, True),
        (4, {"tensor": 4}, False),
        (4, {"data": 4, "shard": 2}, False),
        (4, {"data": 2, "tensor": 2, "shard": None}, False),
        (4, {"data": 2, "tensor": 2, "bias": True}, False),
        (4, {"pipeline": 4}, True),
        (8, {"data": 2, "tensor": 2, "pipeline": 2}, False),
        (8, {"data": 2, "tensor": 2, "pipeline": 2}, True),
    ],
    ids=lambda value: "-".join(f"{name}{size}" for name, size in value.items()) if isinstance(value, dict) else str(value),
)
def test_every_strategy_computes_the_same(rank_pool: Pools, world: int, strategy: dict[str, Any], tied: bool) -> None:
    bias = strategy.get("bias", False)
    whole = alone(tied=tied, bias=bias)
    sizes = {name: size for name, size in strategy.items() if name != "bias"}
    model = {"tie_word_embeddings": tied, "attention_bias": bias}
    found = rank_pool(world).run(ranks.gradients, ranks.settings(**sizes, model=model))
    for rank in found:
        assert rank["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert rank["norm"] == pytest.approx(whole["norm"], rel=1e-5)
        # Clipping and saving depend on it: every rank has the very same numbers.
        assert (rank["loss"], rank["norm"]) == (found[0]["loss"], found[0]["norm"])
        for name in rank["weights"]:
            assert np.array_equal(rank["weights"][name], whole["weights"][name]), name
            np.testing.assert_allclose(rank["gradients"][name], whole["gradients"][name], rtol=1e-3, atol=1e-6, err_msg=name)
            np.testing.assert_allclose(rank["clipped"][name], whole["gradients"][name] / 5, rtol=1e-3, atol=1e-6, err_msg=name)
    names = [set(rank["weights"]) for rank in found]
    assert set.union(*names) == set(whole["weights"])
    if strategy.get("pipeline", 1) > 1:
        shared = names[0] & names[-1]
        assert shared == ({"model.embed_tokens.weight"} if tied else set())


def test_the_norm_is_that_of_all_gradients() -> None:
    whole = alone(tied=False)
    assert whole["norm"] == pytest.approx(np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in whole["gradients"].values())), rel=1e-6)


def test_one_run_wanders_through_strategies(rank_pool: Pools, tmp_path: Path) -> None:
    tied = {"model": {"tie_word_embeddings": True}}
    straight, _ = ranks.train(ranks.settings(**tied), tmp_path / "straight", 6)
    wandering = tmp_path / "wandering"
    losses: list[float] = []
    for world, strategy, steps in (
        (8, {"data": 2, "tensor": 2, "pipeline": 2}, 2),
        (4, {"pipeline": 4, "balanced_load": True}, 3),
        (2, {"data": 2, "shard": None, "balanced_load": True}, 4),
        (4, {"data": 4, "shard": 2}, 5),
    ):
        found = rank_pool(world).run(ranks.train, ranks.settings(**strategy, **tied), wandering, steps)
        assert len({tuple(rank_losses) for rank_losses, _ in found}) == 1
        assert [bool(shown) for _, shown in found] == [True] + [False] * (world - 1)
        assert ("sent from rank to rank" in found[0][1]) is ("balanced_load" in strategy)
        losses += found[0][0]
    alone_again, shown = ranks.train(ranks.settings(**tied), wandering, 6)
    losses += alone_again
    assert "continuing from iteration 5" in shown
    assert len(losses) == 6
    np.testing.assert_allclose(losses, straight, rtol=1e-5)
