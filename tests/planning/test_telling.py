"""Descriptions come back from bytes; what ranks have in common comes back once; other bytes are refused."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import CommunicationError
from reshard.geometry import Mesh
from reshard.planning.agreement import RankDescription, TensorTable, describe
from reshard.planning.telling import decode, decode_all, encode, is_told_alike
from reshard.testing import state_on_rank
from tests.strategies import STRATEGIES, Strategy, arrays, layouts

ARRAYS = arrays()


def descriptions(strategy: Strategy) -> list[RankDescription]:
    return [describe(state_on_rank(ARRAYS, layouts(strategy), rank), rank) for rank in range(strategy.world_size)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_a_description_comes_back(strategy: Strategy) -> None:
    mine = descriptions(strategy)
    told = [encode(description) for description in mine]
    assert [decode(text) for text in told] == mine
    found = decode_all(told)
    assert found == mine
    assert [encode(description) for description in found] == told
    for again, description in zip(found, mine, strict=True):
        tensors = again.tensors
        assert isinstance(tensors, TensorTable)
        assert (len(tensors), hash(tensors)) == (len(description.tensors), hash(description.tensors))
        assert [tensors[index] for index in range(len(tensors))] == list(description.tensors)
        assert tensors[1:3] == description.tensors[1:3]


def test_what_ranks_have_in_common_comes_back_once() -> None:
    found = [description.tensors for description in decode_all([encode(d) for d in descriptions(Strategy(dp=4, tp=2, fsdp=True))])]
    first = found[0]
    assert isinstance(first, TensorTable)
    assert len(first.holdings) < len(first.keys)
    for tensors in found[1:]:
        assert isinstance(tensors, TensorTable)
        assert tensors.keys is first.keys
        layouts_of = [{id(holding.layout): holding.layout for holding in table.holdings} for table in (first, tensors)]
        assert layouts_of[0].keys() == layouts_of[1].keys()
    replicas = decode_all([encode(d) for d in descriptions(Strategy(dp=4))])
    assert len({id(description.tensors) for description in replicas}) == 1


def test_a_rank_knows_its_own_keys() -> None:
    mine = descriptions(Strategy(dp=4))
    told = [encode(description) for description in mine]
    for own in mine:
        found = decode_all(told, own)
        assert found == mine
        for description in found:
            assert all(a.key is b.key for a, b in zip(description.tensors, own.tensors, strict=True))
    stages = descriptions(Strategy(pp=2, tp=2))
    assert decode_all([encode(description) for description in stages], stages[3]) == stages


@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_what_is_told_alike_is_seen_before_it_is_told(strategy: Strategy) -> None:
    for one in descriptions(strategy):
        for other in descriptions(strategy):
            assert is_told_alike(one, other) == (encode(one) == encode(other))
        less = RankDescription(one.rank, one.tensors[:-1])
        assert not is_told_alike(one, less)
        assert is_told_alike(less, RankDescription(one.rank, tuple(one.tensors[:-1])))
    nothing = RankDescription(0, ())
    assert is_told_alike(nothing, RankDescription(0, ()))
    assert decode(encode(nothing)) == nothing


def test_ranks_of_a_mesh_in_any_order_come_back() -> None:
    key = next(iter(ARRAYS))
    for ranks in ((3, 0, 2**31 - 1, 7), (5,), tuple(range(40, 0, -1))):
        placed = {key: layouts(Strategy())[key]}
        placed[key] = type(placed[key])(Mesh((len(ranks),), ("a",), ranks), ((), (0,)))
        mine = describe(state_on_rank({key: ARRAYS[key]}, placed, ranks[0]), ranks[0])
        assert decode(encode(mine)) == mine


@pytest.mark.parametrize("data", [b"\x81\xa1x\x01", b"", msgspec.msgpack.encode((0, b"no zlib"))])
def test_bytes_of_another_kind_are_refused(data: bytes) -> None:
    with pytest.raises(CommunicationError, match="same version"):
        decode(data)


@given(st.randoms(use_true_random=False))
def test_changed_bytes_are_refused_or_understood(random: Random) -> None:
    text = bytearray(encode(descriptions(Strategy())[0]))
    text[random.randrange(len(text))] ^= 1 << random.randrange(8)
    try:
        found = decode(bytes(text))
    except CommunicationError:
        return
    assert len(list(found.tensors)) == len(found.tensors)
