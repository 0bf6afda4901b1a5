"""The root of a run: made, locked, and cleaned of what dead runs left."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading

import pytest

from reshard.comm import SingleProcess
from reshard.errors import ReshardError, RootLockedError, SaveError, StorageError, UsageError
from reshard.format.common import CommonInfo
from reshard.saving.options import SaveOptions
from reshard.saving.root import discard, open_root, saving_name, scratch_name
from reshard.saving.saver import Saver
from reshard.sources.resolve import list_iterations
from reshard.storage import MemoryStorage, PosixStorage, WritableFile
from reshard.testing import FaultyStorage, run_ranks_settled
from tests import saving_runs as runs

HOLDER = """
import sys, time
from reshard.comm import SingleProcess
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.storage import PosixStorage
saver = Saver(PosixStorage(), SingleProcess(), sys.argv[1])
print("saves", flush=True)
time.sleep(600)
"""


def test_the_root_is_made_and_its_name_is_durable():
    storage = FaultyStorage(MemoryStorage())
    storage.make_directory("/runs")
    storage.log.clear()
    open_root(storage, "/runs/a/b", 0).release()
    assert [path for name, path in storage.log if name == "sync_directory"] == ["/runs", "/runs/a"]


def test_a_second_run_is_refused_on_every_rank():
    storage = MemoryStorage()
    with Saver(storage, SingleProcess(), runs.ROOT):
        for result in run_ranks_settled(3, lambda comm: Saver(storage, comm, runs.ROOT, SaveOptions(lock_timeout=0.05))):
            assert type(result) is RootLockedError
            assert f"process {os.getpid()} on host" in str(result)
            assert runs.ROOT in str(result)
            assert "0.05 s" in str(result)
    Saver(storage, SingleProcess(), runs.ROOT, SaveOptions(lock_timeout=0)).close()


def test_another_process_is_refused_until_it_is_killed(tmp_path, process_environment):
    root = str(tmp_path / "root")
    process = subprocess.Popen([sys.executable, "-c", HOLDER, root], stdout=subprocess.PIPE, text=True, env=process_environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "saves\n"
        with pytest.raises(RootLockedError, match=f"process {process.pid} on host"):
            Saver(PosixStorage(), SingleProcess(), root, SaveOptions(lock_timeout=0))
        # In a restart loop the old process is dying while the new one starts.
        killer = threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL))
        killer.start()
        Saver(PosixStorage(), SingleProcess(), root, SaveOptions(lock_timeout=60)).close()
        killer.join()
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_leftovers_of_dead_runs_are_removed_and_nothing_else():
    storage = MemoryStorage()
    runs.save(storage, [(1, 10), (2, 20)])
    leftovers = [
        saving_name(3, "0123abcd-7"),
        scratch_name("0123abcd-7"),
        scratch_name("0123abcd-7") + "-undo",
        ".deleting-iteration_00000001-0123abcd-2",
    ]
    foreign = [
        ".saving-mine",
        ".saving-iteration_00000003",
        ".deleting-iteration_00000001-0123abcd-2.bak",
        ".replaced-other",
        "iteration_00000009",
        "notes.txt",
    ]
    for name in leftovers + foreign:
        if "tracker" in name or "." in name[1:]:
            storage.write_bytes(f"{runs.ROOT}/{name}", b"1")
        else:
            storage.make_directory(f"{runs.ROOT}/{name}/extra")
            storage.write_bytes(f"{runs.ROOT}/{name}/file", b"1")
    Saver(storage, SingleProcess(), runs.ROOT).close()
    expected = [*foreign, ".reshard.lock", "iteration_00000001", "iteration_00000002", "latest_checkpointed_iteration.txt"]
    assert runs.names(storage) == sorted(expected)


def test_a_replaced_iteration_gets_its_name_back_or_goes(caplog):
    storage = MemoryStorage()
    runs.save(storage, [(1, 10), (2, 20)])
    storage.rename(f"{runs.ROOT}/iteration_00000001", f"{runs.ROOT}/.replaced-iteration_00000001")
    storage.make_directory(f"{runs.ROOT}/.replaced-iteration_00000002/half")
    with caplog.at_level(logging.WARNING, "reshard"):
        Saver(storage, SingleProcess(), runs.ROOT).close()
    assert runs.names(storage) == [".reshard.lock", "iteration_00000001", "iteration_00000002", "latest_checkpointed_iteration.txt"]
    assert runs.committed(storage) == {1: 10, 2: 20}
    assert "iteration_00000001" in caplog.text
    assert "is back" in caplog.text


def test_a_leftover_that_can_not_be_removed_is_in_nobodys_way(caplog):
    storage = MemoryStorage()
    storage.make_directory(f"{runs.ROOT}/{saving_name(3, '0123abcd-7')}")
    faulty = FaultyStorage(storage, fail_at=1, operations={"remove_tree"}, lasting=True)
    runs.save(faulty, [(3, 30)])
    assert runs.committed(storage) == {3: 30}
    assert "can't remove" in caplog.text
    assert "/.saving-iteration_00000003-0123abcd-7" in caplog.text
    assert not discard(faulty, f"{runs.ROOT}/iteration_00000003")
    assert discard(storage, f"{runs.ROOT}/none")


def test_a_root_that_can_not_be_made_is_everybodys_error():
    def make(comm):
        return Saver(PosixStorage(), comm, "/proc/reshard/root")

    for result in run_ranks_settled(2, make):
        assert type(result) is StorageError
        assert "/proc/reshard" in str(result)
        assert "can't make the directory" in str(result)


def test_a_parent_without_write_permission():
    """As another user where the tests run as root, whom no permission stops."""
    user = os.geteuid()
    # pytest's own directories are closed to other users.
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o555)
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(ReshardError) as caught:
                Saver(PosixStorage(), SingleProcess(), f"{parent}/root")
        finally:
            os.seteuid(user)
        assert os.listdir(parent) == []
    assert type(caught.value) is StorageError
    assert "can't make the directory" in str(caught.value)
    assert "Permission denied" in str(caught.value)
    assert f"{parent}/root" in str(caught.value)
    assert "the right to read and write there" in str(caught.value)


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        runs.save(PosixStorage(), [(1, 10)], root=str(tmp_path / "root"), world_size=2)
    finally:
        os.umask(old)
    for path in (tmp_path / "root").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize(("field", "options"), [("prefix", {"prefix": "other"}), ("save_optimizer", {"save_optimizer": False})])
def test_ranks_with_different_options_save_nothing(field, options):
    """Rank 0 would list files that another rank never writes."""
    storage = MemoryStorage()

    def run(comm):
        with Saver(storage, comm, runs.ROOT, SaveOptions(lock_timeout=0, **(options if comm.rank == 1 else {}))) as saver:
            saver.save(1, runs.state(comm.rank, 2, 1), runs.CommonInfo())

    for error in run_ranks_settled(2, run, timeout=20):
        assert isinstance(error, UsageError)
        assert f"field:    {field}" in str(error)
        assert "rank:     1" in str(error)
    assert runs.names(storage) == [".reshard.lock"]
    runs.save(storage, [(1, 1)], world_size=2)
    assert runs.committed(storage) == {1: 1}


def test_a_root_that_was_removed_meanwhile_is_written_by_nobody_else(tmp_path):
    """Its lock went with it: another run may have made and locked it again."""
    root = f"{tmp_path}/root"
    storage = PosixStorage()
    with Saver(storage, SingleProcess(), root) as first:
        first.save(1, runs.state(0, 1, 1), runs.CommonInfo())
        shutil.rmtree(root)
        with Saver(storage, SingleProcess(), root, SaveOptions(lock_timeout=0)) as second:
            with pytest.raises(SaveError, match="lock on the checkpoint root is gone"):
                first.save(2, runs.state(0, 1, 2), runs.CommonInfo())
            second.save(3, runs.state(0, 1, 3), runs.CommonInfo())
    assert runs.committed(storage, root) == {3: 3}
    assert runs.names(storage, root) == [".reshard.lock", "iteration_00000003", "latest_checkpointed_iteration.txt"]


def test_a_forked_child_does_not_save_beside_its_parent(tmp_path, run_python):
    code = """
import os, sys
import numpy as np
import reshard
manager = reshard.CheckpointManager(sys.argv[1])
child = os.fork()
if child == 0:
    try:
        manager.save(1, model={"a": np.zeros(3)})
    except reshard.ReshardError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent:", manager.save(2, model={"a": np.zeros(3)}).step)
"""
    said = run_python(code, str(tmp_path / "root")).stdout
    assert "lock on the checkpoint root is gone" in said
    assert "parent: 2" in said
    assert list(dict(list_iterations(PosixStorage(), f"{tmp_path}/root"))) == [2]


class Interrupted(PosixStorage):
    """A storage in whose midst somebody presses Ctrl-C, once."""

    def __init__(self, operation: str) -> None:
        self._operation: str | None = operation

    def _press(self, operation: str) -> None:
        if operation == self._operation:
            self._operation = None
            raise KeyboardInterrupt

    def create(self, path: str, size: int) -> WritableFile:
        self._press("create" if "-opt-" in path else "")
        return super().create(path, size)

    def sync_directory(self, path: str) -> None:
        super().sync_directory(path)
        self._press("sync" if "extra" in path else "")

    def replace(self, source: str, target: str) -> None:
        self._press("replace")
        super().replace(source, target)


@pytest.mark.parametrize("operation", ["create", "sync", "replace"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_what_an_interrupted_save_left_goes_with_the_next_one_or_at_the_end(tmp_path, operation, goes_on):
    storage = Interrupted(operation)
    other = tmp_path / saving_name(7, "0123abcd-1")
    with Saver(storage, SingleProcess(), str(tmp_path)) as saver:
        with pytest.raises(KeyboardInterrupt):
            saver.save(1, runs.state(0, 1, 10), CommonInfo(global_step=10))
        assert list(tmp_path.glob(".saving-*")), "it left something"
        # Of nobody that we know: another run's business.
        other.mkdir()
        if goes_on:
            saver.save(2, runs.state(0, 1, 20), CommonInfo(global_step=20))
            assert list(tmp_path.glob(".saving-*")) == [other]
            assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert list(tmp_path.glob(".saving-*")) == [other]
