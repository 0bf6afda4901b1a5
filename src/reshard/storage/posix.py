"""The file system, as a storage.

Works on any POSIX file system that has `flock`; uses `renameat2` where the kernel and the file system offer it (Linux: ext4, xfs, btrfs,
tmpfs) and ordinary renames elsewhere (NFS, Lustre, other systems).
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat as modes
import weakref
from collections.abc import Sequence
from contextlib import suppress

from reshard.errors import StorageError
from reshard.storage.posix_files import PosixReadable, PosixWritable
from reshard.storage.storage import Entry, Lock, ReadableFile, WritableFile
from reshard.storage.system_calls import RENAME_EXCHANGE, RENAME_NOREPLACE, UNSUPPORTED, rename2
from reshard.storage.system_errors import Saying, storage_error

_NOT_THERE = (FileNotFoundError, NotADirectoryError)


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
        with Saying("can't look at the lock file", self._path):
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
        with Saying("can't list the directory", path), os.scandir(path) as scan:
            for item in scan:
                with suppress(*_NOT_THERE):  # removed since, or a symbolic link that leads nowhere
                    entries.append(_entry(item.name, _status(item)))
        return sorted(entries, key=lambda entry: entry.name)

    def links_out(self, path: str) -> Sequence[str]:
        with Saying("can't list the directory", path), os.scandir(path) as scan:
            links = sorted(item.name for item in scan if item.is_symlink())
        inside = os.path.join(os.path.realpath(path), "") if links else ""
        return [name for name in links if not os.path.realpath(os.path.join(path, name)).startswith(inside)]

    def open_read(self, path: str) -> ReadableFile:
        with Saying("can't open the file", path):
            # Without waiting: a named pipe in the place of a file would hold the process for ever.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            status = os.fstat(descriptor)
        if not modes.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise StorageError("not a file", file=path, found="a directory" if modes.S_ISDIR(status.st_mode) else "a device or a pipe")
        return PosixReadable(path, descriptor, status.st_size)

    def read_bytes(self, path: str) -> bytes:
        with self.open_read(path) as file:
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
        return bytes(data)

    def create(self, path: str, size: int) -> WritableFile:
        with Saying("can't create the file", path):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                # Only the size: `posix_fallocate` would write zeros over the whole file where the file system can't reserve.
                os.ftruncate(descriptor, size)
            except BaseException:
                os.close(descriptor)
                raise
        return PosixWritable(path, descriptor)

    def write_bytes(self, path: str, data: bytes) -> None:
        with self.create(path, len(data)) as file:
            file.write_at(0, memoryview(data))
            file.sync()

    def make_directory(self, path: str) -> None:
        with Saying("can't make the directory", path):
            os.makedirs(path, exist_ok=True)

    def sync_directory(self, path: str) -> None:
        with Saying("can't make the directory durable", path):
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
        with Saying(f"can't rename to {target}", source):
            if rename2(source, target, RENAME_NOREPLACE):
                return
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(source, target)

    def replace(self, source: str, target: str) -> None:
        with Saying(f"can't put the file in the place of {target}", source):
            os.replace(source, target)

    def exchange(self, first: str, second: str) -> bool:
        with Saying(f"can't exchange with {second}", first):
            return rename2(first, second, RENAME_EXCHANGE)

    def remove(self, path: str) -> None:
        with Saying("can't remove the file", path):
            os.unlink(path)

    def remove_tree(self, path: str) -> None:
        with Saying("can't remove the directory", path):
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
        with Saying("can't ask for free space", path):
            status = os.statvfs(path)
        # Some network file systems don't know their size and say 0 for everything.
        return status.f_bavail * status.f_frsize if status.f_blocks else None

    def lock(self, path: str, owner: str) -> Lock | str:
        while True:
            with Saying("can't open the lock file", path):
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
