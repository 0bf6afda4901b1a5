"""Snapshots of which a part is copied later: by who finishes, and by who waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest

from reshard.geometry import Region
from reshard.geometry.dtypes import by_numpy
from reshard.saving import latch, snapshot
from reshard.saving.snapshot import Snapshot, SnapshotBuffers
from reshard.state import HostMemory, Shard, ShardedTensor, State, model_key
from tests.interrupts import interrupted_at

ARRAYS = {name: np.arange(size, dtype=np.float32) for name, size in (("a", 5), ("b", 100), ("c", 33))}


def taken() -> Snapshot:
    tensors = {}
    for name, array in ARRAYS.items():
        key = model_key(name)
        shard = Shard(Region.whole(array.shape), HostMemory(array.copy()))
        tensors[key] = ShardedTensor(key, by_numpy(array.dtype), array.shape, None, (shard,))
    state = State(tensors, updated=frozenset(tensors))
    return SnapshotBuffers(lambda nbytes: np.zeros(nbytes, np.uint8)).take(state, deferred=True)


def check(made: Snapshot) -> None:
    for name, array in ARRAYS.items():
        assert np.array_equal(made.state.tensors[model_key(name)].shards[0].memory.read(), array)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], list[int]]:
    """Shards are copied in parts of 64 bytes; a function is called before each, and the list has the bytes of each."""

    def install(before: Callable[[], None]) -> list[int]:
        quick, sizes = snapshot._copy, []

        def copy(source: Any, target: Any, base: int, begin: int, end: int) -> Any:
            before()
            sizes.append(end - begin)
            return quick(source, target, base, begin, end)

        monkeypatch.setattr(snapshot, "_PART_BYTES", 64)
        monkeypatch.setattr(snapshot, "_copy", copy)
        return sizes

    return install


def test_who_waits_copies_what_nobody_has_begun(copies: Callable[[Callable[[], None]], list[int]]) -> None:
    sizes = copies(lambda: None)
    made = taken()
    waiting = threading.Thread(target=made.wait)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert made.is_copied  # nobody had begun anything, and no device copies
    assert not made.wanted.is_set
    assert sum(sizes) == made.later == sum(array.nbytes for array in ARRAYS.values())
    made.finish()
    assert max(sizes) == 64
    check(made)


def test_who_waits_returns_when_the_others_part_is_copied_too(copies: Callable[[Callable[[], None]], list[int]]) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def before() -> None:
        if threading.current_thread() is finishing:
            begun.set()
            assert may_end.wait(60)

    copies(before)
    made = taken()
    finishing = threading.Thread(target=made.finish)
    finishing.start()
    assert begun.wait(60)
    waiting = threading.Thread(target=made.wait)
    waiting.start()
    assert made.wanted.wait(60)
    waiting.join(0.2)
    assert waiting.is_alive()
    may_end.set()
    waiting.join(60)
    finishing.join(60)
    assert made.is_copied
    check(made)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_breaks_off_a_waiter_s_part_leaves_it_to_who_finishes_and_is_raised(
    copies: Callable[[Callable[[], None]], list[int]], error: type[BaseException]
) -> None:
    left = [3]

    def before() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    copies(before)
    made = taken()
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            made.wait()
        made.finish()
    else:
        # Who finishes doesn't meet it: it came from a signal's handler.
        finishing = threading.Thread(target=lambda: made.wanted.wait(60) and made.finish())
        finishing.start()
        with pytest.raises(RuntimeError):
            made.wait()
        finishing.join(60)
    assert made.is_copied
    check(made)


def test_what_fails_in_who_waits_and_in_who_finishes_is_raised_there(copies: Callable[[Callable[[], None]], list[int]]) -> None:
    def before() -> None:
        raise RuntimeError("broken")

    copies(before)
    made = taken()
    failed: list[BaseException] = []

    def finish() -> None:
        assert made.wanted.wait(60)
        try:
            made.finish()
        except RuntimeError as error:
            failed.append(error)

    finishing = threading.Thread(target=finish)
    finishing.start()
    made.wait()
    finishing.join(60)
    assert len(failed) == 1


def test_an_error_of_who_finishes_is_raised_there_and_holds_nobody(copies: Callable[[Callable[[], None]], list[int]]) -> None:
    def before() -> None:
        raise RuntimeError("broken")

    copies(before)
    made = taken()
    with pytest.raises(RuntimeError, match="broken"):
        made.finish()
    made.wait()
    assert made.is_copied


class Interrupted:
    """A lock that raises after it was let go of for so many times."""

    def __init__(self, times: int) -> None:
        self.lock = threading.RLock()
        self.left = times

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *arguments: object) -> None:
        self.lock.release()
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupt_between_two_parts_loses_none(copies: Callable[[Callable[[], None]], list[int]]) -> None:
    copies(lambda: None)
    for times in range(1, 12):
        made = taken()
        lock = made._lock = Interrupted(times)  # pyright: ignore[reportAttributeAccessIssue] - used as one
        made._turn = threading.Condition(lock.lock)
        with pytest.raises(KeyboardInterrupt):
            made.wait()
        made.finish()
        assert made.is_copied
        check(made)


def finished(made: Snapshot) -> None:
    """Somebody finishes it, while others wait for it in vain if something was left behind that no one lets go of."""
    threads = [threading.Thread(target=target, daemon=True) for target in (made.finish, made.wait)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert made.is_copied
    check(made)


def test_an_interrupt_anywhere_in_a_wait_leaves_nothing_taken(copies: Callable[[Callable[[], None]], list[int]]) -> None:
    copies(lambda: None)

    def interrupted(point: int) -> bool:
        made = taken()
        came = interrupted_at(point, made.wait, [snapshot, latch, threading])
        finished(made)
        return came

    assert next(point for point in count(1) if not interrupted(point)) > 20


def test_an_interrupt_anywhere_in_a_wait_for_another_thread_leaves_nothing_taken() -> None:
    me = threading.get_ident()

    def refuse() -> None:
        if threading.get_ident() == me:
            raise RuntimeError("not in this thread")

    def interrupted(point: int) -> bool:
        device = Device(np.arange(5.0))
        device.before_wait = refuse
        made = SnapshotBuffers(zeros).take(state_on(w=device), deferred=True)
        finishing = threading.Thread(target=lambda: made.wanted.wait(60) and made.finish(), daemon=True)
        finishing.start()

        def wait() -> None:
            with pytest.raises(RuntimeError):
                made.wait()

        came = interrupted_at(point, wait, [snapshot, latch, threading])
        made.give_back()
        made.wanted.set()
        finishing.join(60)
        assert not finishing.is_alive()
        assert made.is_copied
        assert np.array_equal(made.state.tensors[model_key("w")].shards[0].memory.read(), device.array)
        return came

    assert next(point for point in count(1) if not interrupted(point)) > 10


@pytest.mark.parametrize("next_one", ["waits again", "finishes"])
def test_a_second_interrupt_while_the_first_one_s_part_is_given_back_loses_none(
    copies: Callable[[Callable[[], None]], list[int]], next_one: str
) -> None:
    left = 0

    def before() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    copies(before)

    def interrupted(point: int) -> bool:
        nonlocal left
        left = 3
        made = taken()
        give_back, came = made.give_back, False

        def twice() -> None:
            nonlocal came
            if left > 0:
                give_back()
            elif interrupted_at(point, give_back, [snapshot, threading]):
                came = True
                raise KeyboardInterrupt

        made.give_back = twice
        with pytest.raises(KeyboardInterrupt):
            made.wait()
        made.give_back = give_back
        if next_one == "waits again":
            made.wait()
            assert made.is_copied
            check(made)
        else:
            made.give_back()
        finished(made)
        return came

    assert next(point for point in count(1) if not interrupted(point)) > 3


class Device:
    """Memory of a device that copies beside everything else: here when somebody waits for it.

    Attributes:
        log: what was done, and with which.
        before_wait: called first by whoever waits.
    """

    host = None
    address = None

    def __init__(self, array: np.ndarray, log: list[str] | None = None, name: str = "") -> None:
        self.array = array
        self.nbytes = array.nbytes
        self.log = [] if log is None else log
        self.name = name
        self.before_wait: Callable[[], None] = lambda: None

    def read(self) -> np.ndarray:
        return self.array.copy()

    def write(self, region: Region, values: np.ndarray) -> None:
        self.array[region.slices] = values

    def hold(self) -> Device:
        return self

    def begin_copy(self, target: np.ndarray) -> Callable[[], object]:
        self.log.append(f"{self.name} begun")

        def wait() -> None:
            self.before_wait()
            self.log.append(f"{self.name} copied")
            target[...] = self.array

        return wait


def zeros(nbytes: int) -> np.ndarray:
    return np.zeros(nbytes, np.uint8)


def state_on(*others: str, **devices: Device) -> State:
    """A state on devices, of which an optimizer updates all but some."""
    tensors = {}
    for name, device in devices.items():
        array = device.array
        key = model_key(name)
        tensors[key] = ShardedTensor(key, by_numpy(array.dtype), array.shape, None, (Shard(Region.whole(array.shape), device),))
    return State(tensors, updated=frozenset(tensors) - set(map(model_key, others)))


@pytest.mark.parametrize(
    ("deferred", "waited_for"),
    [(False, ["w", "count", "buffer"]), (True, ["count", "buffer"])],
    ids=["copy", "deferred"],
)
def test_what_a_device_copies_may_be_changed_after_the_call_unless_an_optimizer_s_step_waits_for_it(
    deferred: bool, waited_for: list[str]
) -> None:
    log: list[str] = []
    arrays = {"w": np.arange(3.0), "count": np.array(2.0), "buffer": np.arange(5.0)}
    devices = {name: Device(array.copy(), log, name) for name, array in arrays.items()}
    made = SnapshotBuffers(zeros).take(state_on("buffer", **devices), deferred=deferred)
    assert log == ["w begun", "count begun", "buffer begun", *(f"{name} copied" for name in waited_for)]
    assert made.is_copied is not deferred
    for name in waited_for:
        devices[name].array[...] = -1
    made.finish()
    for name, array in arrays.items():
        assert np.array_equal(made.state.tensors[model_key(name)].shards[0].memory.read(), array)


def test_who_waits_needs_nobody_else_for_what_a_device_copies() -> None:
    device = Device(np.arange(3.0))
    made = SnapshotBuffers(zeros).take(state_on(w=device), deferred=True)
    waiting = threading.Thread(target=made.wait, daemon=True)
    waiting.start()
    waiting.join(60)
    assert not waiting.is_alive()
    assert made.is_copied
    assert not made.wanted.is_set
    assert np.array_equal(made.state.tensors[model_key("w")].shards[0].memory.read(), device.array)


def test_nobody_waits_for_what_nobody_will_finish(copies: Callable[[Callable[[], None]], list[int]]) -> None:
    sizes = copies(lambda: None)
    made = taken()
    made.abandon()
    made.wait()
    assert made.is_copied
    assert sizes == []


def state_of(**arrays: np.ndarray) -> State:
    tensors = {}
    for name, array in arrays.items():
        key = model_key(name)
        tensors[key] = ShardedTensor(key, by_numpy(array.dtype), array.shape, None, (Shard(Region.whole(array.shape), HostMemory(array)),))
    return State(tensors, updated=frozenset(tensors))


@pytest.mark.parametrize("deferred", [False, True])
def test_one_snapshot_after_the_other_in_the_same_memory(deferred: bool) -> None:
    a, b = np.arange(12, dtype=np.float32).reshape(3, 4), np.arange(5, dtype=np.int64)
    states = [
        {"a": a, "b": b},
        {"a": a + 1, "b": b + 1},
        {"a": a.reshape(4, 3), "b": b},
        {"a": a, "b": b.astype(np.float64)},
        {"b": b, "a": a},
        {"a": a},
        {"a": np.concatenate([a] * 50), "b": b},
        {"a": np.concatenate([a] * 50) + 2, "b": b + 2},
        {},
    ]
    buffers = SnapshotBuffers(lambda nbytes: np.zeros(nbytes, np.uint8))
    taken = []
    for arrays in states:
        made = buffers.take(state_of(**arrays), deferred=deferred)
        made.finish()
        assert [key.parameter for key in made.state.tensors] == list(arrays)
        assert made.nbytes == sum(-(-array.nbytes // 64) * 64 for array in arrays.values())
        for name, array in arrays.items():
            tensor = made.state.tensors[model_key(name)]
            copied = tensor.shards[0].memory.read()
            assert (copied.dtype, copied.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(copied, array)
        taken.append([tensor.shards[0].memory for tensor in made.state.tensors.values()])
    # Of the same tensors it makes no new objects.
    for first, second in ((0, 1), (6, 7)):
        assert all(one is other for one, other in zip(taken[first], taken[second], strict=True))
