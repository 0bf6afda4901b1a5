"""The forecast of a load for all ranks at once, against the plans that the ranks would make."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.format.names import tensor_name
from reshard.geometry import Region
from reshard.geometry.dtypes import by_name
from reshard.planning import forecast
from reshard.planning.exchange_plan import plan_exchange
from reshard.planning.forecast import forecast_balanced, forecast_direct, match_tensors
from reshard.planning.placement import Placement, WantedTensor, lay_out
from reshard.planning.read_plan import plan_reads
from reshard.planning.strategy import Strategy, parse_strategy
from reshard.state import model_key
from tests.planning.test_placement import FLOAT, tensors

SIZES = st.sampled_from([1, 1, 2, 3, 4])


@st.composite
def strategies(draw: st.DrawFn) -> Strategy:
    dp, fsdp, tp, pp = draw(SIZES), draw(SIZES), draw(SIZES), draw(SIZES)
    ep = draw(st.sampled_from([1, fsdp, dp * fsdp]))
    rules = draw(st.sampled_from([[], ["*.q_proj.weight=tp:1"], ["*.o_proj.*=none", "*.up_proj.*=tp:1,fsdp:1"]]))
    return parse_strategy(f"dp={dp},fsdp={fsdp},tp={tp},pp={pp},ep={ep}", shard_optimizer=draw(st.booleans()), splits=rules)


def stored(placement: Placement, *, copies: bool = False) -> Catalog:
    """What a job of this placement saves: each region by the first rank that holds it, or by every one."""
    arrangements: dict[int, Arrangement] = {}
    found = {}
    for kind in placement.kinds:
        holders: dict[Region, list[int]] = {}
        for rank in sorted(kind.layout.mesh.ranks):
            holders.setdefault(kind.layout.rank_region(rank, kind.global_shape), []).append(rank)
        pieces = tuple(
            Piece(region, tuple(Site(f"file-{rank}", rank) for rank in (ranks if copies else ranks[:1])), tuple(ranks))
            for region, ranks in holders.items()
            if not region.is_empty
        )
        arrangement = Arrangement(kind.dtype, kind.global_shape, kind.layout, pieces)
        arrangements |= dict.fromkeys(kind.members, arrangement)
    for index, tensor in enumerate(placement.tensors):
        found[tensor.key] = StoredTensor(tensor.key, tensor_name(tensor.key), arrangements[index])
    return Catalog("/checkpoint", found)


def check_direct(placement: Placement, catalog: Catalog) -> None:
    traffic = forecast_direct(placement, match_tensors(placement, catalog).fitting)
    plans = [plan_reads(placement.describe(rank), catalog) for rank in range(placement.strategy.world_size)]
    assert traffic.needed.tolist() == [plan.nbytes for plan in plans]
    assert traffic.read.tolist() == [plan.nbytes for plan in plans]
    assert traffic.files.tolist() == [len(plan.files) for plan in plans]
    assert set(traffic.file_names) == {file for plan in plans for file in plan.files}
    assert not traffic.sent.any()


@given(strategies(), strategies(), st.booleans(), st.booleans(), st.sampled_from([1, 64 << 20]))
def test_a_direct_load(source: Strategy, target: Strategy, copies: bool, stacked: bool, table_bytes: int) -> None:
    wanted = tensors(stacked=stacked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "_TABLE_BYTES", table_bytes)
        check_direct(lay_out(target, wanted), stored(lay_out(source, wanted), copies=copies))


@given(strategies(), strategies(), st.booleans(), st.booleans())
def test_a_balanced_load(source: Strategy, target: Strategy, copies: bool, stacked: bool) -> None:
    wanted = tensors(stacked=stacked)
    placement, catalog = lay_out(target, wanted), stored(lay_out(source, wanted), copies=copies)
    world = target.world_size
    traffic = forecast_balanced(placement, match_tensors(placement, catalog).fitting)
    plan = plan_exchange([placement.describe(rank) for rank in range(world)], catalog)
    assert traffic.read.tolist() == plan.loads(world)
    assert traffic.needed.tolist() == [placement.describe(rank).nbytes for rank in range(world)]
    sent, received = [0] * world, [0] * world
    files: list[set[str]] = [set() for _ in range(world)]
    for share in plan.shares:
        files[share.reader].add(share.site.file)
        for block in share.blocks(1 << 30, 1 << 30):
            for part in block.parts:
                if part.rank != share.reader:
                    sent[share.reader] += part.nbytes * len(share.tensors)
                    received[part.rank] += part.nbytes * len(share.tensors)
    assert traffic.sent.tolist() == sent
    assert traffic.received.tolist() == received
    assert traffic.files.tolist() == [len(names) for names in files]
    assert set(traffic.file_names) == set().union(*files)
    assert int(traffic.read.sum()) == sum(tensor.nbytes for tensor in catalog.tensors.values())


def test_what_fits_and_what_does_not() -> None:
    whole = tensors()
    catalog = stored(lay_out(parse_strategy("dp=1"), whole))
    floats, ints = by_name("float16"), by_name("int64")
    wanted = [
        whole[0]._replace(dtype=floats),
        whole[1]._replace(global_shape=(7,)),
        whole[2]._replace(dtype=ints),
        *whole[3:-1],
        WantedTensor(model_key("new.weight"), FLOAT, (3,)),
    ]
    found = match_tensors(lay_out(parse_strategy("tp=2"), wanted), catalog, lambda misfit: misfit.wanted == "float16")
    assert found.missing == (model_key("new.weight"),)
    assert found.unexpected == (whole[-1].key,)
    assert [(misfit.key, misfit.field) for misfit in found.mismatched] == [(whole[1].key, "shape"), (whole[2].key, "dtype")]
    assert [misfit.key for misfit in found.cast] == [whole[0].key]
    assert found.restored == len(whole) - 3
    assert found.nbytes == sum(catalog.tensors[tensor.key].nbytes for tensor in (whole[0], *whole[3:-1]))


def test_nothing_is_a_forecast_too() -> None:
    placement = lay_out(parse_strategy("tp=2"), [])
    found = match_tensors(placement, Catalog("/checkpoint", {}))
    for foretold in (forecast_direct(placement, found.fitting), forecast_balanced(placement, found.fitting)):
        assert foretold.needed.tolist() == foretold.read.tolist() == foretold.files.tolist() == [0, 0]
        assert foretold.file_names == ()
