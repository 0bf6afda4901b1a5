"""A place keeps its name, and ranks that contradict each other are found."""

from __future__ import annotations

import pytest

from reshard.errors import CaptureError
from reshard.planning.agreement import describe, place_of
from reshard.planning.holders import check_agreement
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
