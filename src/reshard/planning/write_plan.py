"""What the checkpoint holds when all ranks have written: which rank writes which region to which file."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.errors import CaptureError, LayoutError
from reshard.format.names import data_file_name, tensor_name, tensor_names
from reshard.geometry import DType, Layout, Mesh, Region
from reshard.geometry.boxes import Boxes
from reshard.geometry.cover import cover_fault
from reshard.geometry.tensor_map import slices_of
from reshard.planning.agreement import Holding, RankDescription
from reshard.planning.file_plan import stored_parts
from reshard.planning.holders import Holders, check_same, find_holders
from reshard.planning.writers import Lot, runs_of, share_lots
from reshard.rows import rows
from reshard.state import Kind, TensorKey


def plan_catalog(
    descriptions: Sequence[RankDescription],
    prefix: str | None,
    save_optimizer: bool,
    directory: str,
    *,
    remove_redundancy: bool = False,
) -> Catalog:
    """What the checkpoint holds when every rank has written its files.

    Tensors come rank by rank, a rank's model tensors first, each where it appears first. A layout that splits evenly is kept: the first
    rank's, when several stages own the tensor. A tensor that is split evenly without a layout gets one; any other has none, its chunks say
    where they lie.

    Args:
        descriptions: every rank's, in rank order.
        prefix: as in `plan_rank_files`.
        save_optimizer: as in `plan_rank_files`.
        directory: where the files will lie.
        remove_redundancy: whether each region is written once, by one of its holders; else all holders write it. Then only ranks that
            write have files, which are counted by kind, in the order of the ranks.

    Raises:
        CaptureError: two ranks give one tensor different shapes or dtypes, their parts don't make up the whole, or a part is not where its
            layout says.
        UsageError: the prefix can't be part of a file name.
    """
    holders = find_holders(descriptions)
    if not save_optimizer:
        holders = {key: held for key, held in holders.items() if key.kind is not Kind.OPTIMIZER}
    keys, alike = _sort(holders)
    lying = [_lie(same, holders[same[0]]) for same in alike]
    world_size = len(descriptions)
    if remove_redundancy:
        written = _written_once(lying, world_size)
        sites = _Sites(prefix, *_count_files(written))
    else:
        written = [(kin.keys, kin, [part.places for part in kin.parts]) for kin in lying]
        sites = _Sites(prefix, {kind: range(world_size) for kind in Kind}, dict.fromkeys(Kind, world_size))
    arrangements: dict[TensorKey, Arrangement] = {}
    for same, kin, places in written:
        arrangement = _arrange(kin, places, sites)
        arrangements.update(dict.fromkeys(same, arrangement))
    stored = rows(StoredTensor, keys, tensor_names(keys), map(arrangements.__getitem__, keys))
    return Catalog(directory, dict(zip(keys, stored, strict=True)))


def _sort(holders: Mapping[TensorKey, Holders]) -> tuple[list[TensorKey], list[list[TensorKey]]]:
    """The tensors in the order of the catalog, and together those of one kind that are held alike: most are like many others."""
    kinds = {kind: order for order, kind in enumerate(Kind)}
    alike: dict[tuple[Kind, int], list[TensorKey]] = {}
    for key, held in holders.items():
        alike.setdefault((key.kind, id(held)), []).append(key)
    places = {kin: (int(holders[same[0]].ranks[0]), kinds[kin[0]]) for kin, same in alike.items()}
    if len(set(places.values())) <= 1:
        return list(holders), list(alike.values())
    keys = sorted(holders, key=lambda key: places[key.kind, id(holders[key])])
    alike = {}
    for key in keys:
        alike.setdefault((key.kind, id(holders[key])), []).append(key)
    return keys, list(alike.values())


class _Sites:
    """The sites of chunks, each made once.

    Args:
        prefix: of file names.
        numbers: of each kind of file the number in its name, by rank.
        totals: of each kind of file how many there are.
    """

    def __init__(self, prefix: str | None, numbers: Mapping[Kind, Mapping[int, int] | range], totals: Mapping[Kind, int]) -> None:
        self._prefix = prefix
        self._numbers = numbers
        self._totals = totals
        self._sites: dict[tuple[Kind, int, str], Site] = {}
        self._groups: dict[tuple[Kind, tuple[tuple[int, str], ...]], tuple[Site, ...]] = {}

    def of(self, kind: Kind, places: tuple[tuple[int, str], ...]) -> tuple[Site, ...]:
        """The sites of some ranks, each with the suffix of the tensor's name in its file."""
        group = self._groups.get((kind, places))
        if group is None:
            group = self._groups[kind, places] = tuple(self._site(kind, rank, suffix) for rank, suffix in places)
        return group

    def _site(self, kind: Kind, rank: int, suffix: str) -> Site:
        site = self._sites.get((kind, rank, suffix))
        if site is None:
            name = data_file_name(self._prefix, kind, self._numbers[kind][rank], self._totals[kind])
            site = self._sites[kind, rank, suffix] = Site(name, rank, suffix)
        return site


# The different holdings of a tensor, each with its ranks.
_Held = Sequence[tuple[Holding, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class _Part:
    """A chunk without the tensor's name: its region, which ranks could write it under which suffix, sorted by rank, and which hold it."""

    region: Region
    places: tuple[tuple[int, str], ...]
    holders: tuple[int, ...]

    def place(self, rank: int) -> tuple[int, str]:
        """Where one of the holders would write it."""
        return self.places[bisect_left(self.places, (rank,))]


@dataclass(frozen=True, slots=True)
class _Kin:
    """Tensors that lie alike, and how: an arrangement before it is known who writes what."""

    keys: list[TensorKey]
    dtype: DType
    shape: tuple[int, ...]
    layout: Layout | None
    parts: list[_Part]


# Some of the tensors that lie alike, and of each part the ranks that write it with the suffixes of its names.
_Written = tuple[Sequence[TensorKey], _Kin, Sequence[tuple[tuple[int, str], ...]]]


def _lie(keys: list[TensorKey], holders: Holders) -> _Kin:
    held = holders.different()
    check_same(keys[0], held)
    first = held[0][0]
    parts = _collect(held)
    layout = None
    if 0 not in first.global_shape:
        _check_places(keys[0], held)
        layout, parts = _lay_out(keys[0], held, parts)
    return _Kin(keys, first.dtype, first.global_shape, layout, parts)


def _arrange(kin: _Kin, places: Iterable[tuple[tuple[int, str], ...]], sites: _Sites) -> Arrangement:
    kind = kin.keys[0].kind
    pieces = tuple(Piece(part.region, sites.of(kind, where), part.holders) for part, where in zip(kin.parts, places, strict=True))
    return Arrangement(kin.dtype, kin.shape, kin.layout, pieces)


def _written_once(lying: Sequence[_Kin], world_size: int) -> list[_Written]:
    """Each part of each tensor by one of its holders."""
    lots = [Lot(len(kin.keys), part.region.size * kin.dtype.itemsize, part.holders) for kin in lying for part in kin.parts]
    shares = iter(share_lots(lots, world_size))
    written: list[_Written] = []
    for kin in lying:
        own = [next(shares) for _ in kin.parts]
        for first, end, writers in runs_of(own, len(kin.keys)):
            places = [(part.place(writer),) for part, writer in zip(kin.parts, writers, strict=True)]
            written.append((kin.keys[first:end], kin, places))
    return written


def _count_files(written: Iterable[_Written]) -> tuple[dict[Kind, dict[int, int]], dict[Kind, int]]:
    """Of each kind the ranks that write any, numbered in their order, and how many they are."""
    ranks: dict[Kind, set[int]] = {kind: set() for kind in Kind}
    for same, _, places in written:
        ranks[same[0].kind].update(rank for where in places for rank, _ in where)
    numbers = {kind: {rank: number for number, rank in enumerate(sorted(found))} for kind, found in ranks.items()}
    return numbers, {kind: len(found) for kind, found in ranks.items()}


def _lay_out(key: TensorKey, held: _Held, parts: list[_Part]) -> tuple[Layout | None, list[_Part]]:
    """The layout of a tensor, or None, and its chunks."""
    layout, shape = held[0][0].layout, held[0][0].global_shape
    with_layout = [holding for holding, _ in held if holding.layout is not None]
    if layout is not None:
        # Another stage may hold the same tensor in other parts, of the same values: the first stage's are enough.
        own = {region for holding in with_layout if _is_on(holding, layout.mesh) for region in holding.regions}
        if any(part.region not in own for part in parts) and cover_fault(list(own), shape) is None:
            parts = [part for part in parts if part.region in own]
    fault = cover_fault([part.region for part in parts], shape)
    if fault is not None:
        raise CaptureError(
            "the ranks' parts of a tensor don't make up the whole tensor",
            tensor=tensor_name(key),
            found=fault,
            expected=f"parts that together are all of {list(shape)}, each element in one part or in equal ones",
            fix="every rank of the run must save, and tensors that are different must have different names",
        )
    if layout is None:
        layout = _layout_of_grid(parts, shape) if len(parts) > 1 else None
    elif not layout.is_even(shape) or any(len(holding.regions) != 1 for holding in with_layout):
        layout = None
    if layout is not None:
        order = {region: index for index, region in enumerate(slices_of(layout, shape).values())}
        parts = sorted(parts, key=lambda part: order[part.region])
    return layout, parts


def _is_on(holding: Holding, mesh: Mesh) -> bool:
    return holding.layout is not None and (holding.layout.mesh is mesh or holding.layout.mesh == mesh)


def _collect(held: _Held) -> list[_Part]:
    """The different regions, in the order of the ranks, each with everyone who has it."""
    found: dict[Region, list[tuple[str, tuple[int, ...]]]] = {}
    for holding, ranks in held:
        for suffix, _, region in stored_parts(holding, ""):
            found.setdefault(region, []).append((suffix, ranks))
    parts = []
    for region, having in found.items():
        places = [(rank, suffix) for suffix, ranks in having for rank in ranks]
        if len(having) > 1:
            places.sort(key=lambda place: place[0])
        parts.append(_Part(region, tuple(places), tuple(dict.fromkeys(rank for rank, _ in places))))
    return parts


def _check_places(key: TensorKey, held: _Held) -> None:
    """See that each rank's only part is where its layout says; where it isn't, one of the two would be written down wrong."""
    shape = held[0][0].global_shape
    by_layout: dict[int, tuple[Layout, list[Region], list[int], list[int]]] = {}
    for holding, ranks in held:
        if holding.layout is not None and len(holding.regions) == 1:
            _, regions, owners, own = by_layout.setdefault(id(holding.layout), (holding.layout, [], [], []))
            owners += [len(regions)] * len(ranks)
            regions.append(holding.regions[0])
            own += ranks
    for layout, regions, owners, ranks in by_layout.values():
        try:
            positions = [layout.mesh.position(rank) for rank in ranks]
            expected = layout.regions(shape).take(np.array(positions))
        except LayoutError as error:
            raise CaptureError(error.what, tensor=tensor_name(key), rank=error.rank, found=error.found, expected=error.expected) from error
        found = Boxes.of(regions, len(shape)).take(np.array(owners))
        differ = (expected.offsets != found.offsets).any(axis=0) | (expected.shapes != found.shapes).any(axis=0)
        differ &= (expected.shapes > 0).all(axis=0) | (found.shapes > 0).all(axis=0)
        if differ.any():
            worst = min(np.flatnonzero(differ).tolist(), key=ranks.__getitem__)
            raise CaptureError(
                "a rank's part of a tensor is not where its layout says",
                tensor=tensor_name(key),
                rank=ranks[worst],
                found=found[worst],
                expected=expected[worst],
            )


def _layout_of_grid(parts: Sequence[_Part], shape: tuple[int, ...]) -> Layout | None:
    """A layout that says what parts without one show: equal parts in an even grid, each on as many ranks, each rank with one part.

    Its mesh is made up; the regions that it gives each rank are the true ones.
    """
    extents = parts[0].region.shape
    replicas = len(parts[0].holders)
    ranks = [rank for part in parts for rank in part.holders]
    if len(set(ranks)) < len(ranks) or any(part.region.shape != extents or len(part.holders) != replicas for part in parts):
        return None
    for part in parts:
        if any(o % extent or size % extent for o, extent, size in zip(part.region.offset, extents, shape, strict=True)):
            return None
    ordered = sorted(parts, key=lambda part: part.region.offset)
    counts = [size // extent for size, extent in zip(shape, extents, strict=True)]
    split = [dimension for dimension, count in enumerate(counts) if count > 1]
    mesh = Mesh(
        (replicas, *(counts[dimension] for dimension in split)),
        ("replica", *(f"split{dimension}" for dimension in split)),
        tuple(part.holders[replica] for replica in range(replicas) for part in ordered),
    )
    return Layout(mesh, tuple((1 + split.index(d),) if d in split else () for d in range(len(shape))))
