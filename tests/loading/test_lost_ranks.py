"""A process is killed, or hangs, while real ranks load: the others end with an error, the checkpoint stays, the next load works."""

from __future__ import annotations

import hashlib
import os
import signal
import time
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
from tests.faults import LOST_RANK, Tried
from tests.processes import Failure, RankPool

WORLD = 4
ROWS, COLUMNS, TENSORS = 512, 1024, 12

# Far beyond what a test may take: who ends earlier has heard of the loss, not waited for the limit.
LONG = 3000.0


class Struck(FaultyStorage):
    """Does something to its own process at the k-th read of data."""

    def __init__(self, after: int, strike: Callable[[], Any]) -> None:
        super().__init__(PosixStorage())
        self._left, self._strike = after, strike

    def _do(self, name: str, path: str, work: Any, torn: Any = None) -> Any:
        if name in ("read_into", "scatter", "map") and path.endswith(".safetensors") and "/extra/" not in path:
            self._left -= 1
            if self._left == 0:
                self._strike()
        return work()


def values(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (ROWS, COLUMNS), np.uint8)


def held(rank: int, wanted: str) -> dict[int, Region]:
    """Who wants what: everyone everything, half of the columns, or neighbours what they share: then not all ranks meet.

    "handed": columns, read by each for all.
    """
    if wanted == "neighbours":
        return {number: Region.whole((ROWS, COLUMNS)) for number in range(TENSORS) if rank in (number % WORLD, (number + 1) % WORLD)}
    columns = (
        Region((0, rank % 2 * COLUMNS // 2), (ROWS, COLUMNS // 2)) if wanted in ("columns", "handed") else Region.whole((ROWS, COLUMNS))
    )
    return dict.fromkeys(range(TENSORS), columns)


def save(root: Path) -> None:
    reshard.save(root, 1, model={f"w{number}": values(number) for number in range(TENSORS)})


def load(
    root: Path, wanted: str, balanced: bool, victim: int | None, after: int, how: str, limit: float, star: bool = True
) -> tuple[str, str, list[str]]:
    """How a load went on a rank: the class and the text of its error, and the tensors that are wrong.

    `star`: as on one machine; without it as on several.
    """
    import torch.distributed as dist

    from reshard.frameworks.torch.communicator import TorchCommunicator
    from reshard.loading import handing
    from reshard.planning import columns

    rank = dist.get_rank()
    strikes: dict[str, Callable[[], Any]] = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hangs": lambda: time.sleep(3 * limit),
    }
    storage = Struck(after, strikes[how]) if rank == victim else PosixStorage()
    regions = held(rank, wanted)
    memory = {number: np.zeros(region.shape, np.uint8) for number, region in regions.items()}
    model = {
        f"w{number}": ShardedTensor(
            model_key(f"w{number}"), by_numpy(array.dtype), (ROWS, COLUMNS), None, (Shard(regions[number], HostMemory(array)),)
        )
        for number, array in memory.items()
    }
    error, text = "", ""
    comm = TorchCommunicator(limit, star=star)
    try:
        with pytest.MonkeyPatch.context() as patch:
            if wanted == "handed":  # however little it is
                patch.setattr(handing, "_LEAST_BYTES", 1)
                patch.setattr(columns, "_LEAST_BYTES", 1)
            report = reshard.load(root, model=model, storage=storage, balanced=balanced, memory_budget=1 << 20, communicator=comm)
        assert (report.bytes_sent > 0) == (balanced or wanted == "handed")
    except reshard.ReshardError as raised:
        error, text = type(raised).__name__, str(raised)
    finally:
        comm.close()  # as a manager does with its own
    return error, text, [f"w{n}" for n, array in memory.items() if not np.array_equal(array, values(n)[regions[n].slices])]


def digest(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def root(rank_pool: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("root")
    rank_pool(WORLD).run(save, made)
    return made


FINE = [("", "", [])] * WORLD


@pytest.mark.parametrize(
    ("balanced", "wanted", "victim", "after", "star"),
    [
        (True, "everything", 1, 12, True),
        (True, "columns", 2, 9, False),
        (True, "neighbours", 0, 8, True),
        (False, "columns", 1, 9, True),
        (False, "columns", 1, 9, False),
        (False, "handed", 2, 4, True),
        (False, "handed", 2, 4, False),
    ],
)
def test_a_killed_rank_is_an_error_on_the_others(
    rank_pool: Callable[[int], RankPool], root: Path, balanced: bool, wanted: str, victim: int, after: int, star: bool, tried: Tried
) -> None:
    pool, before = rank_pool(WORLD), digest(root)
    try:
        outcomes = pool.run_settled(load, root, wanted, balanced, victim, after, "killed", LONG, star, timeout=90)
    finally:
        pool.restart()
    assert outcomes[victim] == Failure(f"the process died, exit code {-signal.SIGKILL}")
    for rank, outcome in enumerate(outcomes):
        if rank != victim:
            assert not isinstance(outcome, Failure), outcome.text
            error, text, _ = outcome
            assert error == "CommunicationError"
            assert f"rank:     {rank}" in text
            # Rank 0 serves the store in which the others look for signs of life.
            assert f"gone:     rank {victim}: no sign of life" in text or (victim == 0 and "gone:     the job's store" in text)
            assert "pair.cc" not in text
            assert "next:" in text
    assert digest(root) == before
    assert pool.run(load, root, wanted, balanced, None, 0, "killed", LONG) == FINE
    tried(LOST_RANK, 1)


@pytest.mark.sweep
@pytest.mark.parametrize(("balanced", "wanted", "after"), [(True, "everything", 12), (False, "columns", 9)], ids=["balanced", "direct"])
def test_a_rank_that_hangs_is_an_error_within_the_limit(
    rank_pool: Callable[[int], RankPool], root: Path, balanced: bool, wanted: str, after: int, tried: Tried
) -> None:
    pool = rank_pool(WORLD)
    try:
        outcomes = pool.run_settled(load, root, wanted, balanced, 1, after, "hangs", 5.0, timeout=90)
    finally:
        pool.restart()
    assert not any(isinstance(outcome, Failure) for outcome in outcomes), outcomes
    assert {error for error, _, _ in outcomes} == {"CommunicationError"}
    assert pool.run(load, root, wanted, balanced, None, 0, "hangs", LONG) == FINE
    tried(LOST_RANK, 1)
