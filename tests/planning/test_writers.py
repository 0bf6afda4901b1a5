"""Who writes what, where each region is written once: everything, by a holder, and evenly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.geometry.dtypes import by_name
from reshard.planning.file_plan import plan_sole_files
from reshard.planning.placement import WantedTensor, lay_out
from reshard.planning.strategy import parse_strategy
from reshard.planning.write_plan import plan_catalog
from reshard.planning.writers import Lot, Run, Shares, runs_of, share_lots
from reshard.state import Kind, model_key, slot_key


def loads_of(lots: list[Lot], shares: list[Shares], world: int) -> list[int]:
    loads = [0] * world
    for lot, shared in zip(lots, shares, strict=True):
        for rank, count in shared:
            loads[rank] += count * lot.nbytes
    return loads


def least_possible(lots: list[Lot], world: int) -> float:
    """What the fullest rank has at least, even if regions could be cut: of any ranks the mean of what nobody else can write."""
    found = 0.0
    for chosen in range(1, 1 << world):
        own = sum(lot.count * lot.nbytes for lot in lots if not sum(1 << rank for rank in lot.ranks) & ~chosen)
        found = max(found, own / chosen.bit_count())
    return found


@st.composite
def some_lots(draw: st.DrawFn, *, nested: bool) -> tuple[int, list[Lot]]:
    """Nested: the holders of one lot are among those of another, or others altogether, as on the axes of one mesh."""
    world = draw(st.integers(1, 8))
    if nested:
        groups = [tuple(range(a, min(a + n, world))) for n in (1, 2, 4, 8) for a in range(0, world, n)]
        holders = st.sampled_from(groups)
    else:
        holders = st.sets(st.integers(0, world - 1), min_size=1).map(lambda ranks: tuple(sorted(ranks)))
    sizes = st.sampled_from([0, 1, 4, 4, 100, 4096]) | st.integers(0, 5000)
    return world, draw(st.lists(st.builds(Lot, st.integers(1, 40), sizes, holders), max_size=12))


@given(some_lots(nested=False))
def test_everything_is_given_to_a_holder(case: tuple[int, list[Lot]]) -> None:
    world, lots = case
    shares = share_lots(lots, world)
    for lot, shared in zip(lots, shares, strict=True):
        assert sum(count for _, count in shared) == lot.count
        assert all(count > 0 for _, count in shared)
        assert [rank for rank, _ in shared] == sorted({rank for rank, _ in shared} & set(lot.ranks))
    assert shares == share_lots(list(lots), world)


@given(some_lots(nested=True))
def test_no_rank_has_more_than_it_must_and_one_region(case: tuple[int, list[Lot]]) -> None:
    world, lots = case
    largest = max((lot.nbytes for lot in lots), default=0)
    assert max(loads_of(lots, share_lots(lots, world), world)) <= least_possible(lots, world) + largest


@given(st.integers(1, 30), st.integers(0, 50), st.lists(st.tuples(st.integers(0, 400), st.booleans()), min_size=1, max_size=6))
def test_a_lot_goes_to_the_least_loaded_in_turn(count: int, nbytes: int, ranks: list[tuple[int, bool]]) -> None:
    fixed = [Lot(1, load, (rank,)) for rank, (load, _) in enumerate(ranks)]
    holders = tuple(rank for rank, (_, holds) in enumerate(ranks) if holds) or (0,)
    loads = [load for load, _ in ranks]
    expected = [0] * len(ranks)
    for _ in range(count):
        rank = min(holders, key=lambda rank: (loads[rank], rank))
        loads[rank] += max(1, nbytes)
        expected[rank] += 1
    shared = share_lots([*fixed, Lot(count, nbytes, holders)], len(ranks))[-1]
    assert shared == tuple((rank, number) for rank, number in enumerate(expected) if number)


def test_what_is_shared_out_first_makes_room_for_what_comes_later() -> None:
    """Alone the first two ranks share evenly; then the last one would be left behind."""
    lots = [Lot(40, 100, (0, 1)), Lot(20, 90, (1, 2))]
    loads = loads_of(lots, share_lots(lots, 3), 3)
    assert max(loads) <= 1.05 * sum(loads) / 3


def test_neighbours_go_to_one_rank() -> None:
    assert list(runs_of([((0, 3), (2, 2)), ((1, 5),), ((3, 1), (4, 4))], 5)) == [
        Run(0, 1, (0, 1, 3)),
        Run(1, 3, (0, 1, 4)),
        Run(3, 5, (2, 1, 4)),
    ]
    assert list(runs_of([((6, 5),)], 5)) == [Run(0, 5, (6,))]


def transformer() -> list[WantedTensor]:
    """Twelve layers in bfloat16, moments in float32; no region is more than a twentieth of what a rank writes on 8."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (512, 64), "lm_head.weight": (512, 64)}
    for layer in range(12):
        at = f"model.layers.{layer}"
        for name, shape in {
            "self_attn.q_proj": (64, 64),
            "self_attn.k_proj": (32, 64),
            "self_attn.v_proj": (32, 64),
            "self_attn.o_proj": (64, 64),
            "mlp.gate_proj": (192, 64),
            "mlp.up_proj": (192, 64),
            "mlp.down_proj": (64, 192),
            "input_layernorm": (64,),
        }.items():
            shapes[f"{at}.{name}.weight"] = shape
    found = [WantedTensor(model_key(name), by_name("bfloat16"), shape) for name, shape in shapes.items()]
    return found + [
        WantedTensor(slot_key(slot, name), by_name("float32"), s) for slot in ("adam_m", "adam_v") for name, s in shapes.items()
    ]


@pytest.mark.parametrize("optimizer", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("strategy", ["dp=8", "dp=4,tp=2", "dp=2,fsdp=4", "dp=2,tp=4", "dp=5", "dp=3,fsdp=2", "dp=2,tp=2,pp=2"])
def test_a_models_regions_are_spread_evenly(strategy: str, optimizer: bool) -> None:
    """The fullest rank writes at most 1.05 of the mean, model and optimizer together; each rank's files are what the catalog says."""
    placement = lay_out(parse_strategy(strategy, shard_optimizer=optimizer), transformer())
    world = placement.strategy.world_size
    descriptions = [placement.describe(rank) for rank in range(world)]
    catalog = plan_catalog(descriptions, "CKP", save_optimizer=True, directory="/job", remove_redundancy=True)
    kept = plan_catalog(descriptions, "CKP", save_optimizer=True, directory="/job")
    assert list(catalog.tensors) == list(kept.tensors)
    promised = set()
    for key, tensor in catalog.tensors.items():
        assert tensor.layout == kept.tensors[key].layout
        assert [(c.region, c.holders) for c in tensor.chunks] == [(c.region, c.holders) for c in kept.tensors[key].chunks]
        for chunk in tensor.chunks:
            (place,) = chunk.places
            assert place.rank in chunk.holders
            promised.add((place.file, place.name, place.rank))
    files = {rank: plan_sole_files(description, catalog) for rank, description in enumerate(descriptions)}
    assert promised == {(file.file_name, entry.name, rank) for rank, own in files.items() for file in own for entry in file.entries}
    loads = [sum(file.nbytes for file in own) for own in files.values()]
    assert sum(loads) == sum(tensor.nbytes for tensor in catalog.tensors.values())
    assert max(loads) <= 1.05 * sum(loads) / world
    for kind in Kind:
        names = [file.file_name for own in files.values() for file in own if file.kind is kind]
        assert names == [f"CKP-{kind.value}-{index:07d}-{len(names):07d}.safetensors" for index in range(len(names))]
