"""A place keeps its name, and ranks that contradict each other are found."""

from __future__ import annotations

import numpy as np
import pytest

from reshard.errors import CaptureError
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.planning.agreement import describe, place_of
from reshard.planning.holders import check_agreement
from reshard.state import HostMemory, Shard, ShardedTensor, model_key, state_of
from reshard.testing import state_on_rank
from tests.strategies import STRATEGIES, Strategy, arrays, layouts

ARRAYS = arrays()


def description(strategy: Strategy, rank: int):
    return describe(state_on_rank(ARRAYS, layouts(strategy), rank), rank)


def test_every_place_has_a_name_of_its_own_that_stays() -> None:
    names = {place_of(description(strategy, rank)) for strategy in STRATEGIES for rank in range(strategy.world_size)}
    assert len(names) == sum(strategy.world_size for strategy in STRATEGIES)
    # Stored in checkpoints: a change makes runs lose their random states.
    assert place_of(description(Strategy(dp=2, tp=2, fsdp=True), 3)) == "68d8f87c109015372926df6ae340b5e3"


def test_two_shapes_under_one_name_are_refused() -> None:
    first, second = dict(ARRAYS), dict(ARRAYS)
    key = next(iter(second))
    second[key] = second[key][:-1]
    both = [describe(state_on_rank(whole, layouts(Strategy()), 0), 0) for whole in (first, second)]
    with pytest.raises(CaptureError, match="different shapes"):
        check_agreement(both)


def test_tensors_that_lie_alike_share_a_holding_wherever_they_stand() -> None:
    whole, half, tail = Region.whole((4,)), Region((0,), (2,)), Region((2,), (2,))
    lying = {"one": (half,), "two": (whole,), "three": (half,), "parts": (half, tail), "four": (half,), "more": (half, tail), "none": ()}
    shards = {
        name: tuple(Shard(region, HostMemory(np.zeros(region.shape, np.float32))) for region in regions) for name, regions in lying.items()
    }
    dtypes = {name: by_name("float16" if name == "four" else "float32") for name in lying}
    found = describe(state_of(*(ShardedTensor(model_key(n), dtypes[n], (4,), None, shards[n]) for n in lying)), 0)
    assert [(tensor.key.parameter, tensor.dtype, tensor.regions) for tensor in found.tensors] == [
        (name, dtypes[name], regions) for name, regions in lying.items()
    ]
    holdings = {tensor.key.parameter: tensor.holding for tensor in found.tensors}
    assert holdings["one"] is holdings["three"]
    assert holdings["parts"] is holdings["more"]
    assert len({id(holding) for holding in holdings.values()}) == 5
