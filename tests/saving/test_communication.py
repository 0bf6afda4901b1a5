"""What ranks tell each other when they save: once what they hold, then only how it went."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.format.common import CommonInfo
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.state import GLOBAL_STEP, Kind, model_key, state_of, whole_tensor
from reshard.storage import MemoryStorage
from reshard.testing import run_ranks, state_on_rank
from tests import saving_runs as runs
from tests.counted import Counted
from tests.loading.test_matrix import ARRAYS, parts
from tests.strategies import Strategy, layouts

# The outcomes of all ranks, and the verdict of rank 0.
STEADY = ["all_gather", "broadcast"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waited", "asynchronous"])
@pytest.mark.parametrize("once", [False, True], ids=["kept", "removed"])
@pytest.mark.parametrize(
    "strategy", [Strategy(dp=2), Strategy(dp=2, fsdp=True), Strategy(dp=4), Strategy(dp=2, tp=2), Strategy(dp=2, pp=2)], ids=str
)
def test_from_the_second_save_on_only_outcomes_are_told(tmp_path: Path, strategy: Strategy, once: bool, asynchronous: bool) -> None:
    """Nothing between saves; the values change from save to save, the layout doesn't."""
    placed = layouts(strategy)

    def work(comm: Communicator) -> list[list[str]]:
        counted = Counted(comm)
        seen = []
        with reshard.CheckpointManager(tmp_path, communicator=counted, remove_redundancy=once, async_save=asynchronous) as manager:
            for step in range(1, 5):
                counted.calls.clear()
                # A new state each time, as a capture of a module is.
                arrays = {key: array if key == GLOBAL_STEP else np.roll(array, step) for key, array in ARRAYS.items()}
                state = state_on_rank(arrays, placed, comm.rank)
                report = manager.save(
                    step,
                    model=parts(state, Kind.MODEL),
                    optimizer=parts(state, Kind.OPTIMIZER),
                    scheduler={"last": step},
                    common=CommonInfo(global_step=12),
                )
                assert report.step == step
                manager.wait()
                seen.append(list(counted.calls))
            counted.calls.clear()
            manager.wait()
        assert counted.calls == []
        return seen

    expected = [["all_gather", *STEADY], STEADY, STEADY, STEADY]
    assert run_ranks(strategy.world_size, work) == [expected] * strategy.world_size


def calls_of_saves(world: int, sizes: Sequence[Sequence[int]], options: SaveOptions) -> list[list[list[str]]]:
    """What each rank calls in each of some saves, of a weight and of as many others as `sizes` says for the save and the rank."""
    storage = MemoryStorage()

    def work(comm: Communicator) -> list[list[str]]:
        counted = Counted(comm)
        seen = []
        with Saver(storage, counted, runs.ROOT, options) as saver:
            for step, numbers in enumerate(sizes):
                counted.calls.clear()
                tensors = [whole_tensor(model_key(f"w{i}"), np.ones(2)) for i in range(1 + numbers[comm.rank])]
                saver.save(step, state_of(*tensors), CommonInfo())
                seen.append(list(counted.calls))
        return seen

    return run_ranks(world, work)


def test_a_layout_that_changes_is_told_with_the_outcomes() -> None:
    expected = [["all_gather", *STEADY], STEADY, STEADY, STEADY]
    assert calls_of_saves(2, [(0, 0), (0, 0), (1, 1), (1, 1)], SaveOptions()) == [expected] * 2


def test_where_regions_are_written_once_outcomes_are_told_again_when_a_layout_changes() -> None:
    """What the others were to write follows from what has changed."""
    expected = [["all_gather", *STEADY], STEADY, ["all_gather", *STEADY], STEADY, ["all_gather", *STEADY], STEADY]
    changes = [(0, 0), (0, 0), (0, 1), (0, 1), (1, 1), (1, 1)]
    assert calls_of_saves(2, changes, SaveOptions(remove_redundancy=True)) == [expected] * 2
