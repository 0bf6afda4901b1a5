"""Open files of the file system."""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from types import TracebackType

import numpy as np

from reshard.errors import DamagedCheckpointError, ShortFileError
from reshard.storage.storage import scatter_by_reading
from reshard.storage.system_calls import is_leased, lease, preadv
from reshard.storage.system_errors import Saying, storage_error


def _rest_of(pieces: np.ndarray, done: int) -> np.ndarray:
    """What is left of pieces when the first bytes of them are full."""
    ends = np.cumsum(pieces[:, 1])
    first = int(np.searchsorted(ends, done, "right"))
    rest = pieces[first:].copy()
    if len(rest):
        filled = done - (int(ends[first - 1]) if first else 0)
        rest[0] += (filled, -filled)
    return rest


class _Descriptor:
    """A file descriptor that closes once."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with Saying("can't close the file", self.path):
                os.close(descriptor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class PosixReadable(_Descriptor):
    """A file that is read.

    Args:
        path: the file.
        descriptor: of it, open; closed with this.
        size: its bytes now.
    """

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        super().__init__(path, descriptor)
        self.size = size
        # Whether the file is leased; None before it is asked for.
        self._is_leased: bool | None = None
        self._guard = threading.Lock()

    def _cannot_shrink(self) -> bool:
        """Whether nobody can cut the file short within the next seconds: a lease on it makes who wants to write wait, until it is closed.

        Once somebody waits, the answer is no: the system takes a lease away after a while (`fs.lease-break-time`, 45 s).
        """
        with self._guard:
            if self._is_leased is None:
                self._is_leased = lease(self._descriptor)
            elif self._is_leased:
                self._is_leased = is_leased(self._descriptor)
            return self._is_leased

    def read_into(self, offset: int, buffer: memoryview) -> None:
        rest = buffer.cast("B") if buffer.nbytes else buffer
        done = 0
        with Saying("can't read the file", self.path):
            while done < buffer.nbytes:
                count = os.preadv(self._descriptor, [rest[done:]], offset + done)
                if count == 0:
                    raise ShortFileError(
                        "the file ends before the bytes that should be in it",
                        file=self.path,
                        found=f"{max(0, offset + done)} bytes at most",
                        expected=f"{buffer.nbytes} bytes from offset {offset}",
                    )
                done += count

    def scatter(self, offset: int, pieces: np.ndarray, nbytes: int) -> None:
        call = preadv()
        if call is None:
            scatter_by_reading(self, offset, pieces)
            return
        # Not in `_Saying`, since there may be thousands of short reads.
        try:
            done = call(self._descriptor, pieces, offset)
            while 0 < done < nbytes:
                pieces = _rest_of(pieces, done)
                offset += done
                nbytes -= done
                done = call(self._descriptor, pieces, offset)
        except OSError as error:
            raise storage_error(error, "can't read the file", self.path) from error
        if done < nbytes:
            raise ShortFileError(
                "the file ends before the bytes that should be in it",
                file=self.path,
                found=f"{offset} bytes at most",
                expected=f"{nbytes} bytes from offset {offset}",
            )

    def map(self, offset: int, nbytes: int) -> memoryview | None:
        if not nbytes:
            return None
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        with Saying("can't map the file", self.path):
            # Before its size is looked at: what is cut off while it is copied would kill the process.
            if not self._cannot_shrink():
                return None
            size = os.fstat(self._descriptor).st_size
            if size < offset + nbytes:
                raise ShortFileError(
                    "the file ends before the bytes that should be in it",
                    file=self.path,
                    found=f"{size} bytes",
                    expected=f"{nbytes} bytes from offset {offset}",
                )
            try:
                window = mmap.mmap(self._descriptor, offset - begin + nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ, offset=begin)
            except OSError:
                return None  # some file systems can't map
            # What isn't in memory yet is asked for at once. To have all pages mapped now, too, costs more than the faults do, of which
            # each maps the pages around it.
            window.madvise(mmap.MADV_WILLNEED)
        # The mapping goes with the last view of it.
        return memoryview(window)[offset - begin :]

    def close(self) -> None:
        if self._descriptor < 0:
            return
        size = self.size
        try:
            # A network file system may have lost it by now: then what its reads said stands.
            with suppress(OSError):
                size = os.fstat(self._descriptor).st_size
        finally:
            super().close()
        if size < self.size:
            raise ShortFileError(
                "the file was cut short while it was read",
                file=self.path,
                found=f"{size} bytes",
                expected=f"{self.size} bytes, as when it was opened",
                fix="see what else writes there; then restore the file from a copy, or load another checkpoint",
            )

    def __enter__(self) -> PosixReadable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, DamagedCheckpointError):
            self.close()
        else:
            super().close()


class PosixWritable(_Descriptor):
    """A file that is written.

    Args:
        path: the file.
        descriptor: of it, open; closed with this.
    """

    def write_at(self, offset: int, data: memoryview) -> None:
        rest = memoryview(data).cast("B") if data.nbytes else data
        done = 0
        with Saying("can't write the file", self.path):
            while done < data.nbytes:
                done += os.pwrite(self._descriptor, rest[done:], offset + done)

    def sync(self) -> None:
        with Saying("can't make the file durable", self.path):
            os.fsync(self._descriptor)

    def __enter__(self) -> PosixWritable:
        return self
