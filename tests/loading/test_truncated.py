"""A file that is cut short while real processes load it: an error on every rank, and no process dies of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.geometry import Region
from reshard.geometry.dtypes import by_numpy
from reshard.state import HostMemory, Shard, ShardedTensor, model_key
from reshard.storage.posix import PosixStorage
from reshard.testing import FaultyStorage
from tests.processes import Failure, RankPool

SIDE = 2048
READS = ("read_into", "scatter", "map")


class Cutting(FaultyStorage):
    """Cuts a data file in half at the first of some operations on it that comes after its header was read."""

    def __init__(self, operations: tuple[str, ...], *, after: bool = False) -> None:
        super().__init__(PosixStorage())
        self._cut_at, self._is_after = operations, after
        self._opened: dict[str, int] = {}
        self._guard = threading.Lock()
        self._is_cut = False

    def _do(self, name: str, path: str, work: Any, torn: Any = None) -> Any:
        with self._guard:
            if name == "open_read":
                # Once for the header, then for the data.
                self._opened[path] = self._opened.get(path, 0) + 1
            cuts = not self._is_cut and name in self._cut_at and "-model-" in path and self._opened[path] > 1
            self._is_cut |= cuts
            if cuts and not self._is_after:
                cut(path, 20)
            done = work()
            if cuts and self._is_after:
                cut(path, 0.5)
        return done


def cut(path: str, patience: float) -> None:
    """By another process, which waits as long as somebody has a lease on the file."""
    program = f"import os; os.truncate({path!r}, {os.path.getsize(path) // 2})"
    process = subprocess.Popen([sys.executable, "-S", "-c", program])
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience)


def whole() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((SIDE, SIDE)).astype(np.float32)


def save(root: Path) -> None:
    reshard.save(root, 1, model={"w": whole()})


def load(root: Path, axis: int, balanced: bool, operations: tuple[str, ...], after: bool = False) -> str:
    """Half of the rows or of the columns on each rank. What went wrong, or nothing."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    shape = [SIDE, SIDE]
    offset = [0, 0]
    shape[axis] = SIDE // 2
    offset[axis] = rank * (SIDE // 2)
    region = Region(tuple(offset), tuple(shape))
    array = np.zeros(region.shape, np.float32)
    tensor = ShardedTensor(model_key("w"), by_numpy(array.dtype), (SIDE, SIDE), None, (Shard(region, HostMemory(array)),))
    storage = Cutting(operations, after=after) if rank == world - 1 else PosixStorage()
    try:
        reshard.load(root, model={"w": tensor}, storage=storage, balanced=balanced)
    except reshard.ReshardError as error:
        return f"{type(error).__name__}: {error}"
    return "" if np.array_equal(array, whole()[region.slices]) else "wrong values"


@pytest.fixture
def saved(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> tuple[Path, dict[Path, bytes]]:
    """A checkpoint of one rank, and its data files' bytes."""
    rank_pool(1).run(save, tmp_path)
    return tmp_path, {path: path.read_bytes() for path in tmp_path.glob("iteration_*/*-model-*")}


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "direct"])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_a_cut_after_the_headers_were_read_is_everyones_error(
    rank_pool: Callable[[int], RankPool], saved: tuple[Path, dict[Path, bytes]], axis: int, balanced: bool
) -> None:
    root, files = saved
    first, second = rank_pool(2).run(load, root, axis, balanced, READS)
    assert first == second
    # A read at that very moment gives zeros, and what they were is found out when the file is closed.
    assert first.startswith("ShortFileError")
    assert "ends before" in first or "was cut short" in first
    for path, data in files.items():
        assert str(path) in first
        assert path.stat().st_size < len(data)
        path.write_bytes(data)
    assert rank_pool(2).run(load, root, axis, balanced, ()) == ["", ""]


def test_a_cut_while_a_box_is_copied_kills_nobody(rank_pool: Callable[[int], RankPool], saved: tuple[Path, dict[Path, bytes]]) -> None:
    root, _ = saved
    (outcome,) = rank_pool(1).run_settled(load, root, 1, False, READS, True)
    if isinstance(outcome, Failure):
        rank_pool(1).restart()
    assert not isinstance(outcome, Failure), outcome.text
    # Where the file is leased the cut comes after the load; where it isn't, it isn't mapped, and its end is seen.
    assert outcome == "" or "ends before" in outcome or "was cut short" in outcome
