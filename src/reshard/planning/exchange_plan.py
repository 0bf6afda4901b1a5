"""Who reads which stored bytes for whom: each byte that anyone needs is read once in the whole job."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.geometry import Region
from reshard.geometry.cover import find_overlap
from reshard.planning.agreement import RankDescription
from reshard.planning.balance import Job, spread
from reshard.planning.byte_runs import is_one_run, plan_blocks, strides_of
from reshard.planning.read_plan import Movement, Transfer
from reshard.state import TensorKey


class Want(NamedTuple):
    """A shard that wants a region.

    Attributes:
        rank: whose it is.
        shard: its index in the tensor on that rank.
        region: what it holds of the global tensor.
    """

    rank: int
    shard: int
    region: Region


class Part(NamedTuple):
    """What a shard gets of a block.

    Attributes:
        rank: whose shard it is.
        shard: its index in the tensor on that rank.
        source: the box in the block's own coordinates.
        target: the box in the shard's own coordinates.
        nbytes: its bytes.
    """

    rank: int
    shard: int
    source: Region
    target: Region
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """A box of a chunk that is read at a time, and who gets what of it.

    Attributes:
        shape: of the box.
        offset: where its run begins, in bytes from the first byte of the chunk.
        nbytes: the length of the run.
        parts: who gets what.
    """

    shape: tuple[int, ...]
    offset: int
    nbytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank reads of the chunks of several tensors that are stored alike and wanted alike.

    Attributes:
        reader: the rank.
        tensors: which tensors.
        arrangement: how they are stored.
        piece: the chunk of each.
        site: where it is read.
        box: what is read of each chunk, in its own coordinates.
        wants: who gets any of it.
    """

    reader: int
    tensors: tuple[StoredTensor, ...]
    arrangement: Arrangement
    piece: Piece
    site: Site
    box: Region
    wants: tuple[Want, ...]

    @property
    def is_straight(self) -> bool:
        """Whether the reader reads one run for one shard of its own, so that no staging is needed."""
        if len(self.wants) != 1 or self.wants[0].rank != self.reader:
            return False
        is_whole = self.wants[0].region.contains(_moved(self.box, self.piece.region.offset))
        return is_whole and is_one_run(self.box.shape, self.piece.region.shape)

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return self.arrangement.dtype.itemsize * self.box.size * len(self.tensors)

    def transfers(self) -> Iterator[Transfer]:
        """The reads of a straight share, one per tensor."""
        want = self.wants[0]
        region = _moved(self.box, self.piece.region.offset)
        strides = strides_of(self.piece.region.shape, self.arrangement.dtype.itemsize)
        movement = Movement(
            want.shard,
            region.relative_to(want.region),
            want.region.shape,
            self.site,
            self.piece.region.shape,
            self.box,
            self.arrangement.dtype,
            sum(offset * stride for offset, stride in zip(self.box.offset, strides, strict=True)),
            self.arrangement.dtype.itemsize * self.box.size,
            True,
        )
        for tensor in self.tensors:
            yield Transfer(tensor.key, tensor.name + self.site.suffix, movement)

    def blocks(self, block_bytes: int, gap_bytes: int, only: int | None = None) -> Iterator[BlockPlan]:
        """The box in blocks, in file order.

        Args:
            block_bytes: the longest run.
            gap_bytes: the widest gap that is read over.
            only: the rank whose parts are asked for; None for everyone's.
        """
        itemsize = self.arrangement.dtype.itemsize
        wants = self.wants if only is None else tuple(want for want in self.wants if want.rank == only)
        for block in plan_blocks(self.piece.region.shape, self.box, itemsize, block_bytes=block_bytes, gap_bytes=gap_bytes):
            region = _moved(block.region, self.piece.region.offset)
            parts = []
            for want in wants:
                common = region.intersect(want.region)
                if common is not None:
                    source, target = common.relative_to(region), common.relative_to(want.region)
                    parts.append(Part(want.rank, want.shard, source, target, itemsize * common.size))
            yield BlockPlan(region.shape, block.offset, block.nbytes, tuple(parts))


@dataclass(frozen=True)
class ExchangePlan:
    """Who reads what for whom, in a whole job.

    Attributes:
        shares: by reader, and of one reader by file.
    """

    shares: tuple[Share, ...]

    def loads(self, world_size: int) -> list[int]:
        """The bytes that each rank reads, gaps not included."""
        found = [0] * world_size
        for share in self.shares:
            found[share.reader] += share.nbytes
        return found


def plan_exchange(descriptions: Sequence[RankDescription], catalog: Catalog) -> ExchangePlan:
    """Plan a load of a whole job: the same on every rank that has the same descriptions and the same catalog.

    Every stored byte that anyone wants is in exactly one share. The shares are even by bytes: none is above 1.02 of the mean by more than
    one row of a box along its outermost dimension. A rank reads what it needs itself, as far as evenness allows.

    Args:
        descriptions: of all ranks, in their order: the tensors that they load.
        catalog: what the checkpoint holds; it has all of these tensors.
    """
    jobs: list[Job] = []
    parts: list[tuple[list[StoredTensor], Piece, tuple[Want, ...]]] = []
    for tensors, wants in _groups(descriptions, catalog):
        arrangement = tensors[0].arrangement
        by_region: dict[Region, list[Want]] = {}
        for want in wants:
            by_region.setdefault(want.region, []).append(want)
        for piece, regions in _overlapping(arrangement.pieces, list(by_region)):
            for box, touching in _boxes(piece.region, regions):
                concerned = tuple(sorted(want for region in touching for want in by_region[region]))
                dimension = _outermost(box)
                ranks = tuple(sorted({want.rank for want in concerned}))
                jobs.append(Job(len(tensors), box.relative_to(piece.region), arrangement.dtype.itemsize * box.size, dimension, ranks))
                parts.append((tensors, piece, concerned))
    shares = []
    for job, reader, first, count, box in spread(jobs, [description.rank for description in descriptions]):
        tensors, piece, wants = parts[job]
        region = _moved(box, piece.region.offset)
        concerned = tuple(want for want in wants if region.intersect(want.region) is not None)
        chosen = tuple(tensors[first : first + count])
        shares.append(Share(reader, chosen, chosen[0].arrangement, piece, _site(piece.sites, reader), box, concerned))
    shares.sort(key=lambda share: (share.reader, share.site.file))
    return ExchangePlan(tuple(shares))


def _groups(descriptions: Sequence[RankDescription], catalog: Catalog) -> Iterator[tuple[list[StoredTensor], list[Want]]]:
    """Tensors that are stored alike and wanted alike, with who wants what."""
    interned: dict[tuple[Region, ...], int] = {}
    holders: dict[TensorKey, list[tuple[int, int]]] = {}
    for description in descriptions:
        known: dict[int, int] = {}  # by identity, as in plan_reads
        for key, holding in description.tensors:
            index = known.get(id(holding))
            if index is None:
                index = known[id(holding)] = interned.setdefault(holding.regions, len(interned))
            holders.setdefault(key, []).append((description.rank, index))
    groups: dict[tuple[int, tuple[tuple[int, int], ...]], list[StoredTensor]] = {}
    for key, tensor in catalog.tensors.items():
        if key in holders:
            groups.setdefault((id(tensor.arrangement), tuple(holders[key])), []).append(tensor)
    regions = list(interned)
    for (_, held), tensors in groups.items():
        wants = [
            Want(rank, shard, region)
            for rank, index in held
            for shard, region in enumerate(regions[index])
            if not region.is_empty  # nobody reads nothing
        ]
        if wants:
            yield tensors, wants


def _overlapping(pieces: Sequence[Piece], regions: list[Region]) -> Iterator[tuple[Piece, list[Region]]]:
    """Each piece with the regions that share an element with it."""
    dimensions = len(regions[0].shape)
    if dimensions == 0:
        yield from ((piece, regions) for piece in pieces)
        return
    # Along the dimension with the most beginnings few regions are candidates for a piece.
    d = max(range(dimensions), key=lambda d: len({region.offset[d] for region in regions}))
    regions = sorted(regions, key=lambda region: (region.offset[d], region.offset, region.shape))
    begins = [region.offset[d] for region in regions]
    longest = max(region.shape[d] for region in regions)
    for piece in pieces:
        begin, end = piece.region.offset[d], piece.region.end[d]
        candidates = regions[bisect_right(begins, begin - longest) : bisect_left(begins, end)]
        found = [region for region in candidates if region.intersect(piece.region) is not None]
        if found:
            yield piece, found


def _boxes(piece: Region, regions: list[Region]) -> Iterator[tuple[Region, list[Region]]]:
    """Disjoint boxes of a piece that are together what is wanted of it, each with the regions that want any of it.

    They are cut along their outermost dimension wherever another region begins or ends, so that each has one set of regions.
    """
    commons = [(common, region) for region in regions if (common := region.intersect(piece)) is not None]
    for whole in _union(piece, [common for common, _ in commons]):
        d = _outermost(whole)
        inside = [(part, region) for common, region in commons if (part := common.intersect(whole)) is not None]
        if d is None:
            yield whole, [region for _, region in inside]
            continue
        edges = sorted({edge for part, _ in inside for edge in (part.offset[d], part.end[d])})
        touching: list[list[Region]] = [[] for _ in edges[1:]]
        for part, region in inside:
            for index in range(bisect_left(edges, part.offset[d]), bisect_left(edges, part.end[d])):
                touching[index].append(region)
        for (begin, end), wanting in zip(pairwise(edges), touching, strict=True):
            offset = (*whole.offset[:d], begin, *whole.offset[d + 1 :])
            yield Region(offset, (*whole.shape[:d], end - begin, *whole.shape[d + 1 :])), wanting


def _union(piece: Region, commons: list[Region]) -> list[Region]:
    """Disjoint boxes that are together the union of some boxes of a piece; the piece itself when all of it is wanted."""
    if any(common == piece for common in commons):
        return [piece]
    if find_overlap(commons) is None and sum(common.size for common in commons) == piece.size:
        return [piece]
    found = _sections([tuple(zip(common.offset, common.end, strict=True)) for common in commons])
    return [Region(tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box)) for box in found]


_Box = tuple[tuple[int, int], ...]  # begin and end of each dimension


def _sections(boxes: list[_Box]) -> tuple[_Box, ...]:
    """The union of boxes, as few disjoint ones: neighbours of the same cross-section are one."""
    if not boxes[0]:
        return ((),)
    runs: list[tuple[int, int, tuple[_Box, ...]]] = []
    for begin, end in pairwise(sorted({edge for box in boxes for edge in box[0]})):
        inner = sorted({box[1:] for box in boxes if box[0][0] <= begin and end <= box[0][1]})
        if not inner:
            continue
        section = _sections(inner)
        if runs and runs[-1][1] == begin and runs[-1][2] == section:
            runs[-1] = (runs[-1][0], end, section)
        else:
            runs.append((begin, end, section))
    return tuple(((begin, end), *inner) for begin, end, section in runs for inner in section)


def _outermost(box: Region) -> int | None:
    """The dimension along which a box is cut: parts along it are further apart in the file than along any other."""
    return next((d for d, extent in enumerate(box.shape) if extent > 1), None)


def _moved(box: Region, by: tuple[int, ...]) -> Region:
    return Region(tuple(a + b for a, b in zip(box.offset, by, strict=True)), box.shape)


def _site(sites: tuple[Site, ...], rank: int) -> Site:
    """The copy that the rank wrote itself, else one chosen by its rank, so that ranks spread over the copies."""
    return next((site for site in sites if site.rank == rank), sites[rank % len(sites)])
