"""How often ranks wait for each other in a load: no more than they have to tell each other something."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import CaptureError
from reshard.loading import filling, planned
from reshard.loading.report import RestoreReport
from reshard.testing import run_ranks
from tests.counted import Counted

WEIGHTS = {"w": np.arange(6, dtype=np.float32)}
MOMENTS = {"adam_m.w": np.ones(6, np.float32)}

# What rank 0 found; the plans; how it went.
TENSORS_ONLY = ["broadcast", "all_gather", "all_gather"]
# And how the installation went.
WITH_MORE = [*TENSORS_ONLY, "all_gather"]


def rounds(root: Path, **parts: Any) -> list[str]:
    """What two ranks call in a load that is checked to have filled the weights."""

    def work(comm: Communicator) -> list[str]:
        counted = Counted(comm)
        model = {"w": np.zeros(6, np.float32)}
        own = {name: make() for name, make in parts.items()}
        with reshard.CheckpointManager(root, communicator=counted, read_only=True) as manager:
            counted.calls.clear()
            manager.load(model=model, **own)
            calls = list(counted.calls)
        assert (model["w"] == WEIGHTS["w"]).all()
        return calls

    first, second = run_ranks(2, work)
    assert first == second
    return first


def test_tensors_alone_need_no_second_word(tmp_path: Path) -> None:
    reshard.save(tmp_path, 1, model=WEIGHTS, optimizer=MOMENTS)
    assert rounds(tmp_path) == TENSORS_ONLY
    # Random states are those of another strategy: nothing is restored, but new ones are wanted.
    assert rounds(tmp_path, reseed=lambda: 7) == WITH_MORE


def test_what_is_installed_is_told(tmp_path: Path) -> None:
    moments = {**MOMENTS, "global_step": np.array([3], np.int32)}
    reshard.save(tmp_path, 1, model=WEIGHTS, optimizer=moments, scheduler={"last": 3})
    assert rounds(tmp_path) == WITH_MORE, "the scheduler's values come back"
    reshard.save(tmp_path, 2, model=WEIGHTS, optimizer=moments)
    assert rounds(tmp_path, optimizer=lambda: {"adam_m.w": np.zeros(6, np.float32)}) == WITH_MORE, "the step count gets a place"


def test_the_report_says_how_long_the_whole_load_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one rank is slow to plan and another to read, so that no rank's own work adds up to it."""
    reshard.save(tmp_path, 1, model=WEIGHTS)
    pause = 0.3
    slow = threading.local()

    def delayed(work: Callable[..., Any], rank: int) -> Callable[..., Any]:
        def later(*args: Any, **kwargs: Any) -> Any:
            if slow.rank == rank:
                time.sleep(pause)
            return work(*args, **kwargs)

        return later

    monkeypatch.setattr(planned, "locate", delayed(planned.locate, 0))
    monkeypatch.setattr(filling, "read_direct", delayed(filling.read_direct, 1))

    def work(comm: Communicator) -> RestoreReport:
        slow.rank = comm.rank
        return reshard.load(tmp_path, model={"w": np.zeros(6, np.float32)}, communicator=comm)

    first, second = run_ranks(2, work)
    assert first == second
    assert first.seconds > 2 * pause


@pytest.mark.parametrize("broken", [0, 1])
def test_a_run_that_cannot_be_filled_is_told_by_whoever_has_it(broken: int, tmp_path: Path) -> None:
    """Ranks look at their runs at different times: rank 0 after it has chosen, the others before they hear what."""
    reshard.save(tmp_path, 1, model=WEIGHTS)

    def work(comm: Communicator) -> str:
        model = {"w": np.zeros(6, np.float32)}
        model["w"].flags.writeable = comm.rank != broken
        with pytest.raises(CaptureError, match="read-only") as raised:
            reshard.load(tmp_path, model=model, communicator=comm)
        assert (model["w"] == 0).all()
        return str(raised.value)

    first, second = run_ranks(2, work)
    assert first == second
    assert f"rank {broken}" in first


def test_a_run_that_cannot_be_filled_matters_only_if_there_is_something_to_load(tmp_path: Path) -> None:
    def work(comm: Communicator) -> object:
        with reshard.CheckpointManager(tmp_path / "none", communicator=comm) as manager:
            return manager.load(model={"w": object()}, missing_ok=True)

    assert run_ranks(2, work) == [None, None]
