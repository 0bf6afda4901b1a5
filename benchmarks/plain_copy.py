"""The limit: the bytes that a load needs, copied out of the same files into the same memory by the plainest loops there are.

Three of them. What to copy is known beforehand: nothing is planned, checked or agreed while the time runs.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from benchmarks.states import ITEM_BYTES, Strategy, TensorSpec
from reshard import Checkpoint

# A gap up to this is read over: one more entry in a list costs less than one more call.
GAP_BYTES = 4096

# The kernel takes so many pieces of memory in one call, and not 2 GiB.
MOST_PIECES, MOST_BYTES = 1024, 1 << 30

# What is read at a time into a buffer that stays in a core's second-level cache.
BUFFER_BYTES = 256 << 10


@dataclass(frozen=True)
class Piece:
    """Rows of bytes that lie at equal distances in a file.

    Attributes:
        file: its path.
        offset: where the first row begins.
        stride: from the beginning of a row to the next one's.
        target: where they go: uint8, one row per row, each contiguous.
    """

    file: str
    offset: int
    stride: int
    target: np.ndarray

    @property
    def end(self) -> int:
        """Where the last row ends in the file."""
        return self.offset + (self.target.shape[0] - 1) * self.stride + self.target.shape[1]

    def rows(self, begin: int, end: int) -> Piece:
        """Some of the rows."""
        return Piece(self.file, self.offset + begin * self.stride, self.stride, self.target[begin:end])

    def columns(self, begin: int, end: int) -> Piece:
        """A part of each row."""
        return Piece(self.file, self.offset + begin, self.stride, self.target[:, begin:end])

    def source(self, buffer: object, offset: int) -> np.ndarray:
        """The rows in a buffer in which the first one begins at an offset."""
        return np.ndarray(self.target.shape, np.uint8, buffer, offset, (self.stride, 1))  # type: ignore[arg-type]  # its stub knows no mapping as a buffer


def pieces_of(path: str | Path, tensors: Sequence[TensorSpec], strategy: Strategy, memory: Sequence[np.ndarray], rank: int) -> list[Piece]:
    """What a rank must copy out of a checkpoint, in the order of the files.

    Replicas are read by those who wrote them, or else spread over the readers.
    """
    checkpoint = Checkpoint(path)
    begins: dict[str, Mapping[str, int]] = {}
    pieces = []
    for tensor, local in zip(tensors, memory, strict=True):
        wanted = strategy.region(tensor, rank)
        for chunk in checkpoint[tensor.name].chunks:
            common = wanted.intersect(chunk.region)
            if common is None:
                continue
            mine = [place for place in chunk.places if place.rank == rank]
            place = mine[0] if mine else chunk.places[rank % len(chunk.places)]
            file = os.path.join(checkpoint.directory, place.file)
            if file not in begins:
                begins[file] = data_offsets(file)
            target = local[common.relative_to(wanted).slices]
            box = common.relative_to(chunk.region)
            pieces.append(_piece(file, begins[file][place.name], chunk.region.shape, box.offset, target))
    return sorted(pieces, key=lambda piece: (piece.file, piece.offset))


def data_offsets(file: str) -> dict[str, int]:
    """Where each tensor of a safetensors file begins, in bytes from the beginning of the file."""
    with open(file, "rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _piece(file: str, begin: int, stored: tuple[int, ...], offset: tuple[int, ...], target: np.ndarray) -> Piece:
    """One box of a stored tensor of one or two dimensions."""
    if target.ndim == 1:
        return Piece(file, begin + offset[0] * ITEM_BYTES, 0, target.view(np.uint8).reshape(1, -1))
    stride = stored[1] * ITEM_BYTES
    begin += offset[0] * stride + offset[1] * ITEM_BYTES
    if target.shape[1] == stored[1] and target.flags.c_contiguous:
        return Piece(file, begin, 0, target.reshape(-1).view(np.uint8).reshape(1, -1))
    return Piece(file, begin, stride, target.view(np.uint8))


class ReadCopy:
    """`preadv` straight into the destination: as many pieces of memory in a call as the kernel takes."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._calls: list[tuple[str, list[tuple[int, int, list[memoryview]]]]] = []
        scratch = memoryview(bytearray(GAP_BYTES))
        for file, group in groupby(pieces, key=lambda piece: piece.file):
            self._calls.append((file, list(_gathered(_runs(group), scratch))))

    def __call__(self) -> None:
        for file, calls in self._calls:
            descriptor = os.open(file, os.O_RDONLY)
            for offset, nbytes, targets in calls:
                _expect(os.preadv(descriptor, targets, offset), nbytes)
            os.close(descriptor)


class BufferedCopy:
    """`preadv` into a small buffer that stays in the cache, and from there into the destination."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._buffer = np.ones(BUFFER_BYTES, np.uint8)
        self._blocks: list[tuple[str, list[tuple[int, memoryview, list[tuple[np.ndarray, np.ndarray]]]]]] = []
        for file, group in groupby(pieces, key=lambda piece: piece.file):
            parts = sorted((part for piece in group for part in _parts(piece)), key=lambda part: part.offset)
            self._blocks.append((file, [self._block(block) for block in _blocks(parts)]))

    def _block(self, parts: Sequence[Piece]) -> tuple[int, memoryview, list[tuple[np.ndarray, np.ndarray]]]:
        begin = parts[0].offset
        copies = [(part.target, part.source(self._buffer, part.offset - begin)) for part in parts]
        return begin, memoryview(self._buffer)[: max(part.end for part in parts) - begin], copies

    def __call__(self) -> None:
        for file, blocks in self._blocks:
            descriptor = os.open(file, os.O_RDONLY)
            for offset, buffer, copies in blocks:
                _expect(os.preadv(descriptor, [buffer], offset), len(buffer))
                for target, source in copies:
                    target[...] = source
            os.close(descriptor)


class MappedCopy:
    """numpy copies out of the mapped file."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._files = [(file, list(group)) for file, group in groupby(pieces, key=lambda piece: piece.file)]

    def __call__(self) -> None:
        for file, pieces in self._files:
            descriptor = os.open(file, os.O_RDONLY)
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
                os.close(descriptor)
                for piece in pieces:
                    piece.target[...] = piece.source(mapped, piece.offset)


def _runs(pieces: Iterator[Piece]) -> list[tuple[int, memoryview]]:
    """Every row, in the order of the file."""
    rows = [(piece.offset + i * piece.stride, memoryview(row)) for piece in pieces for i, row in enumerate(piece.target)]
    return sorted(rows, key=lambda row: row[0])


def _gathered(runs: Sequence[tuple[int, memoryview]], scratch: memoryview) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Runs as calls: an offset, how many bytes, and where they go; what lies between two runs goes to a scratch buffer."""
    targets: list[memoryview] = []
    begin = end = 0
    for offset, target in runs:
        gap = offset - end
        if targets and (not 0 <= gap <= GAP_BYTES or len(targets) + 2 > MOST_PIECES or offset + len(target) - begin > MOST_BYTES):
            yield begin, end - begin, targets
            targets = []
        if not targets:
            begin = offset
        elif gap:
            targets.append(scratch[:gap])
        targets.append(target)
        end = offset + len(target)
    if targets:
        yield begin, end - begin, targets


def _parts(piece: Piece) -> Iterator[Piece]:
    """A piece in parts of which each fits into the buffer, gaps included."""
    rows, width = piece.target.shape
    if width > BUFFER_BYTES:
        for row in range(rows):
            for begin in range(0, width, BUFFER_BYTES):
                yield piece.rows(row, row + 1).columns(begin, min(begin + BUFFER_BYTES, width))
        return
    step = max(1, BUFFER_BYTES // max(piece.stride, width))
    for begin in range(0, rows, step):
        yield piece.rows(begin, min(begin + step, rows))


def _blocks(parts: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Parts that are read together: near each other, and within the buffer."""
    block: list[Piece] = []
    end = 0
    for part in parts:
        if block and (part.offset - end > GAP_BYTES or part.end - block[0].offset > BUFFER_BYTES):
            yield block
            block = []
        block.append(part)
        end = max(end, part.end) if len(block) > 1 else part.end
    if block:
        yield block


def _expect(done: int, promised: int) -> None:
    if done != promised:
        raise OSError(f"read {done} bytes of {promised}")
