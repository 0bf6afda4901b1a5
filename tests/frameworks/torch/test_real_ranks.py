"""Four real processes: what their collectives and FSDP2 itself make, not what a simulation would."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frameworks.torch import ranks


@pytest.mark.parametrize(
    ("kind", "holders"), [("fsdp over tp", (1, 2)), ("hsdp", (2,)), ("fsdp", (1,)), ("offloaded", (1,)), ("ddp", (4,))]
)
def test_train_capture_resume(rank_pool, kind, holders) -> None:
    results = rank_pool(4).run(ranks.run, kind)
    shapes = results[0][1]
    for key, shape in shapes.items():
        count = np.zeros(shape, int)
        for regions, _ in results:
            for offset, extent in regions[key]:
                count[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))] += 1
        assert count.min() == count.max(), key
        assert count.flat[0] in holders, key


@pytest.mark.parametrize("star", [True, False])
def test_communicator(rank_pool, star: bool) -> None:
    rank_pool(4).run(ranks.talk, star)


def test_who_was_interrupted_never_hears_what_was_told_before(rank_pool) -> None:
    words = rank_pool(4).run(ranks.be_interrupted)
    assert "ranks could not gather" in words[1]


@pytest.mark.parametrize("star", [True, False])
def test_a_rank_that_is_gone_is_missed(rank_pool, star: bool) -> None:
    words = rank_pool(4).run(ranks.be_gone, star)
    assert words[3] == ""
    for rank in range(3):
        assert "could not gather" in words[rank]
        assert f"rank:     {rank}" in words[rank]
