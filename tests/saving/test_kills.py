"""Real processes are killed at every storage operation of a save: what was committed is there, bit for bit, and the next save works."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

import reshard
from reshard.errors import CheckpointNotFoundError
from reshard.saving.report import AsyncSave
from reshard.sources.resolve import list_iterations
from reshard.state import ShardedTensor, model_key
from reshard.storage import PosixStorage
from reshard.testing import FaultyStorage, mesh_of, split, tensor_on_rank
from tests.faults import KILL, Tried
from tests.forked import REFUSED, SAVED, SocketCommunicator, run_job

T = TypeVar("T")

# What is saved when 1 and 2 are there, of which at most two are kept; and when nothing is.
FIRST, NEXT, AGAIN = "the first", "another", "the newest again"
STEPS = {FIRST: 1, NEXT: 3, AGAIN: 2}
VERSION = 7  # of the values of the save that is killed; those that were there have their step's number


class KillingStorage(FaultyStorage):
    """Kills its process at the k-th operation: before it does anything, or when it has done the half of it that can be done."""

    def __init__(self, kill_at: int | None, *, torn: bool) -> None:
        super().__init__(PosixStorage())
        self._kill_at, self._torn = kill_at, torn

    def _do(self, name: str, path: str, work: Callable[[], T], torn: Callable[[], object] | None = None) -> T:
        with self._guard:
            self.count += 1
            is_last = self.count == self._kill_at
        if is_last:
            if self._torn and torn is not None:
                torn()
            os.kill(os.getpid(), signal.SIGKILL)
        return work()


def tensors(rank: int, world_size: int, version: int) -> dict[str, ShardedTensor]:
    mesh = mesh_of(dp=world_size)
    made = {}
    for name, shape, axes in (("w", (8, 4), ("dp", None)), ("b", (5,), (None,))):
        array = np.full(shape, version, np.float32) + np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)).astype(np.float32)
        tensor = tensor_on_rank(model_key(name), array, split(mesh, *axes), rank)
        assert tensor is not None
        made[name] = tensor
    return made


def save(root: Path, comm: SocketCommunicator, step: int, version: int, storage: FaultyStorage | None, mode: AsyncSave | None) -> None:
    with reshard.CheckpointManager(
        root,
        communicator=comm,
        storage=storage,
        keep_checkpoint_max=2,
        lock_timeout=5.0,
        async_save=mode or False,
    ) as manager:
        manager.save(step, model=tensors(comm.rank, comm.world_size, version), extra={"version": version})


def versions(root: Path) -> dict[int, int]:
    """The committed iterations, each read whole, and the versions of their values."""
    found = {}
    for step, directory in list_iterations(PosixStorage(), str(root)):
        checkpoint = reshard.Checkpoint(directory)
        checkpoint.check()
        version = int(checkpoint["b"][0:1][0])
        assert checkpoint["b"][:].tobytes() == (np.full(5, version, np.float32) + np.arange(5, dtype=np.float32)).tobytes()
        expected = np.full((8, 4), version, np.float32) + np.arange(8, dtype=np.float32).reshape(8, 1)
        assert checkpoint["w"][:].tobytes() == expected.tobytes()
        assert checkpoint.values["extra"] == {"version": version}
        found[step] = version
    return found


def tracked(root: Path) -> int | None:
    try:
        return reshard.Checkpoint(root).iteration
    except CheckpointNotFoundError:
        return None


def prepare(root: Path, action: str, world_size: int) -> None:
    if action != FIRST:
        for step in (1, 2):
            assert run_job(world_size, lambda comm, step=step: save(root, comm, step, step, None, None)) == [SAVED] * world_size


def check(root: Path, action: str, world_size: int, codes: list[int], victim: int, where: str) -> None:
    assert codes[victim] == -signal.SIGKILL, where
    assert all(code in (SAVED, REFUSED) for rank, code in enumerate(codes) if rank != victim), f"{where}: {codes}"
    check_root(root, action, world_size, where)


def check_root(root: Path, action: str, world_size: int, where: str) -> None:
    """What was committed is whole, what is tracked is there, and a later run saves as if nothing had been."""
    step = STEPS[action]
    found, now = versions(root) if root.exists() else {}, tracked(root) if root.exists() else None
    if action == FIRST:
        assert now in (None, 1), where
        assert now is None or found == {1: VERSION}, where
    else:
        assert now in (2, step), where
        for number, version in found.items():
            assert version in ((number, VERSION) if number == step else (number,)), where
        assert now == step or {1, 2} <= set(found), where
    assert run_job(world_size, lambda comm: save(root, comm, 9, 9, None, None)) == [SAVED] * world_size, where
    after = versions(root)
    assert after[9] == 9, where
    assert tracked(root) == 9, where
    left = [name for name in os.listdir(root) if name.startswith((".saving", ".deleting", ".replaced", ".scratch"))]
    assert left == [], where


def count_operations(tmp_path: Path, start: Path, action: str, world_size: int, mode: AsyncSave | None) -> list[int]:
    """How many operations each rank's save takes, as a recording of a real one says."""
    root, counts = tmp_path / "counted", tmp_path / "counts"
    counts.mkdir()
    if start.exists():
        shutil.copytree(start, root)

    def work(comm: SocketCommunicator) -> None:
        storage = KillingStorage(None, torn=False)
        save(root, comm, STEPS[action], VERSION, storage, mode)
        (counts / str(comm.rank)).write_text(str(storage.count))

    assert run_job(world_size, work) == [SAVED] * world_size
    return [int((counts / str(rank)).read_text()) for rank in range(world_size)]


def kill_everywhere(tmp_path: Path, action: str, world_size: int, mode: AsyncSave | None, every: int) -> int:
    """Kill each rank at every so many of its operations; how many kills that were."""
    start = tmp_path / "start"
    prepare(start, action, world_size)
    kills = 0
    for victim, total in enumerate(count_operations(tmp_path, start, action, world_size, mode)):
        for k in range(1 + victim % every, total + 1, every):
            root = tmp_path / f"root-{victim}-{k}"
            if start.exists():
                shutil.copytree(start, root)

            def work(comm: SocketCommunicator, victim: int = victim, k: int = k, root: Path = root) -> None:
                storage = KillingStorage(k, torn=k % 2 == 0) if comm.rank == victim else None
                save(root, comm, STEPS[action], VERSION, storage, mode)

            codes = run_job(world_size, work)
            check(root, action, world_size, codes, victim, f"rank {victim} of {world_size}, operation {k} of {total}")
            shutil.rmtree(root)
            kills += 1
    return kills


@pytest.mark.parametrize("mode", [None, "copy"])
@pytest.mark.parametrize("action", [FIRST, NEXT, AGAIN])
def test_a_process_is_killed(tmp_path: Path, tried: Tried, action: str, mode: AsyncSave | None) -> None:
    kills = kill_everywhere(tmp_path, action, 1, mode, every=4)
    assert kills >= 12
    tried(KILL, kills, is_part=True)


@pytest.mark.parametrize("mode", [None, pytest.param("copy", marks=pytest.mark.sweep)])
def test_one_of_four_processes_is_killed(tmp_path: Path, tried: Tried, mode: AsyncSave | None) -> None:
    kills = kill_everywhere(tmp_path, NEXT, 4, mode, every=12)
    assert kills >= 8
    tried(KILL, kills, is_part=True)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", [None, "copy", "deferred"])
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("action", [FIRST, NEXT, AGAIN])
def test_a_process_is_killed_at_every_operation(tmp_path: Path, tried: Tried, action: str, world_size: int, mode: AsyncSave | None) -> None:
    kills = kill_everywhere(tmp_path, action, world_size, mode, every=1)
    assert kills >= (50 if world_size == 1 else 95)
    tried(KILL, kills)
