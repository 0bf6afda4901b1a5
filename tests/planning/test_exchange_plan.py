"""Balanced plans against numpy: every needed element is read once, everyone gets what it wants, and the reading is even."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.format import row_blocks
from reshard.format.row_blocks import row_blocks_of
from reshard.geometry import DType, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.planning.agreement import Holding, RankDescription, TensorDescription
from reshard.planning.balance import Job, spread
from reshard.planning.exchange_plan import ExchangePlan, plan_exchange
from reshard.planning.exchange_schedule import schedule_exchange
from reshard.state import model_key
from reshard.testing import every_placement, split

FLOAT = by_name("float32")


def described(rank: int, held: dict[str, tuple[tuple[int, ...], list[Region]]], dtype: DType = FLOAT) -> RankDescription:
    return RankDescription(
        rank,
        tuple(TensorDescription(model_key(name), Holding(dtype, shape, None, tuple(regions))) for name, (shape, regions) in held.items()),
    )


def stored(pieces: dict[str, tuple[tuple[int, ...], Sequence[Region]]], dtype: DType = FLOAT) -> Catalog:
    tensors = {}
    for name, (shape, regions) in pieces.items():
        chunks = tuple(Piece(region, (Site(f"file-{number}", number),)) for number, region in enumerate(regions))
        tensors[model_key(name)] = StoredTensor(model_key(name), name, Arrangement(dtype, shape, None, chunks))
    return Catalog("/checkpoint", tensors)


def grid(shape: tuple[int, ...], mesh: Mesh, placement: tuple[tuple[str, ...], ...]) -> list[Region]:
    """Every rank's region, in rank order."""
    layout = split(mesh, *placement)
    return [layout.rank_region(rank, shape) for rank in sorted(mesh.ranks)]


@contextmanager
def small_blocks(nbytes: int) -> Iterator[None]:
    """Row blocks of so many bytes, so that small tensors have several."""
    with mock.patch.multiple(row_blocks, LEAST_BYTES=nbytes, MOST_BYTES=nbytes):
        yield


BLOCK_BYTES = st.sampled_from([4, 24, 64, 200, row_blocks.LEAST_BYTES])


@st.composite
def regions_of_ranks(draw: st.DrawFn, shape: tuple[int, ...], world: int) -> list[list[Region]]:
    """What each rank holds: by a layout, or any boxes, which overlap and leave gaps."""
    if draw(st.booleans()):
        mesh = Mesh((world,), ("a",), tuple(range(world)))
        return [[region] for region in grid(shape, mesh, draw(st.sampled_from(every_placement(len(shape), ("a",)))))]
    found = []
    for _ in range(world):
        boxes = []
        for _ in range(draw(st.integers(0, 2))):
            offset = tuple(draw(st.integers(0, extent)) for extent in shape)
            boxes.append(Region(offset, tuple(draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True))))
        found.append(boxes)
    return found


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[RankDescription], Catalog]:
    world, writers = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    held: list[dict[str, tuple[tuple[int, ...], list[Region]]]] = [{} for _ in range(world)]
    pieces: dict[str, tuple[tuple[int, ...], Sequence[Region]]] = {}
    for number in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 7), max_size=3)))
        mesh = Mesh((writers,), ("a",), tuple(range(writers)))
        placement = draw(st.sampled_from(every_placement(len(shape), ("a",))))
        disjoint = list(dict.fromkeys(region for region in grid(shape, mesh, placement) if not region.is_empty))
        wanted = draw(regions_of_ranks(shape, world))
        for copy in range(draw(st.integers(1, 3))):
            pieces[f"tensor.{number}.{copy}"] = shape, disjoint
            for rank in range(world):
                held[rank][f"tensor.{number}.{copy}"] = shape, wanted[rank]
    return [described(rank, tensors) for rank, tensors in enumerate(held)], stored(pieces)


@given(cases(), BLOCK_BYTES, st.integers(0, 40))
def test_series_are_the_same_blocks(case: tuple[list[RankDescription], Catalog], block_bytes: int, gap_bytes: int) -> None:
    for share in plan_exchange(*case).shares:
        if not share.box.shape:
            continue
        d, stride = share.outermost, share.piece.strides(4)[share.outermost]
        found = []
        for first, indices in share.series(block_bytes, gap_bytes):
            for index in indices:
                targets = [replace(part.target, offset=moved(part.target.offset, d, index)) for part in first.parts]
                parts = tuple(part._replace(target=target) for part, target in zip(first.parts, targets, strict=True))
                found.append(replace(first, offset=first.offset + index * stride, parts=parts))
        assert found == list(share.blocks(block_bytes, gap_bytes))


def test_blocks_that_are_alike_are_one_series() -> None:
    held = [{"w": ((10, 6), [Region((0, 3 * rank), (10, 3))])} for rank in range(2)]
    plan = plan_exchange([described(rank, tensors) for rank, tensors in enumerate(held)], stored({"w": ((10, 6), [Region.whole((10, 6))])}))
    (share,) = plan.shares
    assert [indices for _, indices in share.series(24, 0)] == [list(range(10))]
    assert [indices for _, indices in share.series(3 * 24, 0)] == [[0, 3, 6], [0]]


def moved(offset: tuple[int, ...], dimension: int, by: int) -> tuple[int, ...]:
    return (*offset[:dimension], offset[dimension] + by, *offset[dimension + 1 :])


def reads(plan: ExchangePlan, catalog: Catalog) -> dict[str, np.ndarray]:
    """How often each element of each tensor is read."""
    counts = {tensor.name: np.zeros(tensor.global_shape, int) for tensor in catalog.tensors.values()}
    for share in plan.shares:
        for tensor in share.tensors:
            box = Region(tuple(a + b for a, b in zip(share.box.offset, share.piece.region.offset, strict=True)), share.box.shape)
            assert share.piece.region.contains(box)
            counts[tensor.name][box.slices] += 1
    return counts


@given(cases(), BLOCK_BYTES)
def test_each_needed_element_is_read_once_and_no_other(case: tuple[list[RankDescription], Catalog], block_bytes: int) -> None:
    descriptions, catalog = case
    needed = {tensor.name: np.zeros(tensor.global_shape, int) for tensor in catalog.tensors.values()}
    for description in descriptions:
        for tensor in description.tensors:
            for region in tensor.regions:
                needed[tensor.key.parameter][region.slices] = 1
    with small_blocks(block_bytes):
        plan = plan_exchange(descriptions, catalog)
    for name, counts in reads(plan, catalog).items():
        assert np.array_equal(counts, needed[name])
    assert sum(plan.loads(len(descriptions))) == 4 * sum(int(array.sum()) for array in needed.values())


@given(cases(), BLOCK_BYTES)
def test_each_row_block_that_is_wanted_whole_has_one_reader(case: tuple[list[RankDescription], Catalog], block_bytes: int) -> None:
    descriptions, catalog = case
    wanted = {tensor.name: np.zeros(tensor.global_shape, bool) for tensor in catalog.tensors.values()}
    for description in descriptions:
        for tensor in description.tensors:
            for region in tensor.regions:
                wanted[tensor.key.parameter][region.slices] = True
    with small_blocks(block_bytes):
        plan = plan_exchange(descriptions, catalog)
        for share in plan.shares:
            box, blocks = share.box, row_blocks_of(share.piece.region.shape, 4)
            d = blocks.dimension
            if d is None:
                continue
            for tensor in share.tensors:
                chunk = wanted[tensor.name][share.piece.region.slices]
                rows = chunk.all(axis=tuple(other for other in range(chunk.ndim) if other != d))
                for begin in range(0, len(rows), blocks.rows):
                    end = min(begin + blocks.rows, len(rows))
                    touches = box.offset[d] < end and begin < box.end[d]
                    if rows[begin:end].all() and touches:
                        assert box.offset[d] <= begin
                        assert end <= box.end[d]
                        assert box.shape[d + 1 :] == chunk.shape[d + 1 :]


@given(cases(), st.sampled_from([(64, 16), (4096, 64), (1 << 20, 1 << 20)]), BLOCK_BYTES)
def test_everyone_gets_what_it_wants(case: tuple[list[RankDescription], Catalog], sizes: tuple[int, int], row_block_bytes: int) -> None:
    """The schedules of all ranks, carried out with numpy: what a rank receives is what the reader sends, in the same order."""
    descriptions, catalog = case
    with small_blocks(row_block_bytes):
        plan = plan_exchange(descriptions, catalog)
    whole = {
        tensor.name: np.random.default_rng(number).random(tensor.global_shape, np.float32)
        for number, tensor in enumerate(catalog.tensors.values())
    }
    memory = [
        {tensor.key.parameter: [np.full(region.shape, np.nan, np.float32) for region in tensor.regions] for tensor in description.tensors}
        for description in descriptions
    ]
    world = len(descriptions)
    stage_bytes, block_bytes = sizes
    schedules = [schedule_exchange(plan, rank, stage_bytes=stage_bytes, block_bytes=block_bytes, gap_bytes=0) for rank in range(world)]
    for schedule in schedules:
        assert all(epoch < schedule.source_epochs for epoch, _ in schedule.incoming)
    for reader, schedule in enumerate(schedules):
        mine = [share for share in plan.shares if share.reader == reader]
        for share in mine:
            for transfer in share.batch().transfers() if share.is_straight else ():
                movement = transfer.movement
                chunk = whole[transfer.name][share.piece.region.slices]
                memory[reader][transfer.name][movement.shard][movement.target.slices] = chunk[movement.source.slices]
        staged = [share for share in mine if not share.is_straight]
        for epoch, items in enumerate(schedule.epochs):
            assert len(items) == 1 or sum(item.block.nbytes for item in items) <= stage_bytes
            boxes = []
            for item in items:
                share = staged[item.share]
                chunk = np.ascontiguousarray(whole[share.tensors[item.tensor].name][share.piece.region.slices]).reshape(-1)
                strides = [4 * math.prod(share.piece.region.shape[d + 1 :]) for d in range(len(share.piece.region.shape))]
                box = np.ndarray(item.block.shape, np.float32, chunk, item.block.offset, strides)
                boxes.append(box)
                for part in item.block.parts:
                    if part.rank == reader:
                        memory[reader][share.tensors[item.tensor].name][part.shard][part.target.slices] = box[part.source.slices]
            for target in range(world):
                sent = schedule.outgoing.get((epoch, target), [])
                received = schedules[target].incoming.get((epoch, reader), [])
                assert [outgoing.part.nbytes for outgoing in sent] == [incoming.part.nbytes for incoming in received]
                for outgoing, incoming in zip(sent, received, strict=True):
                    values = boxes[outgoing.position][outgoing.part.source.slices]
                    memory[target][incoming.key.parameter][incoming.part.shard][incoming.part.target.slices] = values
    for rank, description in enumerate(descriptions):
        for tensor in description.tensors:
            for region, held in zip(tensor.regions, memory[rank][tensor.key.parameter], strict=True):
                assert np.array_equal(held, whole[tensor.key.parameter][region.slices])


@given(cases())
def test_the_plan_is_the_same_whatever_objects_it_is_made_from(case: tuple[list[RankDescription], Catalog]) -> None:
    descriptions, catalog = case
    copies = [
        described(d.rank, {t.key.parameter: (t.global_shape, [Region(r.offset, r.shape) for r in t.regions]) for t in d.tensors})
        for d in descriptions
    ]
    assert plan_exchange(copies, catalog) == plan_exchange(descriptions, catalog)


@pytest.mark.parametrize("world", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("placement", [(("a",), ()), ((), ("a",)), ((), ())], ids=["rows", "columns", "replicas"])
@pytest.mark.parametrize("writers", [1, 4])
def test_reading_is_even(world: int, placement: tuple[tuple[str, ...], ...], writers: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {"embed": (5000, 800)} | {f"layer.{n}": (96 + 16 * (n % 3), 800) for n in range(40)}
    mesh = Mesh((world,), ("a",), tuple(range(world)))
    rows = Mesh((writers,), ("a",), tuple(range(writers)))
    wanted = {name: grid(shape, mesh, placement) for name, shape in shapes.items()}
    descriptions = [described(rank, {name: (shape, [wanted[name][rank]]) for name, shape in shapes.items()}) for rank in range(world)]
    catalog = stored({name: (shape, list(dict.fromkeys(grid(shape, rows, (("a",), ()))))) for name, shape in shapes.items()})
    loads = plan_exchange(descriptions, catalog).loads(world)
    assert sum(loads) == 4 * sum(math.prod(shape) for shape in shapes.values())
    assert max(loads) <= 1.05 * sum(loads) / world


def test_ranks_that_hold_little_read_for_those_that_hold_much() -> None:
    shape = (1000, 400)
    descriptions = [described(0, {"w": (shape, [Region.whole(shape)])}), described(1, {"w": (shape, [Region((0, 0), (1, 400))])})]
    loads = plan_exchange(descriptions, stored({"w": (shape, [Region.whole(shape)])})).loads(2)
    assert sum(loads) == 1_600_000
    assert max(loads) <= 1.05 * 800_000


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8, 13, 48])
@pytest.mark.parametrize("placement", [(("a",), ()), ((), ("a",)), ((), ())], ids=["rows", "columns", "replicas"])
def test_of_a_lone_chunk_a_rank_reads_at_most_one_block_more_than_the_mean(world: int, placement: tuple[tuple[str, ...], ...]) -> None:
    shape = (6400, 960)
    regions = grid(shape, Mesh((world,), ("a",), tuple(range(world))), placement)
    descriptions = [described(rank, {"w": (shape, [regions[rank]])}) for rank in range(world)]
    loads = plan_exchange(descriptions, stored({"w": (shape, [Region.whole(shape)])})).loads(world)
    total = 4 * math.prod(shape)
    assert sum(loads) == total
    assert max(loads) <= 1.02 * total / world + row_blocks_of(shape, 4).nbytes


def test_edges_go_to_the_nearest_border_and_the_block_to_who_wants_most_of_it() -> None:
    shape = (960, 100)  # 40 rows a block
    edges = [0, 310, 650, 960]
    regions = [Region((begin, 0), (end - begin, 100)) for begin, end in pairwise(edges)]
    descriptions = [described(rank, {"w": (shape, [region])}) for rank, region in enumerate(regions)]
    plan = plan_exchange(descriptions, stored({"w": (shape, [Region.whole(shape)])}))
    assert [(share.reader, share.box.offset[0], share.box.end[0]) for share in plan.shares] == [(0, 0, 320), (1, 320, 640), (2, 640, 960)]
    assert [len(share.wants) for share in plan.shares] == [2, 1, 2]


def test_a_rank_reads_what_it_needs_itself() -> None:
    shape = (64, 1024)
    mesh = Mesh((4,), ("a",), tuple(range(4)))
    regions = grid(shape, mesh, (("a",), ()))
    descriptions = [described(rank, {f"w.{n}": (shape, [regions[rank]]) for n in range(5)}) for rank in range(4)]
    plan = plan_exchange(descriptions, stored({f"w.{n}": (shape, [Region.whole(shape)]) for n in range(5)}))
    assert all(share.is_straight for share in plan.shares)


def test_alike_tensors_are_planned_together() -> None:
    """100,000 tensors on 64 ranks make as many shares as ten do."""
    shape = (64, 4096)
    regions = grid(shape, Mesh((64,), ("a",), tuple(range(64))), (("a",), ()))
    arrangement = Arrangement(FLOAT, shape, None, (Piece(Region.whole(shape), (Site("file", 0),)),))
    for count in (10, 100_000):
        keys = [model_key(f"w.{n}") for n in range(count)]
        catalog = Catalog("/checkpoint", {key: StoredTensor(key, key.parameter, arrangement) for key in keys})
        descriptions = []
        for rank in range(4):
            holding = Holding(FLOAT, shape, None, (regions[rank],))
            descriptions.append(RankDescription(rank, tuple(TensorDescription(key, holding) for key in keys)))
        assert len(plan_exchange(descriptions, catalog).shares) == 4


def test_replicas_are_one_want() -> None:
    """2,000 ranks that want the same are planned as one place is; each still gets its part of every block."""
    shape = (2000, 1 << 20)  # a row is a block
    holding = Holding(FLOAT, shape, None, (Region.whole(shape),))
    key = model_key("w")
    descriptions = [RankDescription(rank, (TensorDescription(key, holding),)) for rank in range(2000)]
    plan = plan_exchange(descriptions, stored({"w": (shape, grid(shape, Mesh((4,), ("a",), (0, 1, 2, 3)), (("a",), ())))}))
    assert plan.loads(2000) == [4 << 20] * 2000
    assert all(len(share.wants) == 1 and len(share.wants[0].takers) == 2000 for share in plan.shares)
    assert len({id(share.wants[0].takers) for share in plan.shares}) == 1
    schedule = schedule_exchange(plan, 7, stage_bytes=4 << 20, block_bytes=4 << 20, gap_bytes=0)
    assert {source for _, source in schedule.incoming} == set(range(2000)) - {7}
    assert {target for _, target in schedule.outgoing} == set(range(2000)) - {7}


@given(st.data())
def test_the_least_loaded_rank_reads_next(data: st.DataObject) -> None:
    """Boxes that can't be cut go one after the other, the largest first, to the least loaded rank that wants them, of several the first."""
    world = data.draw(st.integers(1, 6))
    ranks = st.sets(st.integers(0, world - 1), min_size=1).map(lambda found: tuple(sorted(found)))
    wanted = data.draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9), ranks), min_size=1, max_size=9))
    jobs = [Job(count, Region((), ()), nbytes, None, 1, wanting) for count, nbytes, wanting in wanted]
    total = sum(job.count * job.nbytes for job in jobs)
    mean = -(-total // world)
    loads = [0] * world
    expected, left = [], []
    for index in sorted(range(len(jobs)), key=lambda index: (len(jobs[index].ranks), -jobs[index].nbytes)):
        for number in range(jobs[index].count):
            rank = min(jobs[index].ranks, key=loads.__getitem__)
            if loads[rank] + jobs[index].nbytes <= mean and not any(job == index for job, _ in left):
                expected.append((index, rank, number))
                loads[rank] += jobs[index].nbytes
            else:
                left.append((index, number))
    assignments = spread(jobs, range(world))
    found = [(done.job, done.reader, done.first + number) for done in assignments for number in range(done.number)]
    assert sorted((job, number) for job, _, number in found) == [(i, n) for i, job in enumerate(jobs) for n in range(job.count)]
    # A rank takes as many of a job's tensors as it has room for at once; the loads are the same where each job has one tensor.
    if all(job.count == 1 for job in jobs):
        assert found[: len(expected)] == expected
