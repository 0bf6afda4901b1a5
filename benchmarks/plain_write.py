"""The limits of a save: the same bytes written to the same number of files by the plainest loop there is, and copied in memory.

Nothing is planned, hashed or agreed while the time runs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reshard.format.names import EXTRA_DIRECTORY, kind_of_file, parse_rank_extra_file


@dataclass(frozen=True)
class PlainFile:
    """A file to write.

    Attributes:
        name: its path inside the checkpoint.
        begin: bytes before the tensors' (the header's).
        pieces: the tensors' memory, as bytes, in any order.
    """

    name: str
    begin: bytes
    pieces: tuple[np.ndarray, ...] = ()


def files_of(checkpoint: Path, memory: Sequence[np.ndarray], rank: int) -> list[PlainFile]:
    """What a rank must write to write as much as it did for a checkpoint of ours, in as many files.

    Args:
        checkpoint: one iteration, in which every rank has one data file, of all that it holds.
        memory: what the rank holds.
        rank: the rank; rank 0 also writes what is of the whole checkpoint.
    """
    pieces = tuple(local.reshape(-1).view(np.uint8) for local in memory)
    names = sorted(str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file())
    data = [name for name in names if kind_of_file(name) is not None]
    files = []
    for name in names:
        size = (checkpoint / name).stat().st_size
        if name in data:
            # Their numbers are the ranks'.
            if data.index(name) == rank:
                files.append(PlainFile(name, bytes(size - sum(piece.nbytes for piece in pieces)), pieces))
            continue
        writer = parse_rank_extra_file(os.path.basename(name)) if name.startswith(f"{EXTRA_DIRECTORY}/") else None
        if (0 if writer is None else writer) == rank:
            files.append(PlainFile(name, bytes(size)))
    return files


class PlainWrite:
    """Writes a rank's files, and makes them and their names durable as a save does.

    Args:
        files: what to write.
        is_first: whether this is rank 0, which makes the whole checkpoint's names durable, too.
    """

    def __init__(self, files: Sequence[PlainFile], is_first: bool) -> None:
        self._files = files
        self._is_first = is_first

    def __call__(self, directory: Path) -> None:
        """Write everything into a new directory."""
        extra = directory / EXTRA_DIRECTORY
        extra.mkdir(parents=True, exist_ok=True)
        for file in self._files:
            descriptor = os.open(directory / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                at = 0
                for piece in (file.begin, *file.pieces):
                    data, end = memoryview(piece), at + len(piece)
                    while at < end:
                        at += os.pwrite(descriptor, data[len(data) - (end - at) :], at)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        for path in (extra, directory):
            _sync(path)
        if self._is_first:
            # The ranks' names once more with those of rank 0, the directory's name, and the tracker's: each in its turn.
            for path in (extra, directory, directory.parent, directory.parent):
                _sync(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PlainCopy:
    """Copies tensors into one buffer that has been touched before, tensor by tensor.

    Args:
        memory: the tensors.

    Attributes:
        copied: the buffer.
    """

    def __init__(self, memory: Sequence[np.ndarray]) -> None:
        self._memory = memory  # holds what the addresses mean
        self.copied = np.empty(sum(local.nbytes for local in memory), np.uint8)
        self.copied[...] = 0xA5
        self._pieces = list(self._pieces_of(memory))

    def _pieces_of(self, memory: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int]]:
        at = self.copied.ctypes.data
        for local in memory:
            yield at, local.ctypes.data, local.nbytes
            at += local.nbytes

    def __call__(self) -> None:
        """Copy everything."""
        for target, source, nbytes in self._pieces:
            ctypes.memmove(target, source, nbytes)
