"""What only a real file system can show."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reshard.errors import DataFileError, NoSpaceError, ShortFileError, StorageError
from reshard.storage import PosixStorage
from reshard.storage.posix_files import PosixReadable, PosixWritable
from reshard.storage.system_errors import storage_error

HOLDER = """
import sys, time
from reshard.storage import PosixStorage
lock = PosixStorage().lock(sys.argv[1], "the other process")
print("held" if not isinstance(lock, str) else lock, flush=True)
time.sleep(600)
"""


@pytest.fixture
def umask():
    """Sets the umask, and gives the old one back after the test."""
    old = os.umask(0o022)
    yield os.umask
    os.umask(old)


@pytest.mark.parametrize(("mask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o007, 0o660, 0o770), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(tmp_path, umask, mask, file_mode, directory_mode):
    umask(mask)
    storage = PosixStorage()
    storage.make_directory(f"{tmp_path}/d/e")
    storage.write_bytes(f"{tmp_path}/d/e/f", b"x")
    assert (tmp_path / "d/e/f").stat().st_mode & 0o777 == file_mode
    assert {(tmp_path / part).stat().st_mode & 0o777 for part in ("d", "d/e")} == {directory_mode}


def test_a_full_device_is_no_space(tmp_path):
    assert isinstance(storage_error(OSError(errno.ENOSPC, "No space left on device"), "can't write", "/x"), NoSpaceError)
    assert isinstance(storage_error(OSError(errno.EDQUOT, "Disk quota exceeded"), "can't write", "/x"), NoSpaceError)
    error = storage_error(OSError(errno.EIO, "Input/output error"), "can't write the file", "/x/y")
    assert isinstance(error, StorageError)
    assert "can't write the file" in str(error)
    assert "/x/y" in str(error)
    assert "Input/output error" in str(error)


def test_a_write_to_a_full_device_raises_no_space():
    if not os.path.exists("/dev/full"):
        pytest.skip("the machine has no /dev/full")
    with PosixWritable("/dev/full", os.open("/dev/full", os.O_WRONLY)) as file, pytest.raises(NoSpaceError, match="No space left"):
        file.write_at(0, memoryview(b"x" * 4096))


def test_links_count_as_what_they_lead_to(tmp_path):
    storage = PosixStorage()
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"123")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert [(e.name, e.is_directory) for e in storage.list(str(tmp_path))] == [("link", True), ("real", True)]
    assert storage.stat(f"{tmp_path}/dangling") is None
    # But of a link only the link is removed: checkpoints are moved to another disk, and a link is left in their place.
    storage.remove_tree(f"{tmp_path}/link")
    assert not os.path.lexists(tmp_path / "link")
    assert storage.read_bytes(f"{tmp_path}/real/file") == b"123"


def test_a_rename_refuses_a_taken_name_without_the_kernels_help(tmp_path, monkeypatch):
    monkeypatch.setattr("reshard.storage.system_calls._renameat2", lambda: None)
    storage = PosixStorage()
    for name in ("a", "b"):
        storage.make_directory(f"{tmp_path}/{name}")
    assert storage.exchange(f"{tmp_path}/a", f"{tmp_path}/b") is False
    with pytest.raises(StorageError, match="exists"):
        storage.rename(f"{tmp_path}/a", f"{tmp_path}/b")
    storage.rename(f"{tmp_path}/a", f"{tmp_path}/c")
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_an_old_kernel_says_that_it_cannot(tmp_path, monkeypatch):
    monkeypatch.setattr("reshard.storage.system_calls._renameat2", lambda: lambda source, target, flags: errno.ENOSYS)
    storage = PosixStorage()
    storage.make_directory(f"{tmp_path}/a")
    storage.make_directory(f"{tmp_path}/b")
    assert storage.exchange(f"{tmp_path}/a", f"{tmp_path}/b") is False
    storage.rename(f"{tmp_path}/a", f"{tmp_path}/c")
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]


def test_a_large_file_is_written_and_read_in_parts(tmp_path, monkeypatch):
    real_write, real_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real_write(descriptor, data[:7], offset))
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: real_read(descriptor, [buffers[0][:5]], offset))
    storage = PosixStorage()
    data = bytes(range(100))
    storage.write_bytes(f"{tmp_path}/f", data)
    assert storage.read_bytes(f"{tmp_path}/f") == data


def start(script: str, path: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE, text=True, env=environment)


def hold(path: str) -> subprocess.Popen[str]:
    process = start(HOLDER, path)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_lock_ends_with_its_process(tmp_path):
    path = f"{tmp_path}/lock"
    process = hold(path)
    try:
        assert PosixStorage().lock(path, "me") == "the other process"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        lock = PosixStorage().lock(path, "me")
        assert not isinstance(lock, str)
        lock.release()
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    script = """
import os, sys, time
from reshard.storage import PosixStorage
lock = PosixStorage().lock(sys.argv[1], "parent")
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""
    path = f"{tmp_path}/lock"
    process = start(script, path)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.wait()
    process.stdout.close()
    try:
        os.kill(child, 0)
        lock = PosixStorage().lock(path, "me")
        for _ in range(200):  # the child may not have come to closing its copy
            if not isinstance(lock, str):
                break
            time.sleep(0.05)
            lock = PosixStorage().lock(path, "me")
        assert not isinstance(lock, str)
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_file_that_was_removed_excludes_again(tmp_path):
    path = f"{tmp_path}/lock"
    storage = PosixStorage()
    first = storage.lock(path, "first")
    os.unlink(path)
    second = storage.lock(path, "second")
    assert not isinstance(first, str)
    assert not isinstance(second, str)
    assert storage.lock(path, "third") == "second"
    first.release()
    second.release()


def test_a_lock_nobody_released_ends_with_its_object(tmp_path):
    storage = PosixStorage()
    lock = storage.lock(f"{tmp_path}/lock", "first")
    assert not isinstance(lock, str)
    del lock
    again = storage.lock(f"{tmp_path}/lock", "second")
    assert not isinstance(again, str)
    again.release()


def test_a_pipe_in_the_place_of_a_file_holds_nobody(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a file"):
        PosixStorage().open_read(f"{tmp_path}/pipe")


def test_a_mapped_file_cannot_be_cut_short_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    with PosixStorage().open_read(str(path)) as file:
        window = file.map(4096, 8192)
        if window is None:
            pytest.skip("this file system has no leases")
        process = subprocess.Popen([sys.executable, "-S", "-c", f"import os; os.truncate({str(path)!r}, 0)"])
        deadline = time.monotonic() + 30
        while file.map(0, 4096) is not None:
            assert time.monotonic() < deadline, "somebody waits"
            time.sleep(0.01)
        assert process.poll() is None
        assert window.tobytes() == (bytes(range(256)) * 64)[4096:12288]
        del window
    assert process.wait(20) == 0
    assert path.stat().st_size == 0


def test_a_file_that_somebody_writes_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with open(path, "r+b"), PosixStorage().open_read(str(path)) as file:
        assert file.map(0, 8192) is None


def opened(tmp_path: Path, size: int = 5) -> PosixReadable:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    file = PosixStorage().open_read(str(path))
    assert isinstance(file, PosixReadable)
    os.truncate(path, size)
    return file


def test_a_file_that_was_cut_short_while_it_was_open_says_so_when_it_is_closed(tmp_path):
    file = opened(tmp_path, 3)
    with pytest.raises(ShortFileError, match="cut short") as caught:
        file.close()
    assert (caught.value.file, caught.value.found) == (f"{tmp_path}/file", "3 bytes")
    assert "5 bytes" in str(caught.value.expected)
    file.close()
    with pytest.raises(StorageError, match="Bad file descriptor"):
        file.read_into(0, memoryview(bytearray(1)))


def test_a_file_that_grew_while_it_was_open_is_none_the_worse(tmp_path):
    with opened(tmp_path, 7) as file:
        assert file.size == 5


def test_that_a_file_was_cut_short_explains_why_its_bytes_are_wrong(tmp_path):
    wrong = DataFileError("the bytes of a tensor are not as they were saved")
    with pytest.raises(ShortFileError, match="cut short") as caught, opened(tmp_path, 3):
        raise wrong
    assert caught.value.__context__ is wrong
    with pytest.raises(DataFileError, match="not as they were saved"), opened(tmp_path):
        raise wrong


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StorageError("can't read the file"), ShortFileError("the file ends before")])
def test_any_other_error_is_told_whatever_became_of_the_file(tmp_path, error):
    file = opened(tmp_path, 3)
    with pytest.raises(type(error)) as caught, file:
        raise error
    assert caught.value is error
    file.close()
