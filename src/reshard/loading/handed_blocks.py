"""What a rank reads at a time for the ranks of its machine, and where each of them gets it: as pieces of memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from reshard.comm.neighbours import MOST_PIECES
from reshard.geometry import Region
from reshard.geometry.region import strides_of
from reshard.planning.byte_runs import run_places
from reshard.planning.exchange_plan import BlockPlan, Part, Share

# Gaps inside a box that nobody needs are read over up to a page, as in a balanced load.
_GAP_BYTES = 4096

# Shorter runs are put side by side before they are handed over: for the kernel a piece costs what the copy of some hundred bytes costs.
_SHORT_RUN_BYTES = 512

# What the places of pieces are counted from, where it isn't a shard of the rank itself (then it is the shard's number): the buffer that
# is read into, and the one in which short runs are put side by side.
READ, PACKED = -1, -2


class Delivery(NamedTuple):
    """What a neighbour gets of a block; the same for all tensors of a share.

    Attributes:
        rank: whose shard it is.
        shard: its index in the tensor on that rank.
        source: the box in the block's own coordinates.
        nbytes: its bytes.
        origin: what `own` is counted from.
        own: where the own pieces begin.
        target: where those in the neighbour's shard begin.
        calls: what is copied at a time: own pieces, pieces of the neighbour's shard, each counted from there; and the bytes. None where
            all is one run on either side.
    """

    rank: int
    shard: int
    source: Region
    nbytes: int
    origin: int
    own: int
    target: int
    calls: Sequence[tuple[np.ndarray, np.ndarray, int]] | None


class LandingCall(NamedTuple):
    """What is read at a time, to where it belongs.

    Attributes:
        offset: where it begins in the block.
        pieces: (pieces, 2) of int64: the place of each, counted from where the buffer or its box begins; and its bytes.
        nbytes: of all of them.
        which: which pieces are the buffer's, and which each box's.
    """

    offset: int
    pieces: np.ndarray
    nbytes: int
    which: tuple[slice | np.ndarray, ...]


class Landing(NamedTuple):
    """Where the bytes of a block go as they are read: the rank's own straight to their places, those of others side by side.

    Attributes:
        boxes: the own ones: the shard of each, and where the box begins in it.
        calls: what is read at a time.
    """

    boxes: tuple[tuple[int, int], ...]
    calls: Sequence[LandingCall]


class HandedBlock(NamedTuple):
    """What is read at a time, and who gets what of it.

    Attributes:
        shape: of the box that is read.
        offset: where its run begins, in bytes from the first byte of the tensor in the file.
        nbytes: the length of the run.
        landing: where it goes; None when all of it goes into the buffer, as it is in the file.
        own: what the rank copies out of the buffer for itself.
        deliveries: what the others get.
    """

    shape: tuple[int, ...]
    offset: int
    nbytes: int
    landing: Landing | None
    own: list[Part]
    deliveries: list[Delivery]


class _Runs(NamedTuple):
    """A box as runs of bytes of one length: where each begins, from the first one on.

    `pieces` is the same as pieces, each with its bytes.
    """

    nbytes: int
    places: np.ndarray
    pieces: np.ndarray

    @property
    def total(self) -> int:
        return self.nbytes * len(self.places)

    @classmethod
    def of(cls, nbytes: int, places: np.ndarray) -> _Runs:
        return cls(nbytes, places, _between(places, nbytes, 0, nbytes * len(places)))


class _Placed(NamedTuple):
    """A box somewhere.

    Attributes:
        origin: what its begin is counted from.
        begin: where its first byte is.
        runs: what it consists of.
    """

    origin: int
    begin: int
    runs: _Runs


class BlockCutter:
    """Cuts shares into blocks.

    Args:
        rank: who reads them.
        block_bytes: the longest block.
        is_straight: whether bytes may go to their places as they are read; else they go into the buffer in one run.
    """

    def __init__(self, rank: int, block_bytes: int, *, is_straight: bool) -> None:
        self._rank = rank
        self._block_bytes = block_bytes
        self._is_straight = is_straight
        # Blocks are alike but for where they begin, and so are tensors; what they have in common is made once, and lives on with this.
        self._runs: dict[tuple[tuple[int, ...], tuple[int, ...], int], _Runs] = {}
        self._calls: dict[tuple[int, int], Sequence[tuple[np.ndarray, np.ndarray, int]]] = {}
        self._landings: dict[tuple[int, tuple[tuple[int, int, int, int], ...]], Sequence[LandingCall] | None] = {}

    def blocks(self, share: Share) -> list[HandedBlock]:
        """The blocks of a share, in file order."""
        itemsize = share.arrangement.dtype.itemsize
        strides, dimension = share.piece.strides(itemsize), share.outermost
        in_shard = {(taker.rank, taker.shard): strides_of(want.region.shape, itemsize) for want in share.wants for taker in want.takers}
        steps = {taker: of_shard[dimension] for taker, of_shard in in_shard.items()}
        blocks: list[HandedBlock] = []
        for plan, indices in share.series(self._block_bytes, _GAP_BYTES):
            first = self._block(plan, strides, in_shard, itemsize)
            blocks += [self._further_on(first, index, dimension, strides[dimension], steps) if index else first for index in indices]
        return blocks

    def _block(
        self, plan: BlockPlan, strides: tuple[int, ...], in_shard: Mapping[tuple[int, int], tuple[int, ...]], itemsize: int
    ) -> HandedBlock:
        read = {part.source: self._place(READ, part.source, strides, itemsize) for part in plan.parts}
        targets = [self._place(part.shard, part.target, in_shard[part.rank, part.shard], itemsize) for part in plan.parts]
        landed = self._landed(plan, read, targets) if self._is_straight else None
        landing = None if landed is None else self._landing(plan, read, landed)
        held = read if landed is None or landing is None else landed
        deliveries: list[Delivery] = []
        for (rank, shard, source, _, nbytes), target in zip(plan.parts, targets, strict=True):
            if rank != self._rank:
                origin, begin, runs = held[source]
                if runs.nbytes < _SHORT_RUN_BYTES and len(runs.places) > 1:
                    origin, begin, runs = PACKED, 0, self._one(nbytes)
                calls = self._calls_of(runs, target.runs, nbytes)
                deliveries.append(Delivery(rank, shard, source, nbytes, origin, begin, target.begin, calls))
        own = [part for part in plan.parts if part.rank == self._rank and landing is None]
        return HandedBlock(plan.shape, plan.offset, plan.nbytes, landing, own, deliveries)

    def _further_on(self, block: HandedBlock, index: int, dimension: int, stride: int, steps: Mapping[tuple[int, int], int]) -> HandedBlock:
        """A block that lies so many indices further on in the file (`stride`) and in all shards (`steps`), and is the same otherwise."""
        shape, offset, nbytes, landing, own, deliveries = block
        if landing is not None:
            landing = Landing(tuple((shard, begin + index * steps[self._rank, shard]) for shard, begin in landing.boxes), landing.calls)
        moved: list[Delivery] = []
        for rank, shard, source, size, origin, begin, target, calls in deliveries:
            begin += index * steps[self._rank, origin] if origin >= 0 else 0
            moved.append(Delivery(rank, shard, source, size, origin, begin, target + index * steps[rank, shard], calls))
        return HandedBlock(shape, offset + index * stride, nbytes, landing, [_moved(part, dimension, index) for part in own], moved)

    def _landed(self, plan: BlockPlan, read: dict[Region, _Placed], targets: list[_Placed]) -> dict[Region, _Placed] | None:
        """Where each box of a block lies when the rank's own are in their places and the others side by side; None where the rank has one
        in two places.
        """
        held: dict[Region, _Placed] = {}
        for part, target in zip(plan.parts, targets, strict=True):
            if part.rank == self._rank:
                if part.source in held:
                    return None
                held[part.source] = target
        at = 0
        for source, placed in read.items():
            if source not in held:
                held[source] = _Placed(READ, at, self._one(placed.runs.total))
                at += placed.runs.total
        return held

    def _landing(self, plan: BlockPlan, read: dict[Region, _Placed], held: dict[Region, _Placed]) -> Landing | None:
        """How a block is read so that its boxes lie there; None when they are not all of it, or consist of short runs."""
        pairs = [(placed, held[source]) for source, placed in read.items()]
        alike = tuple(
            (id(placed.runs), placed.begin, id(target.runs), target.begin if target.origin == READ else -1) for placed, target in pairs
        )
        known = plan.nbytes, alike
        if known not in self._landings:
            self._landings[known] = _scatter(pairs, plan.nbytes)
        calls = self._landings[known]
        boxes = tuple((target.origin, target.begin) for _, target in pairs if target.origin != READ)
        return None if calls is None else Landing(boxes, calls)

    def _calls_of(self, runs: _Runs, target: _Runs, nbytes: int) -> Sequence[tuple[np.ndarray, np.ndarray, int]] | None:
        """How runs are copied onto others, in as few calls as the system takes; None where it is one run onto another."""
        if not runs.total == target.total == nbytes:
            raise ValueError(f"{runs.total} bytes don't fill {target.total}, of {nbytes}")  # the system would write beside the shard
        if len(runs.places) == len(target.places) == 1:
            return None
        calls = self._calls.get((id(runs), id(target)))
        if calls is None:
            if max(len(runs.places), len(target.places)) <= MOST_PIECES:
                calls = [(runs.pieces, target.pieces, nbytes)]
            else:
                # At either end of a call a run may be cut.
                step = (MOST_PIECES - 2) * min(runs.nbytes, target.nbytes)
                calls = [
                    (_between(runs.places, runs.nbytes, begin, end), _between(target.places, target.nbytes, begin, end), end - begin)
                    for begin, end in pairwise([*range(0, nbytes, step), nbytes])
                ]
            self._calls[id(runs), id(target)] = calls
        return calls

    def _place(self, origin: int, box: Region, strides: tuple[int, ...], itemsize: int) -> _Placed:
        alike = box.shape, strides, itemsize
        runs = self._runs.get(alike)
        if runs is None:
            runs = self._runs[alike] = _Runs.of(*run_places(Region.whole(box.shape), strides, itemsize))
        return _Placed(origin, sum(offset * stride for offset, stride in zip(box.offset, strides, strict=True)), runs)

    def _one(self, nbytes: int) -> _Runs:
        """Bytes in one run."""
        return self._place(READ, Region.whole((nbytes,)), (1,), 1).runs


def _moved(part: Part, dimension: int, index: int) -> Part:
    """The same part of a block that lies so many indices further on."""
    offset, shape = part.target.offset, part.target.shape
    return part._replace(target=Region((*offset[:dimension], offset[dimension] + index, *offset[dimension + 1 :]), shape))


def _scatter(pairs: Sequence[tuple[_Placed, _Placed]], nbytes: int) -> Sequence[LandingCall] | None:
    """The calls of a landing of boxes of a block: each one's place in the block, and where it goes."""
    begins, pieces, bases = [], [], []
    number = 0
    for placed, target in pairs:
        base, begin = 0, target.begin
        if target.origin != READ:
            number += 1
            base, begin = number, 0
        # One of them is made of whole runs of the other: both are of the same box.
        run = min(placed.runs.nbytes, target.runs.nbytes)
        if run < _SHORT_RUN_BYTES:
            return None
        at = np.arange(0, placed.runs.total, run)
        begins.append(placed.begin + _at(placed.runs, at))
        pieces.append(np.stack([begin + _at(target.runs, at), np.full(len(at), run)], axis=1))
        bases.append(np.full(len(at), base))
    begin, piece, base = np.concatenate(begins), np.concatenate(pieces), np.concatenate(bases)
    order = np.argsort(begin)
    begin, piece, base = begin[order], piece[order], base[order]
    if begin[0] or (begin[1:] != begin[:-1] + piece[:-1, 1]).any() or begin[-1] + piece[-1, 1] != nbytes:
        return None
    calls: list[LandingCall] = []
    for n in range(0, len(begin), MOST_PIECES):
        pieces, of_call = piece[n : n + MOST_PIECES], base[n : n + MOST_PIECES]
        which = tuple(_regular(np.flatnonzero(of_call == one)) for one in range(number + 1))
        calls.append(LandingCall(int(begin[n]), pieces, int(pieces[:, 1].sum()), which))
    return calls


def _regular(indices: np.ndarray) -> slice | np.ndarray:
    """Ascending indices as a slice, which numpy takes much faster, where they are one."""
    if not len(indices):
        return slice(0, 0)
    step = int(indices[1] - indices[0]) if len(indices) > 1 else 1
    first, last = int(indices[0]), int(indices[-1])
    return slice(first, last + 1, step) if (np.diff(indices) == step).all() else indices


def _at(runs: _Runs, number: np.ndarray) -> np.ndarray:
    """Where bytes of some numbers lie."""
    return runs.places[number // runs.nbytes] + number % runs.nbytes


def _between(places: np.ndarray, run: int, begin: int, end: int) -> np.ndarray:
    """Of equally long runs, one after the other, the pieces that are the bytes from one number to another: each one's begin and size."""
    first, last = begin // run, -(-end // run)
    pieces = np.empty((last - first, 2), np.int64)
    pieces[:, 0], pieces[:, 1] = places[first:last], run
    skipped = begin - first * run
    pieces[0] += (skipped, -skipped)
    pieces[-1, 1] -= last * run - end
    return pieces
