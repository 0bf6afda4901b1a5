"""A storage that fails, or dies, at the k-th operation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import TypeVar

import numpy as np

from reshard.errors import ReshardError, StorageError
from reshard.storage import Entry, Lock, ReadableFile, Storage, WritableFile

T = TypeVar("T")


class SimulatedDeath(BaseException):
    """The process died here. A BaseException, since a dead process handles nothing."""


class FaultyStorage:
    """Another storage whose operations are counted, and one of which fails.

    Every call of a method of the storage, of its files and of its locks is an operation. One that fails is left half done where that is
    how it happens: a write has written its first half, the removal of a tree has removed half of it. A storage that died
    (`SimulatedDeath`) stays dead for every operation, and the locks that were taken through it are free again, as after a kill.

    Args:
        inner: what does the work.
        fail_at: the number of the operation that fails, counted from 1; None for none (to count them).
        error: what it raises: an error, or the class of one.
        operations: the names of the operations that count (`write_at`, `rename`, …); None for all.
        lasting: whether every counted operation from that one on fails, as on a disk that broke; else only that one.
        after: whether it does its work before it fails, as when a network loses the answer.

    Attributes:
        count: the operations so far.
        log: their names and paths.
        failed: the name and path of the operation that failed first, or None.
    """

    def __init__(
        self,
        inner: Storage,
        *,
        fail_at: int | None = None,
        error: BaseException | type[BaseException] = StorageError,
        operations: Collection[str] | None = None,
        lasting: bool = False,
        after: bool = False,
    ) -> None:
        self.inner = inner
        self.count = 0
        self.log: list[tuple[str, str]] = []
        self.failed: tuple[str, str] | None = None
        self._fail_at = fail_at
        self._error = error
        self._operations = None if operations is None else frozenset(operations)
        self._lasting = lasting
        self._after = after
        self._guard = threading.Lock()
        self._locks: list[Lock] = []

    def _raises(self, name: str, path: str) -> BaseException | None:
        """Count an operation; the error that it must raise, or None."""
        with self._guard:
            if self.failed is not None and self._is_death:
                return SimulatedDeath(f"dead since {self.failed[0]} of {self.failed[1]}")
            if self._operations is not None and name not in self._operations:
                return None
            self.count += 1
            self.log.append((name, path))
            if self._fail_at is None or self.count < self._fail_at or (self.count > self._fail_at and not self._lasting):
                return None
            self.failed = self.failed or (name, path)
            return self._make(name, path)

    @property
    def _is_death(self) -> bool:
        kind = self._error if isinstance(self._error, type) else type(self._error)
        return issubclass(kind, SimulatedDeath)

    def _make(self, name: str, path: str) -> BaseException:
        if not isinstance(self._error, type):
            return self._error
        text = f"simulated failure of operation {self.count}, {name}"
        return self._error(text, file=path) if issubclass(self._error, ReshardError) else self._error(f"{text} of {path}")

    def _do(self, name: str, path: str, work: Callable[[], T], torn: Callable[[], object] | None = None) -> T:
        error = self._raises(name, path)
        if error is None:
            return work()
        if self._after:
            result = work()
            if isinstance(result, _FaultyLock):  # nobody has it, nobody could release it
                result.let_go()
        elif torn is not None:
            torn()
        if isinstance(error, SimulatedDeath):
            while self._locks:
                self._locks.pop().release()
        raise error

    def stat(self, path: str) -> Entry | None:
        return self._do("stat", path, lambda: self.inner.stat(path))

    def list(self, path: str) -> Sequence[Entry]:
        return self._do("list", path, lambda: self.inner.list(path))

    def links_out(self, path: str) -> Sequence[str]:
        return self._do("links_out", path, lambda: self.inner.links_out(path))

    def open_read(self, path: str) -> ReadableFile:
        return self._do("open_read", path, lambda: _FaultyReadable(self, self.inner.open_read(path)))

    def read_bytes(self, path: str) -> bytes:
        return self._do("read_bytes", path, lambda: self.inner.read_bytes(path))

    def create(self, path: str, size: int) -> WritableFile:
        return self._do("create", path, lambda: _FaultyWritable(self, self.inner.create(path, size)))

    def write_bytes(self, path: str, data: bytes) -> None:
        self._do(
            "write_bytes", path, lambda: self.inner.write_bytes(path, data), lambda: self.inner.write_bytes(path, data[: len(data) // 2])
        )

    def make_directory(self, path: str) -> None:
        self._do("make_directory", path, lambda: self.inner.make_directory(path))

    def sync_directory(self, path: str) -> None:
        self._do("sync_directory", path, lambda: self.inner.sync_directory(path))

    def rename(self, source: str, target: str) -> None:
        self._do("rename", source, lambda: self.inner.rename(source, target))

    def replace(self, source: str, target: str) -> None:
        self._do("replace", source, lambda: self.inner.replace(source, target))

    def exchange(self, first: str, second: str) -> bool:
        return self._do("exchange", first, lambda: self.inner.exchange(first, second))

    def remove(self, path: str) -> None:
        self._do("remove", path, lambda: self.inner.remove(path))

    def remove_tree(self, path: str) -> None:
        self._do("remove_tree", path, lambda: self.inner.remove_tree(path), lambda: self._remove_half(path))

    def _remove_half(self, path: str) -> None:
        if self.inner.stat(path) is None:
            return
        entries = self.inner.list(path)
        for entry in entries[: (len(entries) + 1) // 2]:
            child = f"{path}/{entry.name}"
            if entry.is_directory:
                self.inner.remove_tree(child)
            else:
                self.inner.remove(child)

    def free_bytes(self, path: str) -> int | None:
        return self._do("free_bytes", path, lambda: self.inner.free_bytes(path))

    def lock(self, path: str, owner: str) -> Lock | str:
        def work() -> Lock | str:
            result = self.inner.lock(path, owner)
            if isinstance(result, str):
                return result
            with self._guard:
                self._locks.append(result)
            return _FaultyLock(self, path, result)

        return self._do("lock", path, work)


class _FaultyReadable:
    def __init__(self, storage: FaultyStorage, inner: ReadableFile) -> None:
        self.path = inner.path
        self.size = inner.size
        self._storage = storage
        self._inner = inner

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._storage._do("read_into", self.path, lambda: self._inner.read_into(offset, buffer))

    def scatter(self, offset: int, pieces: np.ndarray, nbytes: int) -> None:
        self._storage._do("scatter", self.path, lambda: self._inner.scatter(offset, pieces, nbytes))

    def map(self, offset: int, nbytes: int) -> memoryview | None:
        return self._storage._do("map", self.path, lambda: self._inner.map(offset, nbytes))

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> _FaultyReadable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._inner.__exit__(kind, error, trace)


class _FaultyWritable:
    def __init__(self, storage: FaultyStorage, inner: WritableFile) -> None:
        self.path = inner.path
        self._storage = storage
        self._inner = inner

    def write_at(self, offset: int, data: memoryview) -> None:
        def torn() -> None:
            # The kernel may have written any part of it; half of it is the least like either end.
            if data.nbytes:
                self._inner.write_at(offset, data.cast("B")[: data.nbytes // 2])

        self._storage._do("write_at", self.path, lambda: self._inner.write_at(offset, data), torn)

    def sync(self) -> None:
        self._storage._do("sync", self.path, self._inner.sync)

    def close(self) -> None:
        # A descriptor is gone after `close`, whatever it answers.
        try:
            self._storage._do("close", self.path, lambda: None)
        finally:
            self._inner.close()

    def __enter__(self) -> _FaultyWritable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self._inner.close()


class _FaultyLock:
    def __init__(self, storage: FaultyStorage, path: str, inner: Lock) -> None:
        self._storage = storage
        self._path = path
        self._inner = inner

    def is_held(self) -> bool:
        return self._storage._do("is_held", self._path, self._inner.is_held)

    def let_go(self) -> None:
        with self._storage._guard:
            if self._inner in self._storage._locks:
                self._storage._locks.remove(self._inner)
        self._inner.release()

    def release(self) -> None:
        # As with a file: the system lets go of it, whatever it answers.
        self.let_go()
        self._storage._do("release", self._path, lambda: None)
