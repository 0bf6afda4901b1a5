"""The exchange of a balanced load on its own terms: any order of events, what it keeps, and ranks that go away in the middle."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import CommunicationError, StorageError
from reshard.loading import lanes, reader
from reshard.state import Kind, ShardedTensor, TensorKey
from reshard.storage import Storage
from reshard.storage.memory import MemoryStorage
from reshard.testing import FaultyStorage, differences, mesh_of, run_ranks, run_ranks_settled, split, state_on_rank
from tests.loading.test_random_layouts import named

BUDGET = 1 << 20  # the least: messages of 32 KiB, stages of 384


class Wrapped:
    """A communicator that does something of its own around some calls."""

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner
        self.rank, self.world_size = inner.rank, inner.world_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class Meeting(Wrapped):
    """Sends as if nothing were buffered on the way: until the other has taken it. Both ends come late, by chance."""

    def __init__(self, inner: Communicator, taken: dict[tuple[int, int], threading.Semaphore], seed: int) -> None:
        super().__init__(inner)
        self._taken = taken
        self._random = np.random.default_rng((seed, inner.rank))
        self._guard = threading.Lock()

    def dawdle(self) -> None:
        with self._guard:
            delay = self._random.random() ** 4 / 100
        time.sleep(delay)

    def send(self, data: bytes | memoryview, target: int) -> None:
        self.dawdle()
        self.inner.send(data, target)
        assert self._taken[self.rank, target].acquire(timeout=60), "nobody takes it"

    def recv(self, source: int) -> bytes:
        self.dawdle()
        data = self.inner.recv(source)
        self._taken[source, self.rank].release()
        return data


def arrays(*shapes: tuple[int, int]) -> dict[TensorKey, np.ndarray]:
    return {
        TensorKey(Kind.MODEL, None, f"w{number}"): np.random.default_rng(number).integers(0, 256, shape, np.uint8)
        for number, shape in enumerate(shapes)
    }


def save(whole: Mapping[TensorKey, np.ndarray], ranks: int = 2) -> MemoryStorage:
    """A checkpoint whose tensors are split by rows."""
    storage = MemoryStorage()
    mesh = mesh_of(tp=ranks)

    def work(comm: Communicator) -> None:
        state = state_on_rank(whole, {key: split(mesh, "tp", None) for key in whole}, comm.rank)
        reshard.save("/root", 1, communicator=comm, storage=storage, model=named(state))

    run_ranks(ranks, work)
    return storage


def load(comm: Communicator, storage: Storage, model: Mapping[str, ShardedTensor]) -> reshard.RestoreReport:
    return reshard.load("/root", communicator=comm, storage=storage, model=model, balanced=True, memory_budget=BUDGET)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("placement", [(None, "tp"), (None, None)], ids=["columns", "replicas"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_no_order_of_events_leads_into_a_deadlock(world: int, placement: tuple, seed: int) -> None:
    whole = arrays((2000, 512), (1000, 512), (300, 512), (1, 512), (999, 512))
    storage = save(whole)
    taken = {(a, b): threading.Semaphore(0) for a in range(world) for b in range(world)}

    def work(comm: Communicator) -> list[str]:
        state = state_on_rank(whole, {key: split(mesh_of(tp=world), *placement) for key in whole}, comm.rank, blank=True)
        load(Meeting(comm, taken, seed), storage, named(state))
        return differences(whole, state)

    assert run_ranks(world, work, timeout=60) == [[]] * world


def test_stages_of_growing_size_take_no_more_memory() -> None:
    """Twenty-four stages of each rank, each a little larger than the one before it."""
    whole = arrays(*((240 + number // 24, 128) for number in range(24 * 16)))
    storage = save(whole, ranks=1)
    placed = {key: split(mesh_of(dp=2), None, None) for key in whole}
    states = [state_on_rank(whole, placed, rank, blank=True) for rank in range(2)]
    models = [named(state) for state in states]
    tracemalloc.start()
    try:
        reports = run_ranks(2, lambda comm: load(comm, storage, models[comm.rank]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(differences(whole, state) == [] for state in states)
    assert reports[0].bytes_read == sum(array.nbytes for array in whole.values()) > 11 * BUDGET
    # What both took, their plans and catalogs included; without the reuse of buffers it is twice as much.
    assert peak < 2 * (BUDGET + 2048 * len(whole)) + (5 << 20)


def test_what_arrives_after_the_load_was_broken_off_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank is interrupted in the middle; the caller goes on, and only then comes another rank's message."""
    whole = arrays((64, 512), (64, 512))
    storage = save(whole)
    keys = list(whole)
    resumed = threading.Event()

    class EnoughError(Exception):
        """Ends the other rank's waiting, too."""

    class Late(Wrapped):
        def recv(self, source: int) -> bytes:
            data = self.inner.recv(source)
            if threading.current_thread().name == "reshard-exchange":
                assert resumed.wait(60)
            return data

    class Interrupted(FaultyStorage):
        def _do(self, name: str, path: str, work: Any, torn: Any = None) -> Any:
            if name in ("read_into", "scatter") and threading.current_thread().name.startswith("reshard-read"):
                raise KeyboardInterrupt
            return work()

    def work(comm: Communicator) -> None:
        # Rank 0 alone wants the first tensor, so it reads it straight; both want the second.
        wanted = {key: whole[key] for key in (keys if comm.rank == 0 else keys[1:])}
        state = state_on_rank(wanted, {key: split(mesh_of(dp=2), None, None) for key in wanted}, comm.rank, blank=True)
        memory = [tensor.shards[0].memory.read() for tensor in state.tensors.values()]
        if comm.rank == 1:
            load(comm, storage, named(state))
        with pytest.raises(KeyboardInterrupt):
            load(Late(comm), Interrupted(storage), named(state))
        left = [array.copy() for array in memory]
        resumed.set()
        for thread in threading.enumerate():
            # One that is only about to begin can't be joined; it is the other rank's, which nobody interrupted.
            if thread.name == "reshard-exchange" and thread.is_alive():
                thread.join(60)
        assert all(np.array_equal(old, array) for old, array in zip(left, memory, strict=True))
        raise EnoughError

    # One thread that isn't the caller's, whatever the machine has.
    monkeypatch.setattr(lanes, "count_readers", lambda: 2)
    monkeypatch.setattr(reader, "count_readers", lambda: 2)
    outcomes = run_ranks_settled(2, work)
    assert isinstance(outcomes[0], EnoughError), outcomes[0]
    assert isinstance(outcomes[1], CommunicationError)


@pytest.mark.parametrize("method", ["send", "recv"])
@pytest.mark.parametrize("error", [MemoryError, CommunicationError])
def test_a_rank_that_cannot_reach_another_says_why_and_the_others_hear(method: str, error: type[Exception]) -> None:
    """Rank 1 loses rank 0 in the middle. Rank 2, which both still reach, is told; nobody waits for a time limit."""
    whole = arrays((4000, 512))
    storage = save(whole)
    lost, told = threading.Event(), threading.Event()

    class Losing(Wrapped):
        def __init__(self, inner: Communicator) -> None:
            super().__init__(inner)
            self._left = 3

        def _fails(self, peer: int, name: str) -> bool:
            if peer or name != method or threading.current_thread().name != "reshard-exchange":
                return False
            self._left -= 1
            if self._left < 0:
                lost.set()
            return self._left < 0

        def send(self, data: bytes | memoryview, target: int) -> None:
            if self._fails(target, "send"):
                raise error("simulated failure")
            if target == 2:
                # It still has something to tell rank 2 by then.
                assert lost.wait(60)
            self.inner.send(data, target)

        def recv(self, source: int) -> bytes:
            if self._fails(source, "recv"):
                raise error("simulated failure")
            return self.inner.recv(source)

    class Listening(Wrapped):
        def recv(self, source: int) -> bytes:
            data = self.inner.recv(source)
            if source == 1 and len(data) == 1:
                told.set()
            return data

    def work(comm: Communicator) -> None:
        state = state_on_rank(whole, {key: split(mesh_of(dp=3), None, None) for key in whole}, comm.rank, blank=True)
        load((Wrapped, Losing, Listening)[comm.rank](comm), storage, named(state))

    outcomes = run_ranks_settled(3, work, timeout=60)
    assert all(isinstance(outcome, CommunicationError) for outcome in outcomes)
    assert "simulated failure" in str(outcomes[1])
    assert told.is_set()


def test_an_error_of_its_own_is_not_lost_when_another_rank_is_gone_too() -> None:
    whole = arrays((4000, 512))
    storage = save(whole)

    class Gone(Wrapped):
        def all_gather(self, data: bytes) -> list[bytes]:
            if b"simulated failure" in data:
                raise CommunicationError("a rank is gone")
            return self.inner.all_gather(data)

    def work(comm: Communicator) -> None:
        state = state_on_rank(whole, {key: split(mesh_of(dp=2), None, None) for key in whole}, comm.rank, blank=True)
        faulty = FaultyStorage(storage, fail_at=12, operations=["read_into"])
        load(Gone(comm), faulty if comm.rank == 1 else storage, named(state))

    outcomes = run_ranks_settled(2, work, timeout=60)
    assert isinstance(outcomes[1], CommunicationError)
    assert isinstance(outcomes[1].__cause__, StorageError)
    assert "simulated failure" in str(outcomes[1])


def test_a_rank_that_gets_no_threads_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = arrays((4000, 512))
    storage = save(whole)
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name == "reshard-exchange" and threading.current_thread().name == "rank-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)

    def work(comm: Communicator) -> None:
        state = state_on_rank(whole, {key: split(mesh_of(dp=2), None, None) for key in whole}, comm.rank, blank=True)
        load(comm, storage, named(state))

    outcomes = run_ranks_settled(2, work, timeout=60)
    assert all(isinstance(outcome, CommunicationError) for outcome in outcomes)
    assert "can't start new thread" in str(outcomes[1])
