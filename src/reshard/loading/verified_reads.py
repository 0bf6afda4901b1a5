"""Reads whose row blocks are held against their digests while they are in the cache."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from reshard.format.digest import DIGEST_BYTES, digest_of
from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors import BlockCheck, TensorEntry, check_bytes
from reshard.geometry import Region
from reshard.loading.scattered import PART_BYTES, Amount
from reshard.storage import ReadableFile
from reshard.storage.storage import memory_at

# What is read into its place at a time when it is to be verified: it is still in a core's own cache when it is hashed.
PIECE_BYTES = 1 << 20


# Reads of pieces that are done one after the other: to hand one to a thread costs as much as to hash 256 KiB.
_GROUP_BYTES = 4 << 20


class Part(NamedTuple):
    """A run of bytes of a file that goes to one place in memory.

    Attributes:
        begin: where it begins in the file.
        nbytes: how long it is.
        address: of its place in memory.
        entry: the stored tensor that it is of.
    """

    begin: int
    nbytes: int
    address: int
    entry: TensorEntry


def parts_of(run: Part) -> Iterator[Part]:
    """A run cut at row blocks, each part as long as a read may be (or one block)."""
    begin, nbytes, address, entry = run
    block_bytes = row_blocks_of(entry.shape, entry.dtype.itemsize).nbytes
    step = max(1, PART_BYTES // block_bytes) * block_bytes
    offset = begin - entry.begin
    end = offset + nbytes
    while offset < end:
        length = min(step - offset % step, end - offset)
        yield Part(entry.begin + offset, length, address, entry)
        offset += length
        address += length


def rows_of(box: Region, strides: tuple[int, ...], begin: int, block_bytes: int) -> Iterator[Region]:
    """A box that is one run of a stored tensor, cut at row blocks, each part as long as a read may be (or one block).

    Where no row of the box begins with a block, it is one part.

    Args:
        box: in coordinates of these strides.
        strides: in bytes.
        begin: where the coordinate 0 lies, in bytes from the first byte of the tensor.
        block_bytes: of its row blocks.
    """
    d = next((d for d, extent in enumerate(box.shape) if extent > 1), None)
    if d is None or block_bytes % strides[d] or begin % strides[d]:
        yield box
        return
    step = max(1, PART_BYTES // block_bytes) * block_bytes // strides[d]
    # Rows before the first one of this box, counted from the tensor's first byte.
    before = (begin + sum(o * stride for o, stride in zip(box.offset, strides, strict=True))) // strides[d] - box.offset[d]
    first, end = box.offset[d], box.end[d]
    while first < end:
        count = min(step - (before + first) % step, end - first)
        yield Region((*box.offset[:d], first, *box.offset[d + 1 :]), (*box.shape[:d], count, *box.shape[d + 1 :]))
        first += count


def read_straight(source: ReadableFile, parts: Sequence[Part]) -> Callable[[], Amount]:
    """Work that reads long runs into their places, piece by piece, and looks at each piece at once."""

    def work() -> Amount:
        verified = 0
        for begin, nbytes, address, entry in parts:
            check = BlockCheck(entry, source.path)
            # Pieces end with blocks, unless a block is longer.
            step = PIECE_BYTES // check.block_bytes * check.block_bytes or PIECE_BYTES
            offset = begin - entry.begin
            end = offset + nbytes
            place = address
            while offset < end:
                piece = memory_at(place, min(step - offset % step, end - offset))
                source.read_into(entry.begin + offset, piece)
                check.update(offset, piece)
                check.raise_if_wrong()
                offset += len(piece)
                place += len(piece)
            verified += check.verified
        return Amount(sum(part.nbytes for part in parts), verified)

    return work


class Reading(NamedTuple):
    """A read, and what it reads.

    Attributes:
        work: reads.
        runs: where each begins in the file, its bytes, its address, and the stored tensor (None: nothing of it can be verified). No objects
            of a class: a state has 100,000 of these.
    """

    work: Callable[[], Amount]
    runs: Sequence[tuple[int, int, int, TensorEntry | None]]


def check_after(readings: Iterable[Reading], path: str) -> Iterator[Callable[[], Amount]]:
    """Work that reads, and looks after each read at what came; several reads in one, since they are short.

    Args:
        readings: the reads.
        path: of the file.
    """
    group: list[Reading] = []
    nbytes = 0
    for reading in readings:
        group.append(reading)
        nbytes += sum(run[1] for run in reading.runs)
        if nbytes >= _GROUP_BYTES:
            yield _checking(group, path)
            group, nbytes = [], 0
    if group:
        yield _checking(group, path)


def _checking(readings: Sequence[Reading], path: str) -> Callable[[], Amount]:
    def work() -> Amount:
        read = verified = 0
        for reading in readings:
            read += reading.work().read
            for begin, nbytes, address, entry in reading.runs:
                if entry is None:
                    continue
                if len(entry.digests) == DIGEST_BYTES and digest_of((ctypes.c_char * nbytes).from_address(address)) == entry.digests:
                    verified += nbytes
                else:
                    verified += check_bytes(entry, memory_at(address, nbytes), path, begin - entry.begin)
        return Amount(read, verified)

    return work
