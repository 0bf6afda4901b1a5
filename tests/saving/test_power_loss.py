"""The power fails after any operation of a save: what was committed is there, whole; and every fsync of the code is needed for that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from threading import current_thread

import pytest

from reshard.format.seal import read_seal
from reshard.sources.resolve import list_iterations
from reshard.storage import MemoryStorage
from reshard.testing import PowerLossStorage
from reshard.testing.power_loss import Moment
from tests import saving_runs as runs
from tests.faults import POWER, Tried
from tests.saving.test_faults import ACTIONS, TWO, before, check_next_save, each_action

# Different states of the disk that are looked at after each operation; in the sweep.
FEW, MANY = 6, 200


def moments_of(
    action: str, exchange: str, world_size: int, ignores: Callable[[str], bool] | None = None
) -> tuple[list[Moment], dict[str, int]]:
    """The moments of a save, the last one when it has returned; and from where something was made durable."""
    _, step, _ = ACTIONS[action]
    moments: list[Moment] = []
    start = before(action, exchange, world_size)
    # Each rank is on a machine of its own.
    storage = PowerLossStorage(start, ignores=ignores, watch=moments.append, client=lambda: current_thread().name)
    runs.save(storage, [step], options=TWO, world_size=world_size)
    return moments, storage.places


def found_after(storage: MemoryStorage) -> tuple[dict[int, int], int | None]:
    """What a new process finds: the committed iterations, each read whole, with their versions, and what the tracker names."""
    if storage.stat(runs.ROOT) is None:
        return {}, None
    for _, directory in list_iterations(storage, runs.ROOT):
        seal = read_seal(storage, directory)
        assert seal is not None
        for name, sealed in seal.files.items():
            entry = storage.stat(f"{directory}/{name}")
            assert entry is not None
            assert entry.size == sealed.size
    return runs.committed(storage), runs.tracked(storage)


def check(storage: MemoryStorage, action: str, *, is_over: bool) -> None:
    existing, (step, version), after = ACTIONS[action]
    found, tracked = found_after(storage)
    for number, seen in found.items():
        assert seen in ((existing.get(number), version) if number == step else (existing[number],))
    if is_over:
        assert tracked == step
        assert set(after) <= set(found)
        assert found[step] == version
    elif existing:
        assert tracked in (2, step)
        assert found[tracked] in (existing.get(tracked), version if tracked == step else None)
        if tracked == 2 and step != 2:
            assert set(existing) <= set(found)
        assert step in found or step not in existing
    else:
        # Plainly none: a whole one that nothing names yet is no lie.
        assert tracked in (None, step)
        assert tracked is None or found == {step: version}


def crash_everywhere(action: str, exchange: str, world_size: int, limit: int, ignores: Callable[[str], bool] | None = None) -> int:
    """Look at what may be found after each operation; how many different states that were."""
    moments, _ = moments_of(action, exchange, world_size, ignores)
    count = 0
    # By the last moment the save has returned. From the end: there most is at stake.
    for number, moment in reversed(list(enumerate(moments))):
        for storage in moment.outcomes(limit, seed=number):
            count += 1
            try:
                check(storage, action, is_over=moment is moments[-1])
                if ignores is None:
                    check_next_save(storage, world_size, str(moment.operation))
            except Exception as error:
                raise AssertionError(f"after operation {number} of {len(moments)}, {moment.operation}: {error}") from error
    return count


@each_action
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.sweep)])
def test_the_power_fails_after_any_operation(tried: Tried, action: str, exchange: str, world_size: int) -> None:
    states = crash_everywhere(action, exchange, world_size, FEW)
    assert states > 60
    tried(POWER, states, is_part=world_size == 1)


@pytest.mark.sweep
@each_action
def test_the_power_fails_in_many_ways(tried: Tried, action: str, exchange: str) -> None:
    states = crash_everywhere(action, exchange, 1, MANY)
    assert states > 500
    tried(POWER, states)


NEEDED_BY = [("the first", "exchange"), ("another", "exchange"), ("the newest again", "two renames"), ("the newest again", "exchange")]


def test_each_fsync_is_needed() -> None:
    """Without any one of them, some loss of power loses what was committed, or shows something broken as a checkpoint."""
    places: set[str] = set()
    for action, exchange in NEEDED_BY:
        places |= set(moments_of(action, exchange, 2)[1])
    # Of the lock file only its being there counts, and only while processes live.
    places = {place for place in places if "take_lock" not in place}
    assert len(places) >= 12
    assert [place for place in sorted(places) if not is_needed(place)] == []


def is_needed(place: str) -> bool:
    """Whether a loss of power does harm without what is made durable from there."""
    for action, exchange in NEEDED_BY:
        with suppress(AssertionError):
            crash_everywhere(action, exchange, 2, 24, lambda other: other == place)
            continue
        return True
    return False


def test_what_is_durable_survives_and_what_is_not_may_be_lost() -> None:
    moments: list[Moment] = []
    storage = PowerLossStorage(watch=moments.append)
    storage.make_directory("/d")
    storage.sync_directory("/")
    storage.write_bytes("/d/a", b"1234")
    seen = {tuple((entry.name, other.read_bytes(f"/d/{entry.name}")) for entry in other.list("/d")) for other in moments[-1].outcomes(100)}
    assert seen == {(), (("a", b"1234"),)}
    storage.sync_directory("/d")
    with storage.create("/d/b", 4) as file:
        file.write_at(0, memoryview(b"abcd"))
    found = {other.read_bytes("/d/b") for other in moments[-1].outcomes(100) if other.stat("/d/b")}
    assert found == {b"", b"abcd", b"ab\0\0"}
    storage.rename("/d/a", "/d/c")
    names = {tuple(entry.name for entry in other.list("/d")) for other in moments[-1].outcomes(100)}
    assert names == {("a",), ("c",), ("a", "b"), ("b", "c")}
