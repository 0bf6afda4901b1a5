"""Who reads which stored bytes for whom: each byte that anyone needs is read once in the whole job."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from reshard.catalog import Arrangement, Catalog, Piece, Site, StoredTensor
from reshard.format.row_blocks import RowBlocks, row_blocks_of
from reshard.geometry import Region
from reshard.geometry.boxes import Boxes
from reshard.planning.agreement import RankDescription
from reshard.planning.balance import Job, spread
from reshard.planning.byte_runs import Block, cut_box, is_dense, run_offset
from reshard.planning.cuts import Cut, cut_chunks
from reshard.planning.holders import Holders, find_holders
from reshard.planning.read_plan import Batch, Movement
from reshard.state import TensorKey


class Taker(NamedTuple):
    """A shard that wants a region.

    Attributes:
        rank: whose it is.
        shard: its index in the tensor on that rank.
    """

    rank: int
    shard: int


class Want(NamedTuple):
    """A region that shards want.

    Attributes:
        region: of the global tensor.
        takers: the shards that hold it, by rank; the same object for all that are the same.
    """

    region: Region
    takers: tuple[Taker, ...]


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
        offset: where its run begins, in bytes from the first byte of the tensor in the file.
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
        wants: the regions that have any of it.
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
        if len(self.wants) != 1 or len(self.wants[0].takers) != 1 or self.wants[0].takers[0].rank != self.reader:
            return False
        is_whole = self.wants[0].region.contains(_moved(self.box, self.piece.region.offset))
        itemsize = self.arrangement.dtype.itemsize
        return is_whole and is_dense(self.box.shape, self.piece.strides(itemsize), itemsize)

    @property
    def nbytes(self) -> int:
        """The bytes to read."""
        return self.arrangement.dtype.itemsize * self.box.size * len(self.tensors)

    def batch(self) -> Batch:
        """The reads of a straight share."""
        want = self.wants[0]
        region = _moved(self.box, self.piece.region.offset)
        itemsize = self.arrangement.dtype.itemsize
        strides, begin = self.piece.strides(itemsize), self.piece.begin(itemsize)
        target = region.relative_to(want.region)
        movement = Movement(
            want.takers[0].shard,
            target,
            want.region.shape,
            self.site,
            self.piece.stored_shape,
            begin,
            strides,
            self.box,
            self.arrangement.dtype,
            begin + sum(offset * stride for offset, stride in zip(self.box.offset, strides, strict=True)),
            itemsize * self.box.size,
            True,
            run_offset(target, want.region.shape, itemsize),
        )
        return Batch(movement, [tensor.key for tensor in self.tensors], [tensor.name + self.site.suffix for tensor in self.tensors])

    def taken(self) -> Iterator[tuple[Want, int]]:
        """Each want with the bytes that every one of its takers gets, of all tensors together."""
        begins = [a + b for a, b in zip(self.box.offset, self.piece.region.offset, strict=True)]
        ends = [begin + extent for begin, extent in zip(begins, self.box.shape, strict=True)]
        whole = self.arrangement.dtype.itemsize * len(self.tensors)
        # In plain numbers: a job has a million of these.
        for want in self.wants:
            nbytes = whole
            for begin, end, offset, extent in zip(begins, ends, want.region.offset, want.region.shape, strict=True):
                nbytes *= min(end, offset + extent) - max(begin, offset)
            yield want, nbytes

    def blocks(self, block_bytes: int, gap_bytes: int, only: int | None = None) -> Iterator[BlockPlan]:
        """The box in blocks, in file order.

        Args:
            block_bytes: the longest run.
            gap_bytes: the widest gap that is read over.
            only: the rank whose parts are asked for; None for everyone's.
        """
        wants = self.wants if only is None else [want for want in (_only(want, only) for want in self.wants) if want.takers]
        for block in self._cut(block_bytes, gap_bytes):
            yield self._planned(block, wants)

    def series(self, block_bytes: int, gap_bytes: int) -> Iterator[tuple[BlockPlan, Sequence[int]]]:
        """The same blocks; such as follow each other and differ in nothing but their place along `outermost` together.

        Args:
            block_bytes: as in `blocks`, and so is the next one.
            gap_bytes: see there.

        Returns:
            The first block of each series; and of every block of it, the first one included, by how many indices it lies further on: in
            the tensor, in the file and in all shards alike.
        """
        d = self.outermost
        begin, extent = self.box.offset[d] + self.piece.region.offset[d], self.box.shape[d]
        # Whoever wants only some of the indices wants different parts of different blocks.
        spans = all(w.region.offset[d] <= begin and begin + extent <= w.region.offset[d] + w.region.shape[d] for w in self.wants)
        for _, found in groupby(self._cut(block_bytes, gap_bytes), lambda block: _alike(block, d) if spans else block):
            alike = list(found)
            yield self._planned(alike[0], self.wants), [block.region.offset[d] - alike[0].region.offset[d] for block in alike]

    @property
    def outermost(self) -> int:
        """The first dimension along which the box has several indices; the tensor has at least one dimension."""
        return next((d for d, extent in enumerate(self.box.shape) if extent > 1), 0)

    def _cut(self, block_bytes: int, gap_bytes: int) -> Iterator[Block]:
        itemsize = self.arrangement.dtype.itemsize
        return cut_box(self.box, self.piece.strides(itemsize), itemsize, block_bytes=block_bytes, gap_bytes=gap_bytes)

    def _planned(self, block: Block, wants: Sequence[Want]) -> BlockPlan:
        itemsize = self.arrangement.dtype.itemsize
        region = _moved(block.region, self.piece.region.offset)
        parts = []
        for want in wants:
            common = region.intersect(want.region)
            if common is not None:
                source, target = common.relative_to(region), common.relative_to(want.region)
                nbytes = itemsize * common.size
                parts += [Part(rank, shard, source, target, nbytes) for rank, shard in want.takers]
        return BlockPlan(region.shape, self.piece.begin(itemsize) + block.offset, block.nbytes, tuple(parts))


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

    Every stored byte that anyone wants is in exactly one share, and every row block of which all is wanted in one share whole, so that its
    digest can be checked. The shares are even by bytes: none is above 1.02 of the mean by more than one row block (or, of chunks of which
    nobody wants whole rows, one row of a box along its outermost dimension). A rank reads what it needs itself, as far as evenness and row
    blocks allow.

    Args:
        descriptions: of all ranks, in their order: the tensors that they load.
        catalog: what the checkpoint holds; it has all of these tensors.
    """
    return plan_held(find_holders(descriptions), catalog, [description.rank for description in descriptions])


def plan_held(holders: Mapping[TensorKey, Holders], catalog: Catalog, ranks: Sequence[int]) -> ExchangePlan:
    """The same for a job of which it is known who holds what.

    Args:
        holders: of each tensor; the checkpoint has all of these.
        catalog: as in `plan_exchange`.
        ranks: of the whole job, ascending.
    """
    return share_out(_groups(holders, catalog), ranks)


def share_out(groups: Iterable[tuple[Sequence[StoredTensor], Sequence[Want]]], ranks: Sequence[int]) -> ExchangePlan:
    """The plan of a job whose ranks want this.

    Args:
        groups: tensors that are stored alike and wanted alike, in the order of the checkpoint by their first ones, with the regions that
            are wanted of each: none of them empty, each one once.
        ranks: of the whole job, ascending.
    """
    jobs: list[Job] = []
    parts: list[tuple[Sequence[StoredTensor], Piece, tuple[Want, ...]]] = []
    ranks_of = _RankSets()
    known: dict[tuple[int | bytes | RowBlocks, ...], list[Cut]] = {}
    for tensors, wants in groups:
        arrangement = tensors[0].arrangement
        regions = Boxes.of([want.region for want in wants], len(arrangement.global_shape))
        itemsize = arrangement.dtype.itemsize
        # Stages and experts cut alike, at other ranks and in other files.
        blocks = [_blocks_of(piece, itemsize) for piece in arrangement.pieces] if arrangement.has_windows else None
        alike = (
            itemsize,
            *_plain(blocks),
            *(array.tobytes() for boxes in (arrangement.boxes, regions) for array in (boxes.offsets, boxes.shapes)),
        )
        cuts = known.get(alike)
        if cuts is None:
            cuts = known[alike] = list(cut_chunks(arrangement.boxes, regions, itemsize, blocks))
        number, piece = -1, arrangement.pieces[0]
        for cut in cuts:
            if cut.piece != number:
                number, piece = cut.piece, arrangement.pieces[cut.piece]
            concerned = tuple(wants[index] for index in cut.wants)
            nearest = concerned if cut.nearest == cut.wants else [wants[index] for index in cut.nearest]
            jobs.append(Job(len(tensors), cut.box, itemsize * cut.size, cut.dimension, cut.rows, ranks_of.wants(nearest)))
            parts.append((tensors, piece, concerned))
    shares = []
    copies: dict[int, dict[int, Site]] = {}
    for job, reader, first, count, box in spread(jobs, ranks):
        tensors, piece, wants = parts[job]
        if box is not jobs[job].box:  # a cut one
            region = _moved(box, piece.region.offset)
            wants = tuple(want for want in wants if region.intersect(want.region) is not None)
        chosen = tensors if count == len(tensors) else tensors[first : first + count]
        site = piece.sites[0]
        if len(piece.sites) > 1:
            # The copy that the reader wrote itself, else one chosen by its rank, so that ranks spread over the copies.
            own = copies.get(id(piece))
            if own is None:
                own = copies[id(piece)] = {site.rank: site for site in reversed(piece.sites)}
            site = own.get(reader) or piece.sites[reader % len(piece.sites)]
        shares.append(Share(reader, tuple(chosen), chosen[0].arrangement, piece, site, box, wants))
    shares.sort(key=lambda share: (share.reader, share.site.file))
    return ExchangePlan(tuple(shares))


def _plain(blocks: Sequence[RowBlocks] | None) -> Sequence[RowBlocks]:
    return () if blocks is None else blocks


def _blocks_of(piece: Piece, itemsize: int) -> RowBlocks:
    """The row blocks of the tensor of which a piece is a window, as rows of the piece, where its rows and blocks begin together; else
    single rows, of which none can be verified for certain.
    """
    blocks = row_blocks_of(piece.stored_shape, itemsize)
    if piece.window is None:
        return blocks
    dimension = next((d for d, extent in enumerate(piece.region.shape) if extent > 1), None)
    if dimension is None:
        return RowBlocks(None, 1, blocks.nbytes, 1)
    stride = piece.strides(itemsize)[dimension]
    begins_together = piece.begin(itemsize) % blocks.nbytes == 0 and blocks.nbytes % stride == 0
    return RowBlocks(dimension, blocks.nbytes // stride if begins_together else 1, blocks.nbytes, blocks.number)


def _groups(holders: Mapping[TensorKey, Holders], catalog: Catalog) -> Iterator[tuple[list[StoredTensor], list[Want]]]:
    """Tensors that are stored alike and wanted alike, with who wants what."""
    groups: dict[tuple[int, int], list[StoredTensor]] = {}
    for key, tensor in catalog.tensors.items():
        if key in holders:
            groups.setdefault((id(tensor.arrangement), id(holders[key])), []).append(tensor)
    known: dict[int, list[Want]] = {}
    takers: dict[tuple[Taker, ...], tuple[Taker, ...]] = {}
    for (_, identity), tensors in groups.items():
        wants = known.get(identity)
        if wants is None:
            wants = known[identity] = _wants(holders[tensors[0].key], takers)
        if wants:
            yield tensors, wants


def _wants(holders: Holders, known: dict[tuple[Taker, ...], tuple[Taker, ...]]) -> list[Want]:
    """The different regions that are wanted of a tensor, in the order of the ranks."""
    found: dict[Region, list[Taker]] = {}
    for holding, ranks in holders.different():
        for shard, region in enumerate(holding.regions):
            if not region.is_empty:  # nobody reads nothing
                found.setdefault(region, []).extend(Taker(rank, shard) for rank in ranks)
    wants = []
    for region, shards in found.items():
        takers = tuple(sorted(shards))
        wants.append(Want(region, known.setdefault(takers, takers)))
    return wants


class _RankSets:
    """The ranks behind wants, each set made once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._same: dict[tuple[int, ...], tuple[int, ...]] = {}

    def wants(self, wants: Sequence[Want]) -> tuple[int, ...]:
        """The ranks that take any of some wants, ascending. The wants must live on."""
        alike = tuple(id(want.takers) for want in wants)
        ranks = self._known.get(alike)
        if ranks is None:
            ranks = tuple(sorted({taker.rank for want in wants for taker in want.takers}))
            ranks = self._known[alike] = self._same.setdefault(ranks, ranks)
        return ranks


def _only(want: Want, rank: int) -> Want:
    """A want as far as it is one rank's."""
    first = bisect_left(want.takers, (rank,))
    last = bisect_left(want.takers, (rank + 1,))
    return Want(want.region, want.takers[first:last])


def _alike(block: Block, dimension: int) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What blocks have in common that differ only in their place along a dimension."""
    offset = block.region.offset
    return block.nbytes, block.region.shape, offset[:dimension], offset[dimension + 1 :]


def _moved(box: Region, by: tuple[int, ...]) -> Region:
    return Region(tuple(a + b for a, b in zip(box.offset, by, strict=True)), box.shape)
