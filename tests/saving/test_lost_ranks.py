"""A process is killed, or hangs, while real ranks save: the others end with an error that names it, and what was committed stays."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

import reshard
from reshard.saving.report import AsyncSave
from reshard.storage import PosixStorage
from tests.faults import LOST_RANK, Tried
from tests.processes import Failure, RankPool
from tests.saving.test_kills import KillingStorage, tensors, tracked, versions

T = TypeVar("T")

WORLD = 4

# Far beyond what a test may take: who ends earlier has heard of the loss, not waited for the limit.
LONG = 3000.0


class HangingStorage(KillingStorage):
    """Does the k-th operation much too late."""

    def __init__(self, hang_at: int, seconds: float) -> None:
        super().__init__(None, torn=False)
        self._hang_at, self._seconds = hang_at, seconds

    def _do(self, name: str, path: str, work: Callable[[], T], torn: Callable[[], object] | None = None) -> T:
        if self.count + 1 == self._hang_at:
            time.sleep(self._seconds)
        return super()._do(name, path, work, torn)


def save(
    root: Path, step: int, victim: int | None, at: int, how: str, mode: AsyncSave | None, limit: float, star: bool = True
) -> tuple[str, str]:
    """How a save went on a rank: the class and the text of its error. `star`: as on one machine; without it as on several."""
    import torch.distributed as dist

    from reshard.frameworks.torch.communicator import TorchCommunicator

    rank = dist.get_rank()
    storages = {"killed": lambda: KillingStorage(at, torn=False), "hangs": lambda: HangingStorage(at, 3 * limit)}
    storage = storages[how]() if rank == victim else PosixStorage()
    comm = TorchCommunicator(limit, star=star)
    try:
        with reshard.CheckpointManager(root, communicator=comm, storage=storage, async_save=mode or False) as manager:
            manager.save(step, model=tensors(rank, WORLD, step), extra={"version": step})
            manager.wait()
    except reshard.ReshardError as raised:
        return type(raised).__name__, str(raised)
    finally:
        comm.close()
    return "", ""


FINE = [("", "")] * WORLD


@pytest.mark.parametrize(
    ("victim", "at", "mode", "star"),
    [
        (2, 4, "copy", True),
        (2, 4, "copy", False),
        pytest.param(2, 4, None, True, marks=pytest.mark.sweep),
        pytest.param(0, 9, None, True, marks=pytest.mark.sweep),
        pytest.param(0, 9, None, False, marks=pytest.mark.sweep),
        pytest.param(0, 9, "copy", True, marks=pytest.mark.sweep),
        pytest.param(0, 40, None, True, marks=pytest.mark.sweep),
    ],
)
def test_a_killed_rank_is_an_error_on_the_others(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, tried: Tried, victim: int, at: int, mode: AsyncSave | None, star: bool
) -> None:
    pool, root = rank_pool(WORLD), tmp_path / "root"
    assert pool.run(save, root, 1, None, 0, "killed", mode, LONG) == FINE
    try:
        outcomes = pool.run_settled(save, root, 2, victim, at, "killed", mode, LONG, star, timeout=90)
    finally:
        pool.restart()
    assert outcomes[victim] == Failure(f"the process died, exit code {-signal.SIGKILL}")
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert not isinstance(outcome, Failure), outcome.text
            error, text = outcome
            assert error == "CommunicationError", text
            # Rank 0 serves the store in which the others look for signs of life.
            assert f"gone:     rank {victim}: no sign of life" in text or (victim == 0 and "gone:     the job's store" in text), text
    assert versions(root)[1] == 1
    assert tracked(root) == 1
    assert pool.run(save, root, 3, None, 0, "killed", mode, LONG) == FINE
    assert versions(root)[3] == 3
    tried(LOST_RANK, 1)


@pytest.mark.sweep
@pytest.mark.parametrize("mode", [None, "copy"])
def test_a_rank_that_hangs_is_an_error_within_the_limit(
    rank_pool: Callable[[int], RankPool], tmp_path: Path, tried: Tried, mode: AsyncSave | None
) -> None:
    pool, root = rank_pool(WORLD), tmp_path / "root"
    assert pool.run(save, root, 1, None, 0, "hangs", mode, LONG) == FINE
    try:
        outcomes = pool.run_settled(save, root, 2, 1, 4, "hangs", mode, 5.0, timeout=90)
    finally:
        pool.restart()
    assert not any(isinstance(outcome, Failure) for outcome in outcomes), outcomes
    assert {error for error, _ in outcomes} == {"CommunicationError"}, outcomes
    assert tracked(root) == 1
    assert pool.run(save, root, 3, None, 0, "hangs", mode, LONG) == FINE
    tried(LOST_RANK, 1)
