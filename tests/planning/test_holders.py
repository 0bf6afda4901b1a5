"""Who holds what of each tensor, against a look at every rank; and that ranks which hold the same cost nothing more."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reshard.geometry import Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.planning.agreement import Holding, RankDescription, TensorDescription
from reshard.planning.holders import find_holders
from reshard.planning.placement import WantedTensor, lay_out
from reshard.planning.strategy import Strategy
from reshard.planning.telling import decode_all, encode
from reshard.state import TensorKey, model_key, slot_key
from reshard.testing import split

FLOAT = by_name("float32")
KEYS = [model_key("a"), model_key("b"), slot_key("adam_m", "a"), slot_key("adam_v", "a"), slot_key("adam_v", "c")]
SHAPE = (8, 2)


def _holding(number: int) -> Holding:
    """One of six, made anew: some alike but for their layout, or but for their dtype."""
    layout = split(Mesh((2,), ("a",), (0, 1)), "a", None) if number % 3 == 1 else None
    regions = (Region((4 * (number % 2), 0), (4, 2)),) if number else ()
    return Holding(by_name("bfloat16") if number == 5 else FLOAT, SHAPE, layout, regions)


@st.composite
def jobs(draw: st.DrawFn) -> list[RankDescription]:
    shared = [_holding(number) for number in range(6)]
    descriptions = []
    for rank in sorted(draw(st.sets(st.integers(0, 20), min_size=1, max_size=8))):
        keys = draw(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
        numbers = [draw(st.integers(0, 5)) for _ in keys]
        anew = draw(st.booleans())
        held = [_holding(number) if anew else shared[number] for number in numbers]
        made = [TensorKey(*key) if anew else key for key in keys]
        descriptions.append(RankDescription(rank, tuple(map(TensorDescription, made, held))))
    return descriptions


@given(jobs(), st.booleans())
def test_every_tensor_has_the_holders_that_a_look_at_every_rank_finds(descriptions: list[RankDescription], told: bool) -> None:
    expected: dict[TensorKey, dict[int, Holding]] = {}
    for description in descriptions:
        for key, holding in description.tensors:
            expected.setdefault(key, {})[description.rank] = holding
    found = find_holders(decode_all([encode(description) for description in descriptions]) if told else descriptions)
    assert list(found) == list(expected)
    for key, holders in found.items():
        held = [holders.holdings[number] for number in holders.numbers.tolist()]
        assert dict(zip(holders.ranks.tolist(), held, strict=True)) == expected[key]
        assert holders.ranks.tolist() == sorted(expected[key])
        different = holders.different()
        assert {rank: holding for holding, ranks in different for rank in ranks} == expected[key]
        assert len({holding for holding, _ in different}) == len(different)
        assert [ranks[0] for _, ranks in different] == sorted(ranks[0] for _, ranks in different)
        assert all(list(ranks) == sorted(ranks) for _, ranks in different)
    for key, holders in found.items():
        alike = [other for other in found if expected[other] == expected[key]]
        assert all(found[other] is holders for other in alike)


def test_replicas_are_one_holding() -> None:
    tensors = [WantedTensor(model_key(f"layers.{layer}.mlp.up_proj.weight"), FLOAT, (64, 8)) for layer in range(8)]
    placement = lay_out(Strategy(dp=1000, tp=2, pp=2), tensors)
    texts = [encode(placement.describe(rank)) for rank in range(4000)]
    assert len({text[-40:] for text in texts}) == 4, "what replicas tell differs by their rank only"
    descriptions = decode_all(texts)
    assert len({id(description.tensors) for description in descriptions}) == 4
    found = find_holders(descriptions)
    assert len({id(holders) for holders in found.values()}) == 2, "of each stage's tensors"
    for holders in found.values():
        assert [len(ranks) for _, ranks in holders.different()] == [1000, 1000]
        assert np.array_equal(holders.ranks, np.arange(2000) + holders.ranks[0])
