"""A storage in memory: for tests, and for what never has to outlive the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from reshard.errors import NoSpaceError, ShortFileError, StorageError
from reshard.storage.storage import Entry, Lock, ReadableFile, WritableFile, scatter_by_reading


@dataclass(eq=False)
class FileNode:
    """A file: its bytes, and when they changed."""

    data: bytearray
    modified: float = field(default_factory=time.time)


@dataclass(eq=False)
class DirectoryNode:
    """A directory: what lies in it, by name."""

    children: dict[str, FileNode | DirectoryNode] = field(default_factory=dict)
    modified: float = field(default_factory=time.time)


def parts_of(path: str) -> list[str]:
    """The names along a path, from the top."""
    return [part for part in path.split("/") if part]


def _bytes_below(node: FileNode | DirectoryNode) -> int:
    return len(node.data) if isinstance(node, FileNode) else sum(_bytes_below(child) for child in node.children.values())


class _MemoryReadable:
    def __init__(self, path: str, file: FileNode) -> None:
        self.path = path
        self.size = len(file.data)
        self._file = file

    def read_into(self, offset: int, buffer: memoryview) -> None:
        target = buffer.cast("B") if buffer.nbytes else buffer
        found = memoryview(self._file.data)[offset : offset + target.nbytes]
        if found.nbytes < target.nbytes:
            raise ShortFileError(
                "the file ends before the bytes that should be in it",
                file=self.path,
                found=f"{len(self._file.data)} bytes",
                expected=f"{target.nbytes} bytes from offset {offset}",
            )
        target[:] = found

    def scatter(self, offset: int, pieces: np.ndarray, nbytes: int) -> None:
        scatter_by_reading(self, offset, pieces)

    def map(self, offset: int, nbytes: int) -> memoryview | None:
        copied = bytearray(nbytes)
        self.read_into(offset, memoryview(copied))
        return memoryview(copied).toreadonly()

    def close(self) -> None:
        return None

    def __enter__(self) -> _MemoryReadable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class MemoryWritable:
    """A new file that is being written."""

    def __init__(self, storage: MemoryStorage, path: str, file: FileNode) -> None:
        self.path = path
        self._storage = storage
        self._file = file

    def write_at(self, offset: int, data: memoryview) -> None:
        source = memoryview(data).cast("B") if data.nbytes else data
        end = offset + source.nbytes
        with self._storage._guard:
            if end > len(self._file.data):
                self._storage._claim(end - len(self._file.data), self.path)
                self._file.data.extend(bytes(end - len(self._file.data)))
            self._file.data[offset:end] = source
            self._file.modified = time.time()

    def sync(self) -> None:
        return None

    def close(self) -> None:
        return None

    def __enter__(self) -> MemoryWritable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _MemoryLock:
    def __init__(self, storage: MemoryStorage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._held = True

    def is_held(self) -> bool:
        with self._storage._guard:
            return self._held and self._storage._find(self._path) is not None

    def release(self) -> None:
        with self._storage._guard:
            if self._held:
                self._held = False
                del self._storage._locks[self._path]


class MemoryStorage:
    """Files in this process's memory. Any number of threads (simulated ranks) may use one.

    Args:
        capacity: bytes that all files together may hold; None for no limit. A file counts with its final size from its creation.
        can_exchange: whether `exchange` is possible; False to be like a network file system.
    """

    def __init__(self, *, capacity: int | None = None, can_exchange: bool = True) -> None:
        self.capacity = capacity
        self.can_exchange = can_exchange
        self._root = DirectoryNode()
        self._locks: dict[str, str] = {}
        self._guard = threading.RLock()

    def _find(self, path: str) -> FileNode | DirectoryNode | None:
        node: FileNode | DirectoryNode | None = self._root
        for part in parts_of(path):
            if not isinstance(node, DirectoryNode):
                return None
            node = node.children.get(part)
        return node

    def _parent(self, path: str, what: str) -> tuple[DirectoryNode, str]:
        parts = parts_of(path)
        if not parts:
            raise StorageError(what, file=path, found="the top of the storage")
        parent = self._find("/".join(parts[:-1]))
        if not isinstance(parent, DirectoryNode):
            raise StorageError(what, file=path, found="No such directory")
        return parent, parts[-1]

    def _claim(self, count: int, path: str) -> None:
        if self.capacity is not None and _bytes_below(self._root) + count > self.capacity:
            raise NoSpaceError(
                "can't write the file", file=path, found="No space left in this storage", fix="give the storage more capacity"
            )

    def stat(self, path: str) -> Entry | None:
        with self._guard:
            node = self._find(path)
            if node is None:
                return None
            return self._entry((parts_of(path) or [""])[-1], node)

    @staticmethod
    def _entry(name: str, node: FileNode | DirectoryNode) -> Entry:
        is_directory = isinstance(node, DirectoryNode)
        return Entry(name, is_directory, 0 if is_directory else len(node.data), node.modified)

    def list(self, path: str) -> Sequence[Entry]:
        with self._guard:
            node = self._find(path)
            if not isinstance(node, DirectoryNode):
                raise StorageError("can't list the directory", file=path, found="No such directory" if node is None else "a file")
            return [self._entry(name, node.children[name]) for name in sorted(node.children)]

    def links_out(self, path: str) -> Sequence[str]:
        return ()

    def open_read(self, path: str) -> ReadableFile:
        with self._guard:
            node = self._find(path)
            if not isinstance(node, FileNode):
                raise StorageError("can't open the file", file=path, found="No such file" if node is None else "a directory")
            return _MemoryReadable(path, node)

    def read_bytes(self, path: str) -> bytes:
        with self._guard, self.open_read(path) as file:
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
            return bytes(data)

    def create(self, path: str, size: int) -> WritableFile:
        with self._guard:
            parent, name = self._parent(path, "can't create the file")
            if name in parent.children:
                raise StorageError("can't create the file", file=path, found="File exists")
            self._claim(size, path)
            file = FileNode(bytearray(size))
            parent.children[name] = file
            return MemoryWritable(self, path, file)

    def write_bytes(self, path: str, data: bytes) -> None:
        with self.create(path, len(data)) as file:
            file.write_at(0, memoryview(data))
            file.sync()

    def make_directory(self, path: str) -> None:
        with self._guard:
            node: FileNode | DirectoryNode = self._root
            for part in parts_of(path):
                if not isinstance(node, DirectoryNode):
                    break
                node = node.children.setdefault(part, DirectoryNode())
            if not isinstance(node, DirectoryNode):
                raise StorageError("can't make the directory", file=path, found="a file is in the way")

    def sync_directory(self, path: str) -> None:
        with self._guard:
            if not isinstance(self._find(path), DirectoryNode):
                raise StorageError("can't make the directory durable", file=path, found="No such directory")

    def rename(self, source: str, target: str) -> None:
        with self._guard:
            self._move(source, target, f"can't rename to {target}", replace=False)

    def replace(self, source: str, target: str) -> None:
        with self._guard:
            what = f"can't put the file in the place of {target}"
            if isinstance(self._find(source), DirectoryNode) or isinstance(self._find(target), DirectoryNode):
                raise StorageError(what, file=source, found="Is a directory")
            self._move(source, target, what, replace=True)

    def _move(self, source: str, target: str, what: str, *, replace: bool) -> None:
        old_parent, old_name = self._parent(source, what)
        new_parent, new_name = self._parent(target, what)
        if old_name not in old_parent.children:
            raise StorageError(what, file=source, found="No such file or directory")
        if new_name in new_parent.children and not replace:
            raise StorageError(what, file=source, found="File exists")
        new_parent.children[new_name] = old_parent.children.pop(old_name)

    def exchange(self, first: str, second: str) -> bool:
        with self._guard:
            if not self.can_exchange:
                return False
            what = f"can't exchange with {second}"
            one_parent, one = self._parent(first, what)
            two_parent, two = self._parent(second, what)
            if one not in one_parent.children or two not in two_parent.children:
                raise StorageError(what, file=first, found="No such file or directory")
            one_parent.children[one], two_parent.children[two] = two_parent.children[two], one_parent.children[one]
            return True

    def remove(self, path: str) -> None:
        with self._guard:
            parent, name = self._parent(path, "can't remove the file")
            if not isinstance(parent.children.get(name), FileNode):
                raise StorageError("can't remove the file", file=path, found="a directory" if name in parent.children else "No such file")
            del parent.children[name]

    def remove_tree(self, path: str) -> None:
        with self._guard:
            node = self._find(path)
            if node is None:
                return
            if isinstance(node, FileNode):
                raise StorageError("can't remove the directory", file=path, found="a file")
            parent, name = self._parent(path, "can't remove the directory")
            del parent.children[name]

    def free_bytes(self, path: str) -> int | None:
        with self._guard:
            if not isinstance(self._find(path), DirectoryNode):
                raise StorageError("can't ask for free space", file=path, found="No such directory")
            return None if self.capacity is None else max(0, self.capacity - _bytes_below(self._root))

    def lock(self, path: str, owner: str) -> Lock | str:
        with self._guard:
            holder = self._locks.get(path)
            if holder is not None:
                return holder
            if self._find(path) is None:
                self.write_bytes(path, b"")
            self._locks[path] = owner
            return _MemoryLock(self, path)
