"""Asynchronous saves: what is saved is the state at the call, whatever training does next; errors come at the next call, on every rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard import manager as manager_module
from reshard.comm import Communicator
from reshard.comm.together import attempt
from reshard.errors import SaveError, StorageError, UsageError
from reshard.saving import async_saver
from reshard.saving.async_saver import AsyncSaver
from reshard.saving.background import Background
from reshard.saving.latch import Latch
from reshard.saving.report import SaveReport
from reshard.storage import PosixStorage
from reshard.storage.storage import WritableFile
from reshard.testing import run_ranks, run_ranks_settled


class Gate(PosixStorage):
    """A storage that creates no data file before it is let through."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        self.failing = False

    def create(self, path: str, size: int) -> WritableFile:
        if path.endswith(".safetensors") and "/extra/" not in path:
            self.reached.set()
            assert self.opened.wait(60)
            if self.failing:
                raise StorageError("can't create the file", file=path, found="broken on purpose")
        return super().create(path, size)


def weights(step: int) -> dict[str, np.ndarray]:
    return {"w": np.full((64, 32), step, np.float32), "b": np.arange(5) + step}


def loaded(root: Path, step: int) -> dict[str, np.ndarray]:
    found = {name: np.zeros_like(array) for name, array in weights(0).items()}
    reshard.load(root / f"iteration_{step:08d}", model=found)
    return found


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(found[name], expected[name]) for name in expected)


def test_the_call_returns_before_anything_is_written_and_the_state_is_that_of_the_call(tmp_path: Path) -> None:
    gate = Gate()
    model, extra = weights(7), {"seen": [1, np.arange(3)]}
    with reshard.CheckpointManager(tmp_path, async_save=True, storage=gate) as manager:
        report = manager.save(7, model=model, extra=extra)
        assert report.state == "under way"
        assert report.nbytes >= 64 * 32 * 4
        assert not list(tmp_path.glob("iteration_*"))
        for array in model.values():
            array[...] = -1
        extra["seen"][1][...] = -1
        extra["seen"].append(2)
        status = manager.status()
        assert status.step in (None, 7)
        gate.opened.set()
        final = manager.wait()
        assert final is not None
        assert (final.state, final.step) == ("committed", 7)
        assert manager.status().behind is None
        assert manager.status().step == 7
    assert same(loaded(tmp_path, 7), weights(7))
    seen = reshard.load(tmp_path, model=weights(0)).extra["seen"]
    assert len(seen) == 2
    assert np.array_equal(seen[1], np.arange(3))


class Clock:
    """Time that goes on by an hour with each look, or stands still."""

    def __init__(self, *, stands: bool = False) -> None:
        self.now = 0.0
        self.step = 0 if stands else 3600

    def perf_counter(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, bool]]:
    """How long each thread of a save was to stay back, and whether somebody waited for it then; none does."""
    seen: list[tuple[float, bool]] = []
    wait = Latch.wait

    def wait_or_note(latch: Latch, timeout: float | None = None) -> bool:
        if timeout is None:
            return wait(latch)
        seen.append((timeout, latch.is_set))
        return latch.is_set

    monkeypatch.setattr(Latch, "wait", wait_or_note)
    return seen


def test_a_save_stays_back_after_a_call_until_somebody_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks of the machine may still be in theirs."""
    monkeypatch.setattr(async_saver, "cores_per_rank", lambda: 0.5)
    monkeypatch.setattr(async_saver, "time", Clock())
    monkeypatch.setattr(async_saver, "_LONGEST_PAUSE", 3600)
    gate = Gate()
    gate.opened.set()
    with reshard.CheckpointManager(tmp_path, async_save=True, storage=gate) as manager:
        manager.save(1, model=weights(1))
        assert not gate.reached.wait(0.2)
        manager.before_update()  # all was copied in the call
        assert not gate.reached.is_set()
        final = manager.wait()
    assert final is not None
    assert final.state == "committed"
    assert same(loaded(tmp_path, 1), weights(1))


@pytest.mark.parametrize(("cores", "expected"), [(0.5, [(1.0, False)]), (1.0, []), (16.0, [])])
def test_it_stays_back_where_ranks_share_cores_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[tuple[float, bool]], cores: float, expected: list[tuple[float, bool]]
) -> None:
    monkeypatch.setattr(async_saver, "cores_per_rank", lambda: cores)
    monkeypatch.setattr(async_saver, "time", Clock())
    gate = Gate()
    with reshard.CheckpointManager(tmp_path, async_save=True, storage=gate) as manager:
        manager.save(1, model=weights(1))
        assert gate.reached.wait(60)
        gate.opened.set()
    assert pauses == expected


def test_it_stays_back_no_longer_for_having_waited_for_the_save_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[tuple[float, bool]]
) -> None:
    monkeypatch.setattr(async_saver, "cores_per_rank", lambda: 0.5)
    clock = Clock(stands=True)
    monkeypatch.setattr(async_saver, "time", clock)
    monkeypatch.setattr(manager_module, "time", clock)
    has_room = AsyncSaver.has_room

    def has_room_later(saver: AsyncSaver) -> bool:
        clock.now += 3600
        return has_room(saver)

    monkeypatch.setattr(AsyncSaver, "has_room", has_room_later)
    with reshard.CheckpointManager(tmp_path, async_save=True) as manager:
        assert manager.save(1, model=weights(1)).seconds == 3600
        manager.save(2, model=weights(2))
    assert not any(pause for pause, _ in pauses)


def test_a_save_in_its_caller_does_not_stay_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[tuple[float, bool]]) -> None:
    """At the process's exit there is no thread for it."""

    def refuse(background: Background[SaveReport], work: Callable[[], SaveReport]) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(async_saver, "cores_per_rank", lambda: 0.5)
    monkeypatch.setattr(async_saver, "time", Clock())
    monkeypatch.setattr(Background, "start", refuse)
    with reshard.CheckpointManager(tmp_path, async_save=True) as manager:
        assert manager.save(1, model=weights(1)).state == "committed"
    assert pauses == [(1.0, True)]


@pytest.mark.parametrize("is_begun", [False, True])
def test_an_interrupt_while_a_save_begins_leaves_its_buffers_to_it_or_to_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_begun: bool
) -> None:
    gate = Gate()
    start: Callable[..., Any] = ThreadPoolExecutor.submit

    def submit(executor: ThreadPoolExecutor, function: Callable[[], object]) -> None:
        if is_begun:
            start(executor, function)
            assert gate.reached.wait(60)
        raise KeyboardInterrupt

    model = weights(1)
    with reshard.CheckpointManager(tmp_path, async_save=True, storage=gate) as manager:
        with monkeypatch.context() as patched:
            patched.setattr(ThreadPoolExecutor, "submit", submit)
            with pytest.raises(KeyboardInterrupt):
                manager.save(1, model=model)
        threading.Timer(0.2, gate.opened.set).start()
        for name, array in weights(2).items():
            model[name][...] = array
        manager.save(2, model=model)
    if is_begun:
        assert same(loaded(tmp_path, 1), weights(1))
    assert same(loaded(tmp_path, 2), weights(2))
    assert len(list(tmp_path.glob("iteration_*"))) == 1 + is_begun


def test_a_second_save_waits_for_the_first_one(tmp_path: Path) -> None:
    gate = Gate()
    with reshard.CheckpointManager(tmp_path, async_save=True, storage=gate) as manager:
        manager.save(1, model=weights(1))
        assert gate.reached.wait(60)
        before = time.monotonic()
        threading.Timer(0.2, gate.opened.set).start()
        manager.save(2, model=weights(2))
        assert time.monotonic() - before > 0.1
    assert same(loaded(tmp_path, 1), weights(1))
    assert same(loaded(tmp_path, 2), weights(2))


@pytest.mark.parametrize("world", [1, 3])
def test_or_is_skipped_on_every_rank_alike(tmp_path: Path, world: int) -> None:
    gates = [Gate() for _ in range(world)]

    def work(comm: Communicator) -> list[str]:
        gate = gates[comm.rank]
        with reshard.CheckpointManager(tmp_path, async_save=True, when_busy="skip", storage=gate, communicator=comm) as manager:
            states = [manager.save(1, model=weights(1)).state, manager.save(2, model=weights(2)).state]
            gate.opened.set()
            manager.wait()
            return [*states, manager.save(3, model=weights(3)).state]

    assert run_ranks(world, work) == [["under way", "skipped", "under way"]] * world
    assert sorted(path.name for path in tmp_path.glob("iteration_*")) == ["iteration_00000001", "iteration_00000003"]
    assert same(loaded(tmp_path, 3), weights(3))


@pytest.mark.parametrize("call", ["save", "load", "wait", "close"])
def test_a_failure_on_one_rank_is_every_ranks_error_at_the_next_call(tmp_path: Path, call: str) -> None:
    gates = [Gate(), Gate()]
    gates[1].failing = True
    for gate in gates:
        gate.opened.set()
    calls: dict[str, Callable[[reshard.CheckpointManager], Any]] = {
        "save": lambda manager: manager.save(2, model=weights(2)),
        "load": lambda manager: manager.load(model=weights(0)),
        "wait": lambda manager: manager.wait(),
        "close": lambda manager: manager.close(),
    }

    def work(comm: Communicator) -> str:
        manager = reshard.CheckpointManager(tmp_path, async_save=True, storage=gates[comm.rank], communicator=comm)
        try:
            manager.save(1, model=weights(1))
            with pytest.raises(SaveError, match=r"rank 1[\s\S]*broken on purpose") as caught:
                calls[call](manager)
            if call != "close":
                gates[comm.rank].failing = False
                manager.save(3, model=weights(3))  # it is raised once
        finally:
            manager.close()
        return str(caught.value)

    first, second = run_ranks(2, work)
    assert first == second
    names = [path.name for path in tmp_path.glob("iteration_*")]
    assert names == ([] if call == "close" else ["iteration_00000003"])


def test_what_can_not_be_captured_on_one_rank_fails_the_save_on_all(tmp_path: Path) -> None:
    def work(comm: Communicator) -> None:
        with reshard.CheckpointManager(tmp_path, async_save=True, communicator=comm) as manager:
            manager.save(1, model={"w": np.zeros(3, np.complex128 if comm.rank == 1 else np.complex64)})

    outcomes = run_ranks_settled(2, work)
    assert [type(outcome).__name__ for outcome in outcomes] == ["UsageError"] * 2 or all(
        "rank 1" in str(outcome) for outcome in outcomes
    ), outcomes
    assert not list(tmp_path.glob("iteration_*"))


def test_a_process_that_ends_without_closing_finishes_the_save(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = """
import sys, time, numpy as np, reshard
from reshard.storage import PosixStorage
class Slow(PosixStorage):
    def create(self, path, size):
        time.sleep(0.3)
        return super().create(path, size)
manager = reshard.CheckpointManager(sys.argv[1], async_save=True, storage=Slow())
manager.save(4, model={"w": np.full((64, 32), 4, np.float32), "b": np.arange(5) + 4})
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(tmp_path)], check=True, timeout=60)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    assert same(loaded(tmp_path, 4), weights(4))


@pytest.mark.parametrize(("field", "values"), [("async_save", ("copy", "deferred")), ("when_busy", ("wait", "skip"))])
def test_ranks_that_save_differently_are_told_so(tmp_path: Path, field: str, values: tuple[str, str]) -> None:
    def work(comm: Communicator) -> None:
        options: dict[str, Any] = {"async_save": True, field: values[comm.rank]}
        with reshard.CheckpointManager(tmp_path, communicator=comm, **options) as manager:
            manager.save(1, model=weights(1))
            manager.save(2, model=weights(2))

    outcomes = run_ranks_settled(2, work, timeout=5)
    assert all(isinstance(outcome, UsageError) and field in str(outcome) for outcome in outcomes), outcomes


def test_a_thread_that_can_not_be_had_is_noticed_before_anything_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later it would be too late: work that has no thread waits, and would be done with the buffers of the next save."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("reshard-save"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            reshard.CheckpointManager(tmp_path, async_save=True)
    with reshard.CheckpointManager(tmp_path, async_save=True, lock_timeout=0.0) as manager:
        manager.save(2, model=weights(2))
    assert [path.name for path in tmp_path.glob("iteration_*")] == ["iteration_00000002"]
    assert same(loaded(tmp_path, 2), weights(2))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_status_of_a_save_that_never_wrote_is_of_that_save(tmp_path: Path, asynchronous: bool) -> None:
    with reshard.CheckpointManager(tmp_path, async_save=asynchronous) as manager:
        manager.save(1, model=weights(1))
        manager.wait()
        _, failed = attempt(lambda: manager.save(2, model=weights(2), extra={"what": object()}) and manager.wait())
        assert isinstance(failed, UsageError)
        said = manager.status().ranks[0]
        assert said is not None
        assert (said.step, said.phase) == (2, "failed")


@pytest.mark.parametrize("option", [{"async_save": "later"}, {"async_save": 1}, {"when_busy": "drop"}])
def test_options_that_can_not_be(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(option))):
        reshard.CheckpointManager(tmp_path / "root", **option)
    assert not (tmp_path / "root").exists()


def test_status_names_the_rank_that_is_behind(tmp_path: Path) -> None:
    gates = [Gate() for _ in range(3)]
    gates[0].opened.set()
    gates[2].opened.set()

    def work(comm: Communicator) -> str:
        with reshard.CheckpointManager(tmp_path, async_save=True, storage=gates[comm.rank], communicator=comm) as manager:
            manager.save(1, model=weights(1))
            text = ""
            if comm.rank == 0:
                assert gates[1].reached.wait(60)
                deadline = time.monotonic() + 60
                while manager.status().behind != 1 or "committing" not in str(manager.status()):
                    assert time.monotonic() < deadline, str(manager.status())
                    time.sleep(0.01)
                text = str(manager.status())
                gates[1].opened.set()
            manager.wait()
            return text

    text = run_ranks(3, work)[0]
    assert "the others wait for rank 1" in text
    assert "rank 1: writing, 0.0 of" in text
