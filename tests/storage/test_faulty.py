"""The faults that the fault tests rely on."""

from __future__ import annotations

import errno

import pytest

from reshard.errors import NoSpaceError, StorageError
from reshard.storage import MemoryStorage
from reshard.testing import FaultyStorage, SimulatedDeath


def test_operations_are_counted():
    storage = FaultyStorage(MemoryStorage())
    storage.make_directory("/d")
    with storage.create("/d/f", 1) as file:
        file.write_at(0, memoryview(b"x"))
        file.sync()
    storage.rename("/d", "/e")
    assert storage.log == [
        ("make_directory", "/d"),
        ("create", "/d/f"),
        ("write_at", "/d/f"),
        ("sync", "/d/f"),
        ("close", "/d/f"),
        ("rename", "/d"),
    ]
    assert (storage.count, storage.failed) == (6, None)


@pytest.mark.parametrize("error", [NoSpaceError, StorageError, OSError(errno.EIO, "Input/output error")])
def test_one_operation_fails_and_the_next_works(error):
    storage = FaultyStorage(MemoryStorage(), fail_at=2, error=error)
    storage.make_directory("/a")
    with pytest.raises(error if isinstance(error, type) else OSError):
        storage.make_directory("/b")
    storage.make_directory("/c")
    assert storage.failed == ("make_directory", "/b")
    assert [entry.name for entry in storage.inner.list("/")] == ["a", "c"]


def test_a_broken_disk_stays_broken():
    storage = FaultyStorage(MemoryStorage(), fail_at=2, lasting=True)
    storage.make_directory("/a")
    for _ in range(3):
        with pytest.raises(StorageError, match="simulated"):
            storage.make_directory("/b")


def test_only_named_operations_count():
    storage = FaultyStorage(MemoryStorage(), fail_at=1, operations={"rename"})
    storage.make_directory("/a")
    with pytest.raises(StorageError):
        storage.rename("/a", "/b")
    assert storage.count == 1
    assert storage.inner.stat("/a") is not None


def test_an_operation_may_fail_after_its_work():
    storage = FaultyStorage(MemoryStorage(), fail_at=1, after=True)
    with pytest.raises(StorageError):
        storage.make_directory("/a")
    assert storage.inner.stat("/a") is not None


def test_a_failed_write_is_torn():
    storage = FaultyStorage(MemoryStorage(), fail_at=2, error=NoSpaceError)
    file = storage.create("/f", 4)
    with pytest.raises(NoSpaceError):
        file.write_at(0, memoryview(b"abcd"))
    assert storage.inner.read_bytes("/f") == b"ab\0\0"
    storage = FaultyStorage(MemoryStorage(), fail_at=1)
    with pytest.raises(StorageError):
        storage.write_bytes("/g", b"abcd")
    assert storage.inner.read_bytes("/g") == b"ab"


def test_a_failed_removal_has_removed_half():
    inner = MemoryStorage()
    inner.make_directory("/d/deep")
    for name in ("one", "two", "three"):
        inner.write_bytes(f"/d/{name}", b"")
    with pytest.raises(StorageError):
        FaultyStorage(inner, fail_at=1).remove_tree("/d")
    assert [entry.name for entry in inner.list("/d")] == ["three", "two"]


def test_the_dead_do_nothing_and_hold_no_lock():
    inner = MemoryStorage()
    storage = FaultyStorage(inner, fail_at=2, error=SimulatedDeath)
    assert not isinstance(storage.lock("/lock", "me"), str)
    with pytest.raises(SimulatedDeath):
        storage.make_directory("/a")
    with pytest.raises(SimulatedDeath):
        storage.stat("/a")
    lock = inner.lock("/lock", "the next")
    assert not isinstance(lock, str)
    assert inner.stat("/a") is None


def test_no_handler_of_errors_catches_death():
    assert not issubclass(SimulatedDeath, Exception)
