"""What a load would move, for every rank of a strategy at once: the numbers of read plans without the plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from reshard.catalog import Arrangement, Catalog, StoredTensor
from reshard.planning.exchange_plan import Taker, Want, share_out
from reshard.planning.placement import Placement, TensorsAlike
from reshard.planning.read_plan import Mismatch, find_misfit
from reshard.state import TensorKey

# Who reads of which file is kept in a table of bits, of so many ranks at a time. 16,384 ranks and as many files take half of it.
_TABLE_BYTES = 64 << 20

_BITS = 1 << np.arange(8, dtype=np.uint8)
_BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


class Fitting(NamedTuple):
    """Tensors that are stored alike and wanted alike.

    Attributes:
        arrangement: how they are stored.
        kind: how they are wanted.
        tensors: the tensors, in the order of the checkpoint.
    """

    arrangement: Arrangement
    kind: TensorsAlike
    tensors: list[StoredTensor]


@dataclass(frozen=True)
class Match:
    """What a run would find of its tensors in a checkpoint.

    Attributes:
        fitting: the tensors that would be restored, those that are cast among them.
        missing: the run's tensors that the checkpoint lacks.
        unexpected: the checkpoint's tensors that the run lacks.
        mismatched: tensors that differ in shape or dtype.
        cast: those of the restored ones that differ in dtype and are converted.
    """

    fitting: tuple[Fitting, ...]
    missing: tuple[TensorKey, ...]
    unexpected: tuple[TensorKey, ...]
    mismatched: tuple[Mismatch, ...]
    cast: tuple[Mismatch, ...]

    @property
    def restored(self) -> int:
        """The number of tensors that would be restored."""
        return sum(len(fitting.tensors) for fitting in self.fitting)

    @property
    def nbytes(self) -> int:
        """The bytes of the stored tensors that would be restored, each counted once."""
        return sum(len(fitting.tensors) * fitting.tensors[0].nbytes for fitting in self.fitting)


@dataclass(frozen=True, eq=False)
class JobTraffic:
    """What each rank would move: int64 arrays with a number per rank.

    Attributes:
        needed: the stored bytes of the regions that it holds.
        read: the bytes that it would read. Gaps that a read goes over aren't counted.
        sent: the bytes that it would send to other ranks.
        received: the bytes that other ranks would send it.
        files: the number of data files that it would read of.
        file_names: the data files that any rank would read of, sorted.
    """

    needed: np.ndarray
    read: np.ndarray
    sent: np.ndarray
    received: np.ndarray
    files: np.ndarray
    file_names: tuple[str, ...]


def match_tensors(placement: Placement, catalog: Catalog, casts: Callable[[Mismatch], bool] | None = None) -> Match:
    """Hold what a run wants against what a checkpoint has.

    Args:
        placement: the run's tensors, laid out.
        catalog: what the checkpoint holds.
        casts: whether a tensor of another dtype is converted; None when none is.
    """
    kinds: list[TensorsAlike] = [placement.kinds[0]] * len(placement.tensors) if placement.tensors else []
    for kind in placement.kinds:
        for index in kind.members:
            kinds[index] = kind
    wanted = {tensor.key: kind for tensor, kind in zip(placement.tensors, kinds, strict=True)}
    found: dict[tuple[int, int], Fitting] = {}
    unexpected, mismatched, cast = [], [], []
    for key, stored in catalog.tensors.items():
        kind = wanted.pop(key, None)
        if kind is None:
            unexpected.append(key)
            continue
        arrangement = stored.arrangement
        misfit = find_misfit(key, kind.dtype, kind.global_shape, arrangement)
        if misfit is not None:
            if casts is None or not casts(misfit):
                mismatched.append(misfit)
                continue
            cast.append(misfit)
        alike = (id(arrangement), id(kind))
        fitting = found.get(alike)
        if fitting is None:
            fitting = found[alike] = Fitting(arrangement, kind, [])
        fitting.tensors.append(stored)
    return Match(tuple(found.values()), tuple(wanted), tuple(unexpected), tuple(mismatched), tuple(cast))


def forecast_direct(placement: Placement, fitting: Sequence[Fitting]) -> JobTraffic:
    """What each rank would move in a direct load: it reads what it needs.

    Args:
        placement: the run's tensors, laid out.
        fitting: what the checkpoint has of them.
    """
    world = placement.strategy.world_size
    needed = bytes_needed(world, fitting)
    counts, names = _count_files(placement, fitting)
    nothing = np.zeros(world, np.int64)
    return JobTraffic(needed, needed, nothing, nothing, counts, names)


def forecast_balanced(placement: Placement, fitting: Sequence[Fitting]) -> JobTraffic:
    """What each rank would move in a balanced load.

    Args:
        placement: the run's tensors, laid out.
        fitting: what the checkpoint has of them.
    """
    world = placement.strategy.world_size
    plan = share_out(_wanted(fitting), range(world))
    read, sent, received = (np.zeros(world, np.int64) for _ in range(3))
    files: list[set[str]] = [set() for _ in range(world)]
    # By set of takers, which many shares have in common: how often each rank is among them, and the bytes that they take.
    takers: dict[int, Counter[int]] = {}
    taken: dict[int, int] = {}
    for share in plan.shares:
        read[share.reader] += share.nbytes
        files[share.reader].add(share.site.file)
        for want, nbytes in share.taken():
            alike = id(want.takers)
            if alike not in takers:
                takers[alike] = Counter(taker.rank for taker in want.takers)
            taken[alike] = taken.get(alike, 0) + nbytes
            # What the reader takes itself is not sent.
            own = takers[alike][share.reader]
            sent[share.reader] += nbytes * (len(want.takers) - own)
            received[share.reader] -= nbytes * own
    for alike, ranks in takers.items():
        received[list(ranks)] += taken[alike] * np.array(list(ranks.values()), np.int64)
    counts = np.array([len(names) for names in files], np.int64)
    return JobTraffic(bytes_needed(world, fitting), read, sent, received, counts, tuple(sorted(set().union(*files))))


def _wanted(fitting: Sequence[Fitting]) -> Iterator[tuple[Sequence[StoredTensor], Sequence[Want]]]:
    """What the ranks would tell each other, for `share_out`."""
    known: dict[int, list[Want]] = {}
    same: dict[tuple[Taker, ...], tuple[Taker, ...]] = {}
    for _, kind, tensors in fitting:
        wants = known.get(id(kind))
        if wants is None:
            wants = known[id(kind)] = []
            order = np.lexsort((kind.ranks, kind.places))
            for part in np.split(order, np.flatnonzero(np.diff(kind.places[order])) + 1):
                region = kind.boxes[int(part[0])]
                if not region.is_empty:
                    takers = tuple(Taker(rank, 0) for rank in kind.ranks[part].tolist())
                    wants.append(Want(region, same.setdefault(takers, takers)))
        if wants:
            yield tensors, wants


def bytes_needed(world_size: int, fitting: Sequence[Fitting]) -> np.ndarray:
    """The stored bytes of the regions that each rank holds: int64, one number per rank."""
    needed = np.zeros(world_size, np.int64)
    for arrangement, kind, tensors in fitting:
        elements = np.prod(kind.boxes.shapes, axis=0)
        needed[kind.ranks] += len(tensors) * arrangement.dtype.itemsize * elements
    return needed


def _count_files(placement: Placement, fitting: Sequence[Fitting]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Of how many files each rank reads, and which files are read at all."""
    world = placement.strategy.world_size
    numbers: dict[str, int] = {}
    stored = {id(part.arrangement): _stored(part.arrangement, numbers) for part in fitting}
    # Ranks that hold the same read of the same files, unless there are copies, among which the rank's number decides.
    is_alike = not any(own.is_repeated for own in stored.values())
    classes = placement.classes if is_alike else tuple((rank,) for rank in range(world))
    class_of = np.full(world, -1, np.int64)
    class_of[[ranks[0] for ranks in classes]] = np.arange(len(classes))

    width = -(-len(numbers) // 8) or 1
    counts = np.zeros(len(classes), np.int64)
    read_by_any = np.zeros(width, np.uint8)
    rows = max(1, _TABLE_BYTES // width)
    for first in range(0, len(classes), rows):
        # A bit for each class and file.
        table = np.zeros((min(rows, len(classes) - first), width), np.uint8)
        for arrangement, kind, _ in fitting:
            row_of = class_of[kind.ranks] - first
            chosen = np.flatnonzero((row_of >= 0) & (row_of < len(table)))
            own = stored[id(arrangement)]
            place, piece = kind.boxes.take(chosen).touching_pairs(arrangement.boxes)
            place = chosen[place]
            file = own.files_for(kind.ranks[place], piece)
            np.bitwise_or.at(table.reshape(-1), row_of[place] * width + (file >> 3), _BITS[file & 7])
        counts[first : first + rows] = _BITS_SET[table].sum(axis=1)
        read_by_any |= np.bitwise_or.reduce(table, axis=0)
    by_rank = np.zeros(world, np.int64)
    for ranks, count in zip(classes, counts.tolist(), strict=True):
        by_rank[list(ranks)] = count
    is_read = np.unpackbits(read_by_any, bitorder="little", count=len(numbers)).astype(bool)
    return by_rank, tuple(sorted(name for name, number in numbers.items() if is_read[number]))


@dataclass(frozen=True, eq=False)
class _Stored:
    """Where the pieces of an arrangement are stored.

    Attributes:
        files: int64, of shape (pieces, the most sites of a piece): file numbers; those of missing sites repeat the first.
        ranks: int64, of the same shape: who wrote them.
        counts: the number of sites of each piece.
    """

    files: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray

    @property
    def is_repeated(self) -> bool:
        return self.files.shape[1] > 1

    def files_for(self, ranks: np.ndarray, pieces: np.ndarray) -> np.ndarray:
        """The file of which each rank reads each piece, as `plan_reads` chooses it."""
        if not self.is_repeated:
            return self.files[pieces, 0]
        is_own = self.ranks[pieces] == ranks[:, None]
        column = np.where(is_own.any(axis=1), is_own.argmax(axis=1), ranks % self.counts[pieces])
        return self.files[pieces, column]


def _stored(arrangement: Arrangement, numbers: dict[str, int]) -> _Stored:
    """Where an arrangement is stored; files get numbers as they are met."""
    # A piece without elements may be stored nowhere; nobody reads it.
    found = [[(numbers.setdefault(site.file, len(numbers)), site.rank) for site in piece.sites] or [(0, 0)] for piece in arrangement.pieces]
    counts = np.array([len(sites) for sites in found], np.int64)
    most = int(counts.max(initial=1))
    table = np.array([sites + sites[:1] * (most - len(sites)) for sites in found], np.int64).reshape(len(found), most, 2)
    return _Stored(table[:, :, 0], table[:, :, 1], counts)
