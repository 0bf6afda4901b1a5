"""Runs that go from strategy to strategy, as often as they like: every loss is that of the run which stayed where it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from tests.processes import RankPool
from tests.training import ranks

Pools = Callable[[int], RankPool]

# What a loss may differ by, relatively, under another strategy: the order of sums is another one. Far more than was ever seen (5e-8).
LIMIT = 1e-4


def train(pools: Pools, output: Path, steps: int, **strategy: Any) -> tuple[list[float], str]:
    """Train on from the newest checkpoint below a folder up to a step, on as many ranks as it takes; every loss, and what was shown."""
    world = strategy.get("data", 1) * strategy.get("tensor", 1) * strategy.get("pipeline", 1)
    if world == 1:
        return ranks.train(ranks.settings(**strategy), output, steps)
    found = pools(world).run(ranks.train, ranks.settings(**strategy), output, steps)
    assert len({tuple(losses) for losses, _ in found}) == 1
    assert [bool(shown) for _, shown in found] == [True] + [False] * (world - 1)
    return found[0]


def wander(pools: Pools, output: Path, legs: Sequence[dict[str, Any]], **fields: Any) -> list[float]:
    """Two steps under each strategy, each begun where the one before has ended; all losses."""
    losses: list[float] = []
    for number, leg in enumerate(legs):
        more, shown = train(pools, output, 2 * (number + 1), **leg, **fields)
        assert number == 0 or f"continuing from iteration {2 * number}" in shown
        assert ("sent from rank to rank" in shown) is ("balanced_load" in leg)
        losses += more
    assert len(losses) == 2 * len(legs)
    return losses


def iteration(output: Path, step: int) -> reshard.Checkpoint:
    return reshard.Checkpoint(str(output / "checkpoint" / f"iteration_{step:08d}"))


def assert_equal(output: Path, other: Path, step: int) -> None:
    """Every byte of weights and optimizer is the same in two runs' checkpoints of a step."""
    first, second = iteration(output, step), iteration(other, step)
    assert list(first) == list(second)
    assert any(name.startswith("adam_v.") for name in first)
    for name in first:
        assert first[name][...].tobytes() == second[name][...].tobytes(), name


def axes(checkpoint: reshard.Checkpoint, name: str) -> tuple[tuple[str, ...], ...]:
    """For each dimension of a tensor the axes that split it and are longer than one, outermost first."""
    layout = checkpoint[name].layout
    assert layout is not None
    return tuple(tuple(layout.mesh.axes[axis] for axis in split if layout.mesh.shape[axis] > 1) for split in layout.split)


@pytest.mark.sweep
def test_a_dense_run(rank_pool: Pools, tmp_path: Path) -> None:
    tied = {"model": {"tie_word_embeddings": True}}
    straight, _ = train(rank_pool, tmp_path / "straight", 10, **tied)
    legs = (
        {"data": 2, "tensor": 2, "pipeline": 2},
        {"pipeline": 4, "balanced_load": True},
        {"data": 2, "shard": None, "balanced_load": True},
        {"data": 4, "shard": 2},
        {},
    )
    np.testing.assert_allclose(wander(rank_pool, tmp_path / "wandering", legs, **tied), straight, rtol=1e-5)


@pytest.mark.sweep
def test_experts(rank_pool: Pools, tmp_path: Path) -> None:
    """Over other numbers of ranks, with parts of their width, as copies, and all on one."""
    experts = {"model": ranks.EXPERTS}
    home = {"data": 4, "expert": 2, "pipeline": 2}
    legs = (
        home,
        {"data": 4, "expert": 4},
        {"data": 2, "tensor": 2, "expert": 2, "balanced_load": True},
        {},
        {"data": 4, "expert": 2, "shard": None},
    )
    straight, _ = train(rank_pool, tmp_path / "straight", 2 * len(legs), **home, **experts)
    losses = wander(rank_pool, tmp_path / "wandering", legs, **experts)
    assert losses[:2] == straight[:2]
    np.testing.assert_allclose(losses, straight, rtol=LIMIT)
    gate_up, down = (f"model.layers.2.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    under = [iteration(tmp_path / "wandering", 2 * (number + 1)) for number in range(len(legs))]
    assert axes(under[0], down) == axes(under[0], f"adam_m.{gate_up}") == (("ep", "edp_shard"), (), ())
    assert axes(under[1], down) == (("ep",), (), ())
    assert axes(under[2], down) == (("ep",), (), ("tp",))
    assert axes(under[4], down) == axes(under[4], f"adam_v.{down}") == (("ep",), (), ())
    # A rank has a part of the gate's rows and a part of the others: no layout says that.
    assert under[2][gate_up].layout is None
    assert axes(under[2], "model.layers.2.mlp.gate.weight") == (("dp_shard",), ())
    assert {name for name in under[0] if "experts" in name and not name.startswith("adam_")} == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in (0, 2, 3) for name in ("gate_up_proj", "down_proj")
    }


def test_experts_resumed_where_they_were_are_exact(rank_pool: Pools, tmp_path: Path) -> None:
    fields = {"data": 4, "expert": 2, "pipeline": 2, "model": {**ranks.EXPERTS, "attention_dropout": 0.2}}
    straight, _ = train(rank_pool, tmp_path / "straight", 4, **fields)
    assert wander(rank_pool, tmp_path / "stopped", [{}, {}], **fields) == straight
    assert_equal(tmp_path / "straight", tmp_path / "stopped", 4)


HYBRID, FULL = {"data": 4, "shard": 2}, {"data": 4}


@pytest.mark.parametrize(
    ("hybrid", "full", "model"),
    [
        pytest.param(HYBRID, FULL, {}, marks=pytest.mark.sweep),
        pytest.param({**HYBRID, "expert": 2}, {**FULL, "expert": 4}, ranks.EXPERTS, marks=pytest.mark.sweep),
        pytest.param({**HYBRID, "tensor": 2}, {**FULL, "pipeline": 2}, {}, marks=pytest.mark.sweep),
    ],
    ids=["dense", "experts", "more"],
)
def test_hybrid_sharding_and_back(
    rank_pool: Pools, tmp_path: Path, hybrid: dict[str, Any], full: dict[str, Any], model: dict[str, Any]
) -> None:
    """Two copies of two shards each become four shards, and copies of shards again."""
    fields = {"model": {**model, "attention_dropout": 0.0}}
    straight, _ = train(rank_pool, tmp_path / "straight", 6, **hybrid, **fields)
    assert wander(rank_pool, tmp_path / "stopped", [hybrid] * 3, **fields) == straight
    assert_equal(tmp_path / "straight", tmp_path / "stopped", 6)
    np.testing.assert_allclose(wander(rank_pool, tmp_path / "wandering", [hybrid, full, hybrid], **fields), straight, rtol=LIMIT)
    name = "model.layers.0.post_attention_layernorm.weight"
    for step, copies in ((2, 2), (4, 1), (6, 2)):
        tensor = iteration(tmp_path / "wandering", step)[name]
        assert axes(iteration(tmp_path / "wandering", step), name) == (("dp_shard",),)
        assert tensor.layout is not None
        assert dict(zip(tensor.layout.mesh.axes, tensor.layout.mesh.shape, strict=True)).get("dp_replicate", 1) == copies
        assert len(tensor.chunks) == 4 // copies
