"""The file system, as a storage.

Works on any POSIX file system that has `flock`; uses `renameat2` where the kernel and the file system offer it (Linux: ext4, xfs, btrfs,
tmpfs) and ordinary renames elsewhere (NFS, Lustre, other systems).
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import stat as modes
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import numpy as np

from reshard.errors import NoSpaceError, ReshardError, ShortFileError, StorageError
from reshard.storage.storage import Entry, Lock, ReadableFile, WritableFile, scatter_by_reading
from reshard.storage.system_calls import RENAME_EXCHANGE, RENAME_NOREPLACE, UNSUPPORTED, is_leased, lease, preadv, rename2

_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FIXES = {
    errno.EACCES: "give the user that runs this the right to read and write there, or choose another directory",
    errno.EPERM: "give the user that runs this the right to read and write there, or choose another directory",
    errno.EROFS: "the file system is mounted read-only: choose another directory",
    errno.EIO: "the device reports an input/output error: look at the system's log",
    errno.ESTALE: "the network file system lost the file: look at the server, then try again",
    errno.ENOSPC: "free some space there, or choose another directory",
    errno.EDQUOT: "the quota is used up: free some space there, or choose another directory",
}


def storage_error(error: OSError, what: str, path: str) -> ReshardError:
    """What the operating system said, as an error of the tree.

    Args:
        error: its words.
        what: what was tried, without the path ("can't create the file").
        path: what it was tried on.
    """
    kind = NoSpaceError if error.errno in _FULL else StorageError
    fix = _FIXES.get(error.errno) if error.errno is not None else None
    return kind(what, file=path, found=error.strerror or str(error), fix=fix)


class _Saying:
    """Errors of the system become errors of the storage. Around each read, for which a generator would cost more than the read may."""

    __slots__ = ("_path", "_what")

    def __init__(self, what: str, path: str) -> None:
        self._what, self._path = what, path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, OSError):
            raise storage_error(error, self._what, self._path) from error


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
            with _Saying("can't close the file", self.path):
                os.close(descriptor)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _PosixReadable(_Descriptor):
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
        with _Saying("can't read the file", self.path):
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
        with _Saying("can't map the file", self.path):
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

    def __enter__(self) -> _PosixReadable:
        return self


class _PosixWritable(_Descriptor):
    def write_at(self, offset: int, data: memoryview) -> None:
        rest = memoryview(data).cast("B") if data.nbytes else data
        done = 0
        with _Saying("can't write the file", self.path):
            while done < data.nbytes:
                done += os.pwrite(self._descriptor, rest[done:], offset + done)

    def sync(self) -> None:
        with _Saying("can't make the file durable", self.path):
            os.fsync(self._descriptor)

    def __enter__(self) -> _PosixWritable:
        return self


class _PosixLock:
    """A held `flock`.

    The lock belongs to the open file: a forked child (a data loader's worker) would keep it alive after its parent's death, so the child
    closes its copy at once.
    """

    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        find = weakref.WeakMethod(self._close)

        def in_child() -> None:
            method = find()
            if method is not None:
                method()

        os.register_at_fork(after_in_child=in_child)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def is_held(self) -> bool:
        if self._descriptor < 0:
            return False
        with _Saying("can't look at the lock file", self._path):
            return _is_still(self._path, self._descriptor)

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two processes lock two files of one name."""
        if self._descriptor >= 0:
            with suppress(OSError):  # who held it is a courtesy
                os.ftruncate(self._descriptor, 0)
        self._close()

    def __del__(self) -> None:
        self._close()


def _entry(name: str, status: os.stat_result) -> Entry:
    is_directory = modes.S_ISDIR(status.st_mode)
    return Entry(name, is_directory, 0 if is_directory else status.st_size, status.st_mtime)


class PosixStorage:
    """The file system of this machine, or a network file system mounted on it. File modes follow the umask."""

    def stat(self, path: str) -> Entry | None:
        try:
            return _entry(os.path.basename(path), os.stat(path))
        except _NOT_THERE:
            return None
        except OSError as error:
            raise storage_error(error, "can't look at the path", path) from error

    def list(self, path: str) -> Sequence[Entry]:
        entries = []
        with _Saying("can't list the directory", path), os.scandir(path) as scan:
            for item in scan:
                with suppress(*_NOT_THERE):  # removed since, or a symbolic link that leads nowhere
                    entries.append(_entry(item.name, _status(item)))
        return sorted(entries, key=lambda entry: entry.name)

    def links_out(self, path: str) -> Sequence[str]:
        with _Saying("can't list the directory", path), os.scandir(path) as scan:
            links = sorted(item.name for item in scan if item.is_symlink())
        inside = os.path.join(os.path.realpath(path), "") if links else ""
        return [name for name in links if not os.path.realpath(os.path.join(path, name)).startswith(inside)]

    def open_read(self, path: str) -> ReadableFile:
        with _Saying("can't open the file", path):
            # Without waiting: a named pipe in the place of a file would hold the process for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(descriptor)
        if not modes.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise StorageError("not a file", file=path, found="a directory" if modes.S_ISDIR(status.st_mode) else "a device or a pipe")
        return _PosixReadable(path, descriptor, status.st_size)

    def read_bytes(self, path: str) -> bytes:
        with self.open_read(path) as file:
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
        return bytes(data)

    def create(self, path: str, size: int) -> WritableFile:
        with _Saying("can't create the file", path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                # Only the size: `posix_fallocate` would write zeros over the whole file where the file system can't reserve.
                os.ftruncate(descriptor, size)
            except BaseException:
                os.close(descriptor)
                raise
        return _PosixWritable(path, descriptor)

    def write_bytes(self, path: str, data: bytes) -> None:
        with self.create(path, len(data)) as file:
            file.write_at(0, memoryview(data))
            file.sync()

    def make_directory(self, path: str) -> None:
        with _Saying("can't make the directory", path):
            os.makedirs(path, exist_ok=True)

    def sync_directory(self, path: str) -> None:
        with _Saying("can't make the directory durable", path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            except OSError as error:
                # File systems that keep names durable by themselves (some network ones) refuse to sync a directory.
                if error.errno not in UNSUPPORTED:
                    raise
            finally:
                os.close(descriptor)

    def rename(self, source: str, target: str) -> None:
        with _Saying(f"can't rename to {target}", source):
            if rename2(source, target, RENAME_NOREPLACE):
                return
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(source, target)

    def replace(self, source: str, target: str) -> None:
        with _Saying(f"can't put the file in the place of {target}", source):
            os.replace(source, target)

    def exchange(self, first: str, second: str) -> bool:
        with _Saying(f"can't exchange with {second}", first):
            return rename2(first, second, RENAME_EXCHANGE)

    def remove(self, path: str) -> None:
        with _Saying("can't remove the file", path):
            os.unlink(path)

    def remove_tree(self, path: str) -> None:
        with _Saying("can't remove the directory", path):
            try:
                if os.path.islink(path):
                    # What it leads to lies elsewhere, and was put there by someone else.
                    os.unlink(path)
                else:
                    shutil.rmtree(path)
            except FileNotFoundError:
                if os.path.lexists(path):
                    raise

    def free_bytes(self, path: str) -> int | None:
        with _Saying("can't ask for free space", path):
            status = os.statvfs(path)
        # Some network file systems don't know their size and say 0 for everything.
        return status.f_bavail * status.f_frsize if status.f_blocks else None

    def lock(self, path: str, owner: str) -> Lock | str:
        while True:
            with _Saying("can't open the lock file", path):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_still(path, descriptor):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, owner.encode(), 0)
                    return _PosixLock(path, descriptor)
            except BlockingIOError:
                holder = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
                os.close(descriptor)
                return holder or "a process that has not said who it is"
            except OSError as error:
                os.close(descriptor)
                failure = storage_error(error, "can't lock the file", path)
                if error.errno in UNSUPPORTED or error.errno == errno.ENOLCK:
                    failure = StorageError(failure.what, file=path, found=failure.found, fix="mount the file system with `flock` support")
                raise failure from error
            # Someone removed the file between open and lock: a lock on it excludes nobody.
            os.close(descriptor)


def _status(item: os.DirEntry[str]) -> os.stat_result:
    """Of what a link leads to; of the link itself where that can't be looked at (a loop, a directory of somebody else)."""
    try:
        return item.stat()
    except _NOT_THERE:
        raise
    except OSError:
        return item.stat(follow_symlinks=False)


def _is_still(path: str, descriptor: int) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
