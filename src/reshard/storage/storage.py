"""The protocol of a storage, by what saving and loading need of it.

Paths are absolute strings with `/`. Every failure is a StorageError (NoSpaceError for a full one) that names the path and keeps the
operating system's words; a method that may find nothing says so by its return value.
"""

from __future__ import annotations

import ctypes
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np

join = posixpath.join


@dataclass(frozen=True, slots=True)
class Entry:
    """What a directory lists.

    Attributes:
        name: the last part of the path.
        is_directory: whether it is a directory (a symbolic link counts as what it leads to).
        size: bytes of a file; 0 for a directory.
        modified: seconds since the epoch.
    """

    name: str
    is_directory: bool
    size: int
    modified: float


class ReadableFile(Protocol):
    """An open file. Use from several threads is safe."""

    path: str
    size: int

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer (contiguous bytes) from an offset. Raises ShortFileError when the file ends before it is full."""
        ...

    def scatter(self, offset: int, pieces: np.ndarray, nbytes: int) -> None:
        """Fill several pieces of this process's memory with consecutive bytes, from an offset.

        For states of many small tensors, for which an object per piece costs more than the bytes.

        Args:
            offset: where the first piece's bytes begin in the file.
            pieces: (n, 2) of int64, n at most 1,024: the address of each piece and its bytes, more than none. Whoever calls vouches for
                them: they are written, whatever lies there.
            nbytes: of all pieces together: whoever calls knows it, and to sum it up takes longer than some reads.

        Raises:
            ShortFileError: the file ends before all are full.
        """
        ...

    def map(self, offset: int, nbytes: int) -> memoryview | None:
        """A read-only view of bytes of the file, of which only what is looked at is copied; None where there is no such view.

        The file's size is checked right before, and there is a view only where the file can't be cut short within the next seconds, which
        would kill the process: use it at once and let it go. Raises ShortFileError when the file ends before it.
        """
        ...

    def close(self) -> None:
        """Let go of the file; fine when it is closed.

        Raises:
            ShortFileError: it is shorter than when it was opened. A read at the moment in which a file is cut short may give zeros in the
                place of its bytes, and no error: this says so. The file is closed all the same.
        """
        ...

    def __enter__(self) -> ReadableFile: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """As `close`; that the file was cut short takes the place of an error that found its bytes wrong. Any other goes on as it is."""
        ...


def memory_at(address: int, nbytes: int) -> memoryview:
    """Memory of this process as writable bytes. Whoever calls vouches for it, and keeps it alive."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def scatter_by_reading(file: ReadableFile, offset: int, pieces: np.ndarray) -> None:
    """`ReadableFile.scatter`, for storages that have no call for it."""
    for address, nbytes in pieces.tolist():
        file.read_into(offset, memory_at(address, nbytes))
        offset += nbytes


class WritableFile(Protocol):
    """A new file that is being written; bytes never written are zero."""

    path: str

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all bytes of a contiguous buffer at an offset."""
        ...

    def sync(self) -> None:
        """Make what was written durable (data, not the name: that is `sync_directory`)."""
        ...

    def close(self) -> None:
        """Let go of the file; what wasn't synced may be lost."""
        ...

    def __enter__(self) -> WritableFile: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class Lock(Protocol):
    """A lock that is held. It ends with `release` or with the process, whichever is first."""

    def is_held(self) -> bool:
        """Whether it still keeps others out: not when its file was removed, nor in a forked child of the process that took it."""
        ...

    def release(self) -> None:
        """Give the lock back."""
        ...


class Storage(Protocol):
    """A place for files."""

    def stat(self, path: str) -> Entry | None:
        """What is there, or None."""
        ...

    def list(self, path: str) -> Sequence[Entry]:
        """What a directory holds, sorted by name. Raises StorageError when it isn't a directory."""
        ...

    def links_out(self, path: str) -> Sequence[str]:
        """The names in a directory that are symbolic links to what lies outside it, sorted; none where there are no such links."""
        ...

    def open_read(self, path: str) -> ReadableFile:
        """Open a file to read ranges of it."""
        ...

    def read_bytes(self, path: str) -> bytes:
        """A small file, whole."""
        ...

    def create(self, path: str, size: int) -> WritableFile:
        """A new file of this final size in bytes. Raises StorageError when the path exists."""
        ...

    def write_bytes(self, path: str, data: bytes) -> None:
        """A new small file, written and durable (data, not the name)."""
        ...

    def make_directory(self, path: str) -> None:
        """A directory with its parents; fine when it exists."""
        ...

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Give a file or directory another name, atomically. Raises StorageError when the target exists."""
        ...

    def replace(self, source: str, target: str) -> None:
        """Put a file in the place of another (or of none), atomically."""
        ...

    def exchange(self, first: str, second: str) -> bool:
        """Swap two directories in one atomic step; False (and nothing done) where that isn't possible."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file."""
        ...

    def remove_tree(self, path: str) -> None:
        """Remove a directory with all it holds (of a symbolic link the link only); fine when it is gone."""
        ...

    def free_bytes(self, path: str) -> int | None:
        """Bytes that can still be written below an existing directory, or None when that isn't known."""
        ...

    def lock(self, path: str, owner: str) -> Lock | str:
        """Take the lock of this name (a file, made if needed) for `owner`, or return who holds it."""
        ...
