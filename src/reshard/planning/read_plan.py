"""Which stored regions go into which memory: wanted regions ∩ chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import NamedTuple

from reshard.catalog import Arrangement, Catalog, Site
from reshard.errors import MetadataError
from reshard.geometry import DType, Region
from reshard.planning.agreement import Holding, RankDescription
from reshard.planning.byte_runs import is_dense, run_offset
from reshard.rows import rows
from reshard.state import TensorKey


@dataclass(frozen=True, slots=True)
class Movement:
    """A box that moves from a chunk into a shard, for all tensors that are stored alike and wanted alike.

    Attributes:
        shard: the index of the shard in the wanted tensor.
        target: the box in the shard's own coordinates.
        shard_shape: the shape of the shard.
        site: where the chunk is stored.
        stored_shape: the shape of the tensor in the file: the chunk's, unless that is a window of it.
        begin: where the chunk begins, in bytes from the first byte of the tensor in the file.
        strides: of the chunk in the file, in bytes, descending.
        source: the box in the chunk's own coordinates.
        dtype: the element type of the stored bytes.
        offset: where the box begins, in bytes from the first byte of the tensor in the file.
        nbytes: the bytes that are needed.
        is_run: whether the box is one run of bytes in the file.
        target_offset: where the box begins, in bytes from the first byte of a contiguous shard of the stored type; None when it isn't one
            run there.
    """

    shard: int
    target: Region
    shard_shape: tuple[int, ...]
    site: Site
    stored_shape: tuple[int, ...]
    begin: int
    strides: tuple[int, ...]
    source: Region
    dtype: DType
    offset: int
    nbytes: int
    is_run: bool
    target_offset: int | None

    def place_of(self, part: Region) -> Region:
        """Where a part of the box, in the chunk's coordinates, belongs in the shard's own."""
        offset = tuple(b - s + t for b, s, t in zip(part.offset, self.source.offset, self.target.offset, strict=True))
        return Region(offset, part.shape)


class Transfer(NamedTuple):
    """One tensor's movement.

    Attributes:
        key: the tensor.
        name: its name in the file.
        movement: what moves where.
    """

    key: TensorKey
    name: str
    movement: Movement


class Batch(NamedTuple):
    """The tensors, one at least, that a movement moves: what is asked of it is asked once for all of them.

    Attributes:
        movement: what moves where.
        keys: the tensors.
        names: their names in the file.
    """

    movement: Movement
    keys: list[TensorKey]
    names: list[str]

    def transfers(self) -> Iterator[Transfer]:
        """The movement of each."""
        return rows(Transfer, self.keys, self.names, repeat(self.movement))


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A tensor that is in the checkpoint and in the run, but not the same.

    Attributes:
        key: the tensor.
        field: `shape` or `dtype`.
        stored: what the checkpoint has.
        wanted: what the run has.
    """

    key: TensorKey
    field: str
    stored: str
    wanted: str


@dataclass(frozen=True)
class ReadPlan:
    """What one rank reads.

    Attributes:
        rank: the global rank.
        batches: the boxes to move, by file; those of a batch in the order of the state.
        restored: the wanted tensors that the checkpoint has (also those of which this rank holds nothing).
        missing: the wanted tensors that it doesn't have.
        mismatched: the wanted tensors that differ in shape or dtype.
        cast: those of the restored ones that differ in dtype and are converted.
    """

    rank: int
    batches: tuple[Batch, ...]
    restored: tuple[TensorKey, ...]
    missing: tuple[TensorKey, ...]
    mismatched: tuple[Mismatch, ...]
    cast: tuple[Mismatch, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes that are needed."""
        return sum(batch.movement.nbytes * len(batch.keys) for batch in self.batches)

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are read, in order."""
        return tuple(dict.fromkeys(batch.movement.site.file for batch in self.batches))


# Of tensors that are wanted alike and stored alike: the lists of each of their batches, and what follows a tensor's name in its file.
_Alike = list[tuple[list[TensorKey], list[str], str]]


def plan_reads(wanted: RankDescription, catalog: Catalog, casts: Callable[[Mismatch], bool] | None = None) -> ReadPlan:
    """Plan what one rank reads of a checkpoint.

    Regions are held against chunks once for all tensors that are wanted alike and stored alike.

    Where a chunk is stored several times, the rank reads the copy that it wrote itself, else one chosen by its rank, so that the ranks
    of a job spread over the copies.

    Args:
        wanted: what the rank holds.
        catalog: what the checkpoint holds.
        casts: whether a tensor of another dtype is converted; None when none is.

    Raises:
        MetadataError: the chunks of a tensor don't cover a wanted region.
    """
    batches: list[Batch] = []
    restored: list[TensorKey] = []
    missing: list[TensorKey] = []
    mismatched: list[Mismatch] = []
    cast: list[Mismatch] = []
    # By identity: the descriptions and the catalog keep both alive, and hashing either goes over regions and meshes.
    known: dict[tuple[int, int], _Alike] = {}
    # Apart: of two tensors that differ in dtype in the same way, one may be converted and the other not.
    known_cast: dict[tuple[int, int], _Alike] = {}
    find = catalog.tensors.get
    last: tuple[Holding, Arrangement] | None = None
    alike: _Alike | None = None
    for key, holding in wanted.tensors:
        stored = find(key)
        if stored is None:
            missing.append(key)
            continue
        _, name, arrangement = stored
        # Most are as the one before.
        if last is None or holding is not last[0] or arrangement is not last[1]:
            last = (holding, arrangement)
            alike = known.get((id(holding), id(arrangement)))
        own = alike
        if own is None:
            misfit = find_misfit(key, holding.dtype, holding.global_shape, arrangement)
            if misfit is not None:
                if casts is None or not casts(misfit):
                    mismatched.append(misfit)
                    continue
                cast.append(misfit)
            planned = known if misfit is None else known_cast
            try:
                pair = (id(holding), id(arrangement))
                own = planned.get(pair)
                if own is None:
                    made = [Batch(movement, [], []) for movement in _movements(holding, arrangement, wanted.rank)]
                    batches += made
                    own = planned[pair] = [(keys, names, movement.site.suffix) for movement, keys, names in made]
            except MetadataError as error:
                raise MetadataError(
                    error.what, file=catalog.directory, tensor=name, rank=wanted.rank, found=error.found, fix=error.fix
                ) from error
            alike = own if misfit is None else None
        restored.append(key)
        for keys, names, suffix in own:
            keys.append(key)
            names.append(name + suffix)
    batches.sort(key=lambda batch: batch.movement.site.file)
    return ReadPlan(wanted.rank, tuple(batches), tuple(restored), tuple(missing), tuple(mismatched), tuple(cast))


def find_misfit(key: TensorKey, dtype: DType, global_shape: tuple[int, ...], arrangement: Arrangement) -> Mismatch | None:
    """In what a tensor that a run wants with this type and shape differs from the stored one; None when in nothing."""
    if arrangement.global_shape != global_shape:
        return Mismatch(key, "shape", str(list(arrangement.global_shape)), str(list(global_shape)))
    if arrangement.dtype != dtype:
        return Mismatch(key, "dtype", arrangement.dtype.name, dtype.name)
    return None


def _movements(holding: Holding, arrangement: Arrangement, rank: int) -> Iterator[Movement]:
    itemsize = arrangement.dtype.itemsize
    for index, region in enumerate(holding.regions):
        if region.is_empty:
            continue
        covered = 0
        for number in arrangement.touching(region):
            piece = arrangement.pieces[number]
            common = region.intersect(piece.region)
            assert common is not None  # they touch
            covered += common.size
            source = common.relative_to(piece.region)
            strides, begin = piece.strides(itemsize), piece.begin(itemsize)
            target = common.relative_to(region)
            yield Movement(
                index,
                target,
                region.shape,
                _choose(piece.sites, rank),
                piece.stored_shape,
                begin,
                strides,
                source,
                arrangement.dtype,
                begin + sum(offset * stride for offset, stride in zip(source.offset, strides, strict=True)),
                itemsize * source.size,
                is_dense(source.shape, strides, itemsize),
                run_offset(target, region.shape, itemsize),
            )
        if covered != region.size:
            raise MetadataError(
                "the chunks of a tensor don't cover it",
                found=f"{covered} of the {region.size} elements at {region}",
                fix="load another iteration; this one can't be whole",
            )


def _choose(sites: tuple[Site, ...], rank: int) -> Site:
    for site in sites:
        if site.rank == rank:
            return site
    return sites[rank % len(sites)]
