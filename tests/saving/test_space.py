"""A full file system: seen before a byte is written, or survived."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from reshard.comm import SingleProcess
from reshard.errors import NoSpaceError
from reshard.format.common import CommonInfo
from reshard.saving.rank_files import check_space
from reshard.saving.saver import Saver
from reshard.state import State, model_key, state_of
from reshard.storage import MemoryStorage, PosixStorage
from reshard.testing import FaultyStorage, mesh_of, run_ranks_settled, split, tensor_on_rank
from tests import saving_runs as runs

MIB = 1 << 20


def state(rank: int, mebibytes: int) -> State:
    """Half of a tensor of this size."""
    whole = np.full((2, mebibytes * MIB // 8), rank + 1, np.float32)
    tensor = tensor_on_rank(model_key("w"), whole, split(mesh_of(dp=2), "dp", None), rank)
    assert tensor is not None
    return state_of(tensor)


def save(storage, root: str, mebibytes: int, step: int = 1):
    def run(comm):
        with Saver(storage, comm, root) as saver:
            return saver.save(step, state(comm.rank, mebibytes), CommonInfo())

    return run_ranks_settled(2, run)


def test_what_does_not_fit_is_not_begun():
    storage = FaultyStorage(MemoryStorage(capacity=8 * MIB))
    for result in save(storage, runs.ROOT, 9):
        assert type(result) is NoSpaceError
        text = str(result)
        assert "2 of 2 ranks failed" in text
        assert "on ranks 0-1: NoSpaceError" in text
        free, needed = (int(re.search(pattern, text)[1]) for pattern in (r"(\d+) bytes free", r"(\d+) bytes: "))
        assert free == 8 * MIB
        assert 9 * MIB < needed < 12 * MIB
    assert not {"create", "make_directory"} & {name for name, path in storage.log if "saving" in path}
    assert not [result for result in save(storage, runs.ROOT, 5) if isinstance(result, BaseException)]


def test_ranks_that_came_earlier_do_not_count_against_the_later():
    """Each rank finds room for the whole checkpoint, though another has already written half of it."""
    storage = MemoryStorage(capacity=8 * MIB)
    storage.make_directory("/root")
    check_space(storage, "/root", "/root/saving", 6 * MIB)
    storage.make_directory("/root/saving")
    storage.write_bytes("/root/saving/half", bytes(3 * MIB))
    check_space(storage, "/root", "/root/saving", 6 * MIB)
    storage.write_bytes("/root/other", bytes(1 * MIB))
    with pytest.raises(NoSpaceError):
        check_space(storage, "/root", "/root/saving", 6 * MIB)


def test_unknown_free_space_is_no_obstacle():
    class Unknown(MemoryStorage):
        def free_bytes(self, path: str) -> int | None:
            return None

    assert not [result for result in save(Unknown(), runs.ROOT, 1) if isinstance(result, BaseException)]


class Blind(PosixStorage):
    """A file system that doesn't know its free space, so that only writing shows that it is full."""

    def free_bytes(self, path: str) -> int | None:
        return None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") is not None and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m,mode=755", "none", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this machine allows no mount; the same with a storage in memory is tested above")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_real_disk_that_is_too_small(small_disk):
    root = str(small_disk / "root")
    for result in save(PosixStorage(), root, 9):
        assert type(result) is NoSpaceError
        assert "bytes free" in str(result)
    assert os.listdir(root) == [".reshard.lock"]


def test_a_real_disk_that_fills_up_while_a_checkpoint_is_written(small_disk):
    root = str(small_disk / "root")
    assert not [result for result in save(Blind(), root, 3) if isinstance(result, BaseException)]
    for step in (1, 2):
        for result in save(Blind(), root, 7, step):
            assert type(result) is NoSpaceError
            assert "No space left on device" in str(result)
        assert sorted(os.listdir(root)) == [".reshard.lock", "iteration_00000001", "latest_checkpointed_iteration.txt"]
    from reshard.checkpoint import Checkpoint

    checkpoint = Checkpoint(root)
    checkpoint.check()
    assert checkpoint["w"][:, 0].tolist() == [1, 2]
    # What was given back can be written again.
    assert not [result for result in save(PosixStorage(), root, 3, 2) if isinstance(result, BaseException)]


def test_a_memory_storage_that_fills_up_while_a_checkpoint_is_written():
    class Full(MemoryStorage):
        def free_bytes(self, path: str) -> int | None:
            return None

    storage = Full(capacity=8 * MIB)
    with Saver(storage, SingleProcess(), runs.ROOT) as saver:
        saver.save(1, runs.state(0, 1, 1), CommonInfo(global_step=1))
        whole = tensor_on_rank(model_key("w"), np.zeros(9 * MIB, np.uint8), split(mesh_of(dp=1), None), 0)
        assert whole is not None
        with pytest.raises(NoSpaceError, match="No space left"):
            saver.save(2, state_of(whole), CommonInfo())
        assert runs.committed(storage) == {1: 1}
        saver.save(2, runs.state(0, 1, 2), CommonInfo(global_step=2))
        assert runs.committed(storage) == {1: 1, 2: 2}
