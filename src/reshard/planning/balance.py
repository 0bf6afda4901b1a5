"""Work that can be cut is spread evenly over ranks, first over those that want it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NamedTuple

from reshard.geometry import Region

# What is left after everyone has read for himself is spread up to so much above the mean, so that no box is cut into slivers.
_SLACK = 50

# A rank with less room than this part of its share is full: a cut costs another read and other messages.
_SLIVER = 100


@dataclass(frozen=True, slots=True)
class Job:
    """A box of bytes to read, of several tensors alike.

    Attributes:
        count: the number of tensors.
        box: what is read of each.
        nbytes: the bytes of one.
        dimension: along which a box can be cut; None when it can't.
        rows: it can be cut at multiples of so many rows along this dimension, counted from where boxes' offsets are.
        ranks: those that are to read it if they have room, sorted.
    """

    count: int
    box: Region
    nbytes: int
    dimension: int | None
    rows: int
    ranks: tuple[int, ...]

    @property
    def least_bytes(self) -> int:
        """What is read by one rank in any case."""
        if self.dimension is None:
            return self.nbytes
        extent = self.box.shape[self.dimension]
        return self.nbytes // extent * min(self.rows, extent)


class Assignment(NamedTuple):
    """What one rank reads of a job.

    Attributes:
        job: its index.
        reader: the rank.
        first: the first tensor.
        number: of tensors.
        box: what is read of each.
    """

    job: int
    reader: int
    first: int
    number: int
    box: Region


class _Rest(NamedTuple):
    job: int
    first: int
    number: int
    box: Region
    nbytes: int
    row_bytes: int
    dimension: int | None
    rows: int

    def up_to_border(self, count: int) -> int:
        """The most rows, of so many at most, that end where the box can be cut; 0 when there is no such place."""
        assert self.dimension is not None
        begin = self.box.offset[self.dimension]
        return max(0, (begin + count) // self.rows * self.rows - begin)

    def to_next_border(self) -> int:
        """The fewest rows that end where the box can be cut, or with it."""
        assert self.dimension is not None
        return min(self.rows - self.box.offset[self.dimension] % self.rows, self.box.shape[self.dimension])


def spread(jobs: Sequence[Job], ranks: Sequence[int]) -> list[Assignment]:
    """Who reads what: everything once, evenly by bytes, and by ranks that it is for as far as evenness allows.

    Args:
        jobs: all there is to read.
        ranks: of the whole job, ascending.

    Returns:
        Assignments, the same for the same arguments on every rank. No rank has more than 1.02 of the mean and what lies between two places
        where a box can be cut (or one box that can't be cut).
    """
    total = sum(job.nbytes * job.count for job in jobs)
    mean = -(-total // len(ranks))
    loads = dict.fromkeys(ranks, 0)
    # By identity: a hash goes over all ranks. Two for equal ranks would say the same.
    orders: dict[int, _Least] = {}
    done: list[Assignment] = []
    left: list[_Rest] = []
    # Those that are for the fewest ranks first: the others have a choice later, too. Of these the coarsest first: what is finer fills the
    # room that they leave.
    sizes = [job.least_bytes for job in jobs]
    for index in sorted(range(len(jobs)), key=lambda index: (len(jobs[index].ranks), -sizes[index])):
        job = jobs[index]
        row_bytes = job.nbytes if job.dimension is None else job.nbytes // job.box.shape[job.dimension]
        rest = _Rest(index, 0, job.count, job.box, job.nbytes, row_bytes, job.dimension, job.rows)
        least = orders.get(id(job.ranks))
        if least is None:
            least = orders[id(job.ranks)] = _Least(job.ranks, loads)
        left += _give(rest, least, loads, mean, done, force=False)
    left.sort(key=lambda rest: sizes[rest.job], reverse=True)
    least = _Least(ranks, loads)
    for rest in left:
        _give(rest, least, loads, mean + mean // _SLACK, done, force=True)
    return done


class _Least:
    """The least loaded of some ranks, of several the first; found without a look at all of them.

    Loads only grow. So a rank that is the least by what is noted of it, and whose note is true, is the least.
    """

    def __init__(self, ranks: Sequence[int], loads: Mapping[int, int]) -> None:
        self._loads = loads
        self._noted = [(loads[rank], rank) for rank in ranks]
        heapify(self._noted)

    def __call__(self) -> int:
        while True:
            noted, rank = self._noted[0]
            load = self._loads[rank]
            if load == noted:
                return rank
            heapreplace(self._noted, (load, rank))


def _give(rest: _Rest, least: _Least, loads: dict[int, int], limit: int, done: list[Assignment], *, force: bool) -> list[_Rest]:
    """Assign what has room, to the least loaded first; give back what hasn't."""
    queue, left = [rest], []
    while queue:
        rest = queue.pop()
        rank = least()
        room = limit - loads[rank]
        whole = min(rest.number, room // rest.nbytes) if room > 0 else 0
        if whole:
            done.append(Assignment(rest.job, rank, rest.first, whole, rest.box))
            loads[rank] += whole * rest.nbytes
            if whole < rest.number:
                queue.append(rest._replace(first=rest.first + whole, number=rest.number - whole))
            continue
        rows = 0 if rest.dimension is None else rest.up_to_border(max(room, 0) // rest.row_bytes)
        if rows * rest.row_bytes * _SLIVER < limit:
            rows = 0
        if rows == 0 and not force:
            left.append(rest)
            continue
        # One tensor is cut: some rows now, its others next, then the tensors after it.
        if rest.number > 1:
            queue.append(rest._replace(first=rest.first + 1, number=rest.number - 1))
        if rest.dimension is None:
            done.append(Assignment(rest.job, rank, rest.first, 1, rest.box))
            loads[rank] += rest.nbytes
            continue
        extent = rest.box.shape[rest.dimension]
        rows = rows or rest.to_next_border()
        now = _rows(rest.box, rest.dimension, 0, rows)
        done.append(Assignment(rest.job, rank, rest.first, 1, now))
        loads[rank] += rows * rest.row_bytes
        if rows < extent:
            others = _rows(rest.box, rest.dimension, rows, extent - rows)
            queue.append(rest._replace(number=1, box=others, nbytes=rest.nbytes - rows * rest.row_bytes))
    return left


def _rows(box: Region, dimension: int, first: int, count: int) -> Region:
    offset = tuple(o + (first if d == dimension else 0) for d, o in enumerate(box.offset))
    return Region(offset, tuple(count if d == dimension else n for d, n in enumerate(box.shape)))
