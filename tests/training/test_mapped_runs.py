"""A real run of MindSpore goes on in PyTorch on real ranks, weights and optimizer, and comes back under its own names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reshard
from tests import golden
from tests.processes import RankPool
from tests.training import mapped_ranks

Pools = Callable[[int], RankPool]

# Ranks, the strategy, and how it is loaded. `shard` None: data-parallel ranks hold copies.
RUNS: list[Any] = [
    (4, {"data": 2, "tensor": 2}, {}),
    (4, {"data": 2, "tensor": 2, "shard": None}, {"balanced": True}),
    pytest.param(8, {"data": 2, "tensor": 2, "pipeline": 2}, {}, marks=pytest.mark.sweep),
    pytest.param(8, {"data": 2, "tensor": 2, "pipeline": 2, "shard": None}, {"balanced": True}, marks=pytest.mark.sweep),
    pytest.param(4, {"data": 4}, {"balanced": True}, marks=pytest.mark.sweep),
    pytest.param(2, {"pipeline": 2}, {}, marks=pytest.mark.sweep),
]


@pytest.mark.parametrize(("world", "strategy", "how"), RUNS, ids=lambda value: "-".join(map(str, value)) if type(value) is dict else None)
def test_a_real_run_goes_on_under_another_framework_and_strategy(
    rank_pool: Pools, tmp_path: Path, world: int, strategy: dict[str, Any], how: dict[str, Any]
) -> None:
    outcomes = rank_pool(world).run(mapped_ranks.go_on, strategy, tmp_path, how)
    for found, missed in outcomes:
        assert found == pytest.approx(mapped_ranks.LOSSES, abs=mapped_ranks.NEAR)
        assert missed == ()
    expected, back = golden.expected(mapped_ranks.CASE), reshard.Checkpoint(tmp_path / "back")
    assert set(expected) - {"learning_rate"} == set(back)
    for name in back:
        assert back[name][...].tobytes() == expected[name].tobytes(), name
    if strategy == {"data": 2, "tensor": 2, "shard": None}:
        mapped_ranks.assert_same_metadata(tmp_path / "back" / "iteration_00000001", golden.iteration("dp2_tp2"))
    # From there on one rank: what was trained has come back, too.
    alone = mapped_ranks.begin({})
    reshard.load(tmp_path / "back", model=alone.model, optimizer=alone.optimizer, mapping="qwen3")
    straight = mapped_ranks.losses(alone, 3)
    assert mapped_ranks.come_back({}, tmp_path / "on") == pytest.approx(straight[2:], abs=mapped_ranks.NEAR)
