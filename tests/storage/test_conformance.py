"""What every storage must do, whatever lies behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest

from reshard.errors import NoSpaceError, StorageError
from reshard.storage import MemoryStorage, PosixStorage, Storage
from reshard.testing.faulty import FaultyStorage


@dataclass(frozen=True)
class Place:
    """A storage and an existing directory in it."""

    storage: Storage
    root: str


def posix(tmp_path) -> Place:
    return Place(PosixStorage(), str(tmp_path))


def memory(tmp_path) -> Place:
    storage = MemoryStorage()
    storage.make_directory("/a/root")
    return Place(storage, "/a/root")


def faulty(tmp_path) -> Place:
    return Place(FaultyStorage(PosixStorage()), str(tmp_path))


@pytest.fixture(params=[posix, memory, faulty], ids=lambda make: make.__name__)
def place(request, tmp_path) -> Place:
    make: Callable[..., Place] = request.param
    return make(tmp_path)


def test_written_bytes_come_back(place):
    path = f"{place.root}/file"
    place.storage.write_bytes(path, b"hello")
    assert place.storage.read_bytes(path) == b"hello"
    entry = place.storage.stat(path)
    assert entry is not None
    assert (entry.name, entry.is_directory, entry.size) == ("file", False, 5)
    assert entry.modified > 1e9


def test_an_empty_file(place):
    place.storage.write_bytes(f"{place.root}/empty", b"")
    assert place.storage.read_bytes(f"{place.root}/empty") == b""
    with place.storage.create(f"{place.root}/none", 0) as file:
        file.write_at(0, memoryview(b""))
        file.sync()
    assert place.storage.read_bytes(f"{place.root}/none") == b""


def test_bytes_that_were_never_written_are_zero(place):
    path = f"{place.root}/file"
    with place.storage.create(path, 10) as file:
        file.write_at(6, memoryview(b"bc"))
        file.write_at(2, memoryview(b"a"))
        file.sync()
    assert place.storage.read_bytes(path) == b"\0\0a\0\0\0bc\0\0"


def test_writing_takes_any_contiguous_buffer(place):
    import numpy as np

    path = f"{place.root}/file"
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    with place.storage.create(path, 12) as file:
        file.write_at(0, memoryview(array))
    assert place.storage.read_bytes(path) == array.tobytes()


def test_a_range_is_read_into_a_buffer(place):
    path = f"{place.root}/file"
    place.storage.write_bytes(path, bytes(range(100)))
    buffer = bytearray(b"\xff" * 12)
    with place.storage.open_read(path) as file:
        assert (file.path, file.size) == (path, 100)
        file.read_into(40, memoryview(buffer)[1:11])
        file.read_into(100, memoryview(bytearray()))
    assert buffer == b"\xff" + bytes(range(40, 50)) + b"\xff"


def test_a_read_beyond_the_end_says_how_much_there_is(place):
    path = f"{place.root}/file"
    place.storage.write_bytes(path, b"12345")
    with place.storage.open_read(path) as file, pytest.raises(StorageError, match="ends before") as caught:
        file.read_into(3, memoryview(bytearray(3)))
    assert caught.value.file == path
    assert "5 bytes" in str(caught.value.found)


def test_a_mapped_window_shows_the_bytes_and_is_checked_against_the_size(place):
    path = f"{place.root}/file"
    data = bytes(range(256)) * 40
    place.storage.write_bytes(path, data)
    with place.storage.open_read(path) as file:
        for offset, nbytes in ((0, 1), (0, len(data)), (4095, 3), (5000, 4096), (len(data) - 1, 1)):
            window = file.map(offset, nbytes)
            assert window is None or bytes(window) == data[offset : offset + nbytes]
            assert window is None or window.readonly
        if file.map(0, 1) is not None:
            with pytest.raises(StorageError, match="ends before"):
                file.map(len(data) - 1, 2)


def test_one_open_file_serves_many_threads(place):
    path = f"{place.root}/file"
    data = bytes(range(256)) * 64
    place.storage.write_bytes(path, data)
    wrong = []
    with place.storage.open_read(path) as file:

        def read(start: int) -> None:
            for offset in range(start, len(data) - 64, 1024):
                buffer = bytearray(64)
                file.read_into(offset, memoryview(buffer))
                if bytes(buffer) != data[offset : offset + 64]:
                    wrong.append(offset)

        threads = [threading.Thread(target=read, args=(start,)) for start in range(0, 800, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_nothing_is_there(place):
    missing = f"{place.root}/missing"
    assert place.storage.stat(missing) is None
    assert place.storage.stat(f"{missing}/deeper") is None
    storage = place.storage
    for refuse in (storage.list, storage.open_read, storage.read_bytes, storage.remove, storage.sync_directory):
        with pytest.raises(StorageError) as caught:
            refuse(missing)
        assert caught.value.file == missing


def test_a_file_is_no_directory_and_a_directory_no_file(place):
    place.storage.write_bytes(f"{place.root}/file", b"x")
    place.storage.make_directory(f"{place.root}/directory")
    for refuse, path in (
        (place.storage.list, "file"),
        (place.storage.remove_tree, "file"),
        (place.storage.make_directory, "file"),
        (place.storage.make_directory, "file/below"),
        (place.storage.open_read, "directory"),
        (place.storage.remove, "directory"),
    ):
        with pytest.raises(StorageError):
            refuse(f"{place.root}/{path}")
    assert place.storage.stat(f"{place.root}/file/below") is None


def test_a_new_file_never_takes_the_place_of_another(place):
    path = f"{place.root}/file"
    place.storage.write_bytes(path, b"first")
    with pytest.raises(StorageError, match="exists"):
        place.storage.create(path, 3)
    with pytest.raises(StorageError, match="exists"):
        place.storage.write_bytes(path, b"second")
    assert place.storage.read_bytes(path) == b"first"


def test_a_file_needs_a_directory(place):
    with pytest.raises(StorageError):
        place.storage.write_bytes(f"{place.root}/no/file", b"x")


def test_directories_are_made_with_their_parents_and_twice(place):
    deep = f"{place.root}/a/b/c"
    place.storage.make_directory(deep)
    place.storage.make_directory(deep)
    entry = place.storage.stat(deep)
    assert entry is not None
    assert (entry.name, entry.is_directory, entry.size) == ("c", True, 0)
    place.storage.sync_directory(deep)


def test_a_listing_is_sorted_and_whole(place):
    for name in ("b", "a.x", "a"):
        place.storage.write_bytes(f"{place.root}/{name}", name.encode())
    place.storage.make_directory(f"{place.root}/a-directory")
    found = [(e.name, e.is_directory, e.size) for e in place.storage.list(place.root)]
    assert found == [("a", False, 1), ("a-directory", True, 0), ("a.x", False, 3), ("b", False, 1)]


def test_a_directory_is_renamed_with_what_it_holds(place):
    place.storage.make_directory(f"{place.root}/old/deep")
    place.storage.write_bytes(f"{place.root}/old/deep/file", b"x")
    place.storage.rename(f"{place.root}/old", f"{place.root}/new")
    assert place.storage.stat(f"{place.root}/old") is None
    assert place.storage.read_bytes(f"{place.root}/new/deep/file") == b"x"


@pytest.mark.parametrize("target", ["file", "empty-directory", "full-directory"])
def test_a_rename_refuses_a_name_that_is_taken(place, target):
    place.storage.make_directory(f"{place.root}/source")
    place.storage.make_directory(f"{place.root}/empty-directory")
    place.storage.make_directory(f"{place.root}/full-directory/x")
    place.storage.write_bytes(f"{place.root}/file", b"x")
    with pytest.raises(StorageError):
        place.storage.rename(f"{place.root}/source", f"{place.root}/{target}")
    assert place.storage.stat(f"{place.root}/source") is not None


def test_a_rename_needs_a_source(place):
    with pytest.raises(StorageError):
        place.storage.rename(f"{place.root}/none", f"{place.root}/new")


def test_a_file_is_replaced(place):
    place.storage.write_bytes(f"{place.root}/new", b"new")
    place.storage.replace(f"{place.root}/new", f"{place.root}/target")
    place.storage.write_bytes(f"{place.root}/newer", b"newer")
    place.storage.replace(f"{place.root}/newer", f"{place.root}/target")
    assert [entry.name for entry in place.storage.list(place.root)] == ["target"]
    assert place.storage.read_bytes(f"{place.root}/target") == b"newer"


def test_a_replacement_needs_a_source_and_spares_directories(place):
    place.storage.make_directory(f"{place.root}/directory")
    place.storage.write_bytes(f"{place.root}/file", b"x")
    with pytest.raises(StorageError):
        place.storage.replace(f"{place.root}/none", f"{place.root}/file")
    with pytest.raises(StorageError):
        place.storage.replace(f"{place.root}/file", f"{place.root}/directory")
    assert place.storage.read_bytes(f"{place.root}/file") == b"x"


def test_directories_are_exchanged_or_left_alone(place):
    for name in ("a", "b"):
        place.storage.make_directory(f"{place.root}/{name}")
        place.storage.write_bytes(f"{place.root}/{name}/file", name.encode())
    done = place.storage.exchange(f"{place.root}/a", f"{place.root}/b")
    first, second = (place.storage.read_bytes(f"{place.root}/{name}/file") for name in ("a", "b"))
    assert (first, second) == ((b"b", b"a") if done else (b"a", b"b"))


def test_an_exchange_needs_both(place):
    place.storage.make_directory(f"{place.root}/a")
    with suppress(StorageError):
        assert place.storage.exchange(f"{place.root}/a", f"{place.root}/none") is False
    assert place.storage.stat(f"{place.root}/a") is not None


def test_removal(place):
    place.storage.make_directory(f"{place.root}/tree/deep")
    place.storage.write_bytes(f"{place.root}/tree/deep/file", b"x")
    place.storage.write_bytes(f"{place.root}/file", b"x")
    place.storage.remove(f"{place.root}/file")
    place.storage.remove_tree(f"{place.root}/tree")
    place.storage.remove_tree(f"{place.root}/tree")
    assert list(place.storage.list(place.root)) == []


def test_free_space_is_a_number_or_unknown(place):
    free = place.storage.free_bytes(place.root)
    assert free is None or free > 0


def test_a_lock_excludes_and_says_who_holds_it(place):
    path = f"{place.root}/lock"
    held = place.storage.lock(path, "host a, process 1")
    assert not isinstance(held, str)
    assert place.storage.lock(path, "host b, process 2") == "host a, process 1"
    held.release()
    again = place.storage.lock(path, "x")
    assert not isinstance(again, str)
    assert place.storage.lock(path, "y") == "x"
    again.release()


def test_a_released_lock_is_released_once(place):
    path = f"{place.root}/lock"
    first = place.storage.lock(path, "first")
    assert not isinstance(first, str)
    first.release()
    second = place.storage.lock(path, "second")
    assert not isinstance(second, str)
    first.release()
    assert place.storage.lock(path, "third") == "second"
    second.release()


def test_locks_of_two_names_are_two(place):
    one, two = (place.storage.lock(f"{place.root}/{name}", name) for name in "ab")
    assert not isinstance(one, str)
    assert not isinstance(two, str)
    one.release()
    two.release()


def test_an_exhausted_memory_storage_says_so():
    storage = MemoryStorage(capacity=10)
    storage.write_bytes("/a", b"1234")
    assert storage.free_bytes("/") == 6
    with pytest.raises(NoSpaceError, match="No space") as caught:
        storage.create("/b", 7)
    assert caught.value.file == "/b"
    assert storage.stat("/b") is None
    storage.remove("/a")
    storage.write_bytes("/b", b"1234567890")


def test_a_memory_storage_without_exchange():
    storage = MemoryStorage(can_exchange=False)
    storage.make_directory("/a")
    storage.make_directory("/b")
    assert storage.exchange("/a", "/b") is False
