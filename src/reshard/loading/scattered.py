"""Runs of a file that go straight to their places in memory, many by one call."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from reshard.storage import ReadableFile

# A read is at most this long, so that several are in flight.
PART_BYTES = 16 << 20

# Pieces of memory that systems take in one call, what lies between runs counted.
MOST_PIECES = 1024


class Amount(NamedTuple):
    """What was read, in bytes.

    Attributes:
        read: of data files, gaps included.
        verified: how many of these were held against digests.
        pages: of the whole pages on which lies what was copied out of mapped files.
    """

    read: int
    verified: int
    pages: int = 0


class Runs(NamedTuple):
    """Runs of a file that are runs in memory, too: int64 arrays with a number for each.

    Attributes:
        begins: where it begins in the file.
        sizes: its bytes.
        addresses: where it goes.
    """

    begins: np.ndarray
    sizes: np.ndarray
    addresses: np.ndarray

    @classmethod
    def of(cls, begins: Sequence[int], sizes: Sequence[int], addresses: Sequence[int]) -> Runs:
        """Runs of plain numbers."""
        return cls(np.array(begins, np.int64), np.array(sizes, np.int64), np.array(addresses, np.int64))


class RowCall(NamedTuple):
    """Some rows of a shard that are read by one call.

    Attributes:
        offset: where the first begins, from the first byte that is read of the file.
        pieces: (rows, 2) of int64: where each row begins in the shard, and its bytes.
        nbytes: of all of them.
    """

    offset: int
    pieces: np.ndarray
    nbytes: int


def cut_rows(nbytes: int, places: np.ndarray, most: int) -> list[RowCall]:
    """A run of a file that is rows of a shard, as calls.

    Args:
        nbytes: of a row.
        places: where each begins in the shard, in bytes.
        most: the bytes of a call (or one row).
    """
    pieces = np.empty((len(places), 2), np.int64)
    pieces[:, 0], pieces[:, 1] = places, nbytes
    step = min(MOST_PIECES, max(1, most // nbytes))
    parts = ((first, pieces[first : first + step]) for first in range(0, len(places), step))
    return [RowCall(first * nbytes, part, len(part) * nbytes) for first, part in parts]


class RowRun(NamedTuple):
    """A run of a file that is rows of a shard.

    Attributes:
        begin: where it begins in the file.
        shard: where the shard begins in memory.
        calls: how its rows are read.
    """

    begin: int
    shard: int
    calls: Sequence[RowCall]


def scatter_rows(source: ReadableFile, runs: Sequence[RowRun]) -> Iterator[Callable[[], Amount]]:
    """Runs that go straight to their rows, as pieces of work.

    Args:
        source: the file.
        runs: in the order of the file.
    """
    calls: list[tuple[int, int, RowCall]] = []
    nbytes = 0
    for begin, shard, of_run in runs:
        for call in of_run:
            if calls and nbytes + call.nbytes > PART_BYTES:
                yield partial(_read_rows, source, calls, nbytes)
                calls, nbytes = [], 0
            calls.append((begin + call.offset, shard, call))
            nbytes += call.nbytes
    if calls:
        yield partial(_read_rows, source, calls, nbytes)


def _read_rows(source: ReadableFile, calls: Sequence[tuple[int, int, RowCall]], nbytes: int) -> Amount:
    for begin, shard, call in calls:
        moved = call.pieces.copy()
        moved[:, 0] += shard
        source.scatter(begin, moved, call.nbytes)
    return Amount(nbytes, 0)


class Scatter(NamedTuple):
    """One call that reads runs.

    Attributes:
        first: the number of the first of them.
        end: that of the last, exclusive.
        work: reads them.
    """

    first: int
    end: int
    work: Callable[[], Amount]


def cut_runs(parts: Sequence[Runs]) -> tuple[Runs, np.ndarray]:
    """Runs in the order of the file, long ones in parts.

    Returns:
        The runs, and of each its number among the given ones, which are counted through.
    """
    begins, sizes, addresses = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    counts = -(-sizes // PART_BYTES)
    which = np.arange(len(begins))
    if (counts > 1).any():
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        which = np.repeat(which, counts)
        begins, addresses = (array[which] + within * PART_BYTES for array in (begins, addresses))
        sizes = np.minimum(sizes[which] - within * PART_BYTES, PART_BYTES)
    order = np.argsort(begins, kind="stable")
    return Runs(begins[order], sizes[order], addresses[order]), which[order]


def scatter(source: ReadableFile, runs: Runs, most: int, gap_bytes: int) -> Iterator[Scatter]:
    """Runs that lie close to each other in the file are read by one call, each into its own place.

    Args:
        source: the file.
        runs: in the order of the file.
        most: the bytes of a call (or one run), gaps not counted.
        gap_bytes: the widest gap that is read over.
    """
    begins, sizes, addresses = runs
    gaps = begins[1:] - begins[:-1] - sizes[:-1]
    apart = np.flatnonzero((gaps < 0) | (gaps > gap_bytes)) + 1
    crossed = np.flatnonzero((gaps > 0) & (gaps <= gap_bytes))
    # What lies between runs goes here; nobody looks at it.
    waste = np.empty(int(gaps[crossed].max(initial=0)), np.uint8)
    # All pieces at once, of which each call takes its own; where in them each run is.
    at = np.arange(len(begins))
    at[1:] += np.cumsum((gaps > 0) & (gaps <= gap_bytes))
    pieces = np.empty((len(begins) + len(crossed), 2), np.int64)
    pieces[at, 0], pieces[at, 1] = addresses, sizes
    pieces[at[crossed] + 1, 0], pieces[at[crossed] + 1, 1] = waste.ctypes.data, gaps[crossed]
    places, reach = at.tolist(), np.cumsum(sizes).tolist()
    for first, last in pairwise([0, *apart.tolist(), len(begins)]):
        while first < last:
            fits = bisect_right(reach, (reach[first - 1] if first else 0) + most)
            taken = bisect_right(places, places[first] + MOST_PIECES - 1)
            end = max(first + 1, min(last, taken, fits))
            yield Scatter(first, end, _scattering(source, int(begins[first]), pieces[places[first] : places[end - 1] + 1], waste))
            first = end


def _scattering(source: ReadableFile, begin: int, pieces: np.ndarray, waste: np.ndarray) -> Callable[[], Amount]:
    def work() -> Amount:
        nbytes = int(pieces[:, 1].sum())
        source.scatter(begin, pieces, nbytes)
        _ = waste  # it lives as long as something may be written into it
        return Amount(nbytes, 0)

    return work
