"""A save that fails or dies at any of its operations: what was committed before loads bit for bit, and the next save works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import pytest

from reshard.comm import SingleProcess
from reshard.errors import CommunicationError, NoSpaceError, ReshardError, SaveError, StorageError
from reshard.format.common import CommonInfo
from reshard.saving.options import SaveOptions
from reshard.saving.report import SaveReport
from reshard.saving.saver import Saver
from reshard.storage import MemoryStorage, Storage
from reshard.testing import FaultyStorage, SimulatedDeath
from tests import saving_runs as runs
from tests.faults import DEATH, FAILURE

TWO = SaveOptions(keep_checkpoint_max=2, lock_timeout=0)

# What is saved when 1 and 2 are there in version 10 and 20, and what is there afterwards, with at most two kept.
ACTIONS = {
    "the first": ({}, (1, 10), {1: 10}),
    "another": ({1: 10, 2: 20}, (3, 30), {2: 20, 3: 30}),
    "the newest again": ({1: 10, 2: 20}, (2, 21), {1: 10, 2: 21}),
    "the oldest again": ({1: 10, 2: 20}, (1, 11), {1: 11, 2: 20}),
}
EXCHANGE = {"exchange": True, "two renames": False}

sweep = pytest.mark.sweep
each_action = pytest.mark.parametrize(
    ("action", "exchange"),
    [
        ("the first", "exchange"),
        ("another", "exchange"),
        ("the newest again", "exchange"),
        ("the newest again", "two renames"),
        pytest.param("the oldest again", "exchange", marks=sweep),
        pytest.param("the oldest again", "two renames", marks=sweep),
    ],
)
one_rank_or_two = pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=sweep)])
two_ranks_or_one = pytest.mark.parametrize("world_size", [2, pytest.param(1, marks=sweep)])

Break = Callable[[Storage, int], list[Storage]]


def before(action: str, exchange: str, world_size: int) -> MemoryStorage:
    storage = MemoryStorage(can_exchange=EXCHANGE[exchange])
    existing, _, _ = ACTIONS[action]
    storage.make_directory("/runs")
    if existing:
        runs.save(storage, list(existing.items()), world_size=world_size)
    return storage


def every_fault(action: str, exchange: str, world_size: int, **fault: object):
    """For each rank and each of its operations k: a storage in which the k-th fails, and what came of the save."""
    start = before(action, exchange, world_size)
    _, step, _ = ACTIONS[action]
    for rank in range(world_size):
        counted = FaultyStorage(runs.copy_of(start))
        runs.save([counted if r == rank else counted.inner for r in range(world_size)], [step], options=TWO)
        assert counted.count > 15
        for k in range(1, counted.count + 1):
            storage = runs.copy_of(start)
            faulty = FaultyStorage(storage, fail_at=k, **fault)
            results = runs.save([faulty if r == rank else storage for r in range(world_size)], [step], options=TWO, settled=True)
            assert faulty.failed is not None
            yield f"operation {k} of rank {rank}, {faulty.failed}", storage, faulty, results


def is_saved(result: object) -> bool:
    return not isinstance(result, BaseException)


def check_next_save(storage: Storage, world_size: int, where: str) -> None:
    """A later run saves as if nothing had been, and leaves nothing behind."""
    known = runs.committed(storage)
    runs.save(storage, [(7, 70)], options=TWO, world_size=world_size)
    kept = dict(sorted({**known, 7: 70}.items())[-2:])
    assert runs.committed(storage) == kept, where
    assert runs.tracked(storage) == 7
    directories = [f"iteration_{step:08d}" for step in kept]
    assert runs.names(storage) == [".reshard.lock", *directories, "latest_checkpointed_iteration.txt"], where


@each_action
@two_ranks_or_one
@pytest.mark.parametrize(
    "error",
    [StorageError, pytest.param(NoSpaceError, marks=sweep), pytest.param(OSError, marks=sweep)],
    ids=["EIO", "ENOSPC", "unexpected"],
)
def test_an_operation_that_fails(action, exchange, world_size, error, tried):
    existing, (step, _), after = ACTIONS[action]
    points = 0
    for where, storage, faulty, results in every_fault(action, exchange, world_size, error=error):
        saved = [is_saved(result) for result in results]
        found = runs.committed(storage) if storage.stat(runs.ROOT) else {}
        if faulty.failed[0] == "release":
            assert found == after
        elif all(saved):
            # Only what comes after the commit may fail without a word: removing what isn't needed any more.
            assert found in (after, {**existing, **after}), where
            assert runs.tracked(storage) == step
        else:
            assert not any(saved), f"{where}: the ranks disagree"
            assert len({str(result) for result in results}) == 1, where
            assert all(isinstance(result, ReshardError) for result in results), where
            assert found == existing, where
            assert runs.tracked(storage) == (2 if existing else None) if storage.stat(runs.ROOT) else not existing
            assert "simulated failure" in str(results[0])
            if existing:
                directories = [name for name in runs.names(storage) if not name.startswith((".saving", "latest", ".reshard"))]
                assert directories == ["iteration_00000001", "iteration_00000002"], where
        check_next_save(storage, world_size, where)
        points += 1
    tried(FAILURE, points)


def attempt_save(saver: Saver, step: int, version: int) -> bool:
    try:
        saver.save(step, runs.state(0, 1, version), CommonInfo(global_step=step))
    except SaveError:
        return False
    return True


@each_action
def test_the_same_saver_saves_again_after_a_failure(action, exchange, tried):
    existing, (step, version), after = ACTIONS[action]
    start = before(action, exchange, 1)
    operations = runs.count_operations(lambda s: runs.save(s, [(step, version)], options=TWO), runs.copy_of(start))
    for k in range(1, operations + 1):
        storage = runs.copy_of(start)
        faulty = FaultyStorage(storage, fail_at=k)
        failures = 0
        with suppress(StorageError), Saver(faulty, SingleProcess(), runs.ROOT, TWO) as saver:
            while failures < 2 and not attempt_save(saver, step, version):
                failures += 1
            assert failures < 2, f"operation {k}, {faulty.failed}"
            assert runs.committed(storage) in ([after] if failures else [after, {**existing, **after}]), f"operation {k}, {faulty.failed}"
    tried(FAILURE, operations)


@each_action
@one_rank_or_two
def test_a_disk_that_breaks_for_good(action, exchange, world_size, tried):
    existing, (step, version), after = ACTIONS[action]
    points = 0
    for where, storage, _, results in every_fault(action, exchange, world_size, error=StorageError, lasting=True):
        check_what_was_there(storage, existing, step, version, after, results, where)
        check_next_save(storage, world_size, where)
        points += 1
    tried(FAILURE, points)


@each_action
@one_rank_or_two
def test_a_disk_that_fills_up(action, exchange, world_size, tried):
    """Nothing can be written any more, but names can be changed and files removed."""
    points = 0
    existing, step, after = ACTIONS[action]
    writing = {"make_directory", "create", "write_at", "write_bytes", "sync"}
    start = before(action, exchange, world_size)
    for rank in range(world_size):
        k = 0
        while True:
            k += 1
            storage = runs.copy_of(start)
            faulty = FaultyStorage(storage, fail_at=k, error=NoSpaceError, operations=writing, lasting=True)
            results = runs.save([faulty if r == rank else storage for r in range(world_size)], [step], options=TWO, settled=True)
            found = runs.committed(storage) if storage.stat(runs.ROOT) else {}
            if faulty.failed is None:
                assert found == after
                break
            assert all(isinstance(result, NoSpaceError) for result in results), f"{k} {faulty.failed} {results}"
            assert found == existing
            left = [name for name in runs.names(storage) if name.startswith((".saving", ".deleting", ".replaced"))] if found else []
            assert left == []
            assert not found or runs.tracked(storage) == 2
            points += 1
        assert k > 8
    tried(FAILURE, points)


@each_action
@one_rank_or_two
@pytest.mark.parametrize("lasting", [False, pytest.param(True, marks=sweep)])
def test_an_operation_that_is_done_and_reported_as_failed(action, exchange, world_size, lasting, tried):
    existing, (step, version), after = ACTIONS[action]
    points = 0
    for where, storage, _, results in every_fault(action, exchange, world_size, error=StorageError, after=True, lasting=lasting):
        check_what_was_there(storage, existing, step, version, after, results, where)
        check_next_save(storage, world_size, where)
        points += 1
    tried(FAILURE, points)


@each_action
@two_ranks_or_one
def test_a_rank_that_dies(action, exchange, world_size, tried):
    existing, (step, version), after = ACTIONS[action]
    points = 0
    for where, storage, _, results in every_fault(action, exchange, world_size, error=SimulatedDeath):
        assert any(isinstance(result, SimulatedDeath) for result in results)
        assert all(is_saved(result) or isinstance(result, (SimulatedDeath, CommunicationError)) for result in results), where
        check_what_was_there(storage, existing, step, version, after, results, where)
        check_next_save(storage, world_size, where)
        points += 1
    tried(DEATH, points)


@each_action
def test_a_job_that_dies(action, exchange, tried):
    """All ranks at once, as when a machine is switched off; on storage that keeps everything that was written."""
    existing, (step, version), after = ACTIONS[action]
    start = before(action, exchange, 2)
    total = runs.count_operations(lambda s: runs.save(s, [(step, version)], options=TWO, world_size=2), runs.copy_of(start))
    for k in range(1, total + 1):
        storage = runs.copy_of(start)
        faulty = FaultyStorage(storage, fail_at=k, error=SimulatedDeath)
        results = runs.save(faulty, [(step, version)], options=TWO, world_size=2, settled=True)
        check_what_was_there(storage, existing, step, version, after, results, f"operation {k}, {faulty.failed}")
        check_next_save(storage, 2, f"operation {k}, {faulty.failed}")
    tried(DEATH, total)


def check_what_was_there(
    storage: Storage,
    existing: dict[int, int],
    step: int,
    version: int,
    after: dict[int, int],
    results: Sequence[list[SaveReport] | BaseException],
    where: str,
) -> None:
    """Each committed iteration is whole, in its old version or the new one, and none is lost that retention didn't remove."""
    if storage.stat(runs.ROOT) is None:
        assert not existing
        return
    found = runs.committed(storage)
    assert set(existing) - {step} <= set(found) | (set(existing) - set(after)), where
    for number, seen in found.items():
        assert seen in ((existing.get(number), version) if number == step else (existing[number],)), where
    assert step in found or step not in existing, where
    if runs.tracked(storage) is None:
        assert not existing
    if set(existing) - set(found):
        assert found[step] == version, f"{where}: something was removed before the new checkpoint was there"
        assert runs.tracked(storage) == step
    if any(is_saved(result) for result in results):
        assert found[step] == version, where
        assert runs.tracked(storage) == step


def test_a_death_between_the_two_renames():
    storage = before("the newest again", "two renames", 1)
    faulty = FaultyStorage(storage, fail_at=2, error=SimulatedDeath, operations={"rename"})
    runs.save(faulty, [(2, 21)], options=TWO, settled=True)
    assert faulty.failed is not None
    assert ".saving-iteration_00000002" in faulty.failed[1]
    present = runs.names(storage)
    assert ".replaced-iteration_00000002" in present
    assert "iteration_00000002" not in present
    # Loading finds it without anybody's help, and the next run gives it its name back.
    assert runs.committed(storage) == {1: 10, 2: 20}
    assert runs.tracked(storage) == 2
    runs.save(storage, [], options=TWO)
    assert runs.names(storage) == [".reshard.lock", "iteration_00000001", "iteration_00000002", "latest_checkpointed_iteration.txt"]
    assert runs.committed(storage) == {1: 10, 2: 20}


def test_a_failure_that_can_not_be_taken_back_says_so():
    """The disk breaks for good after the exchange: the message must not claim that all is as before."""
    storage = before("the newest again", "exchange", 1)
    faulty = FaultyStorage(storage, fail_at=1, operations={"exchange"}, error=StorageError)
    (result,) = runs.save(faulty, [(2, 21)], options=TWO, settled=True)
    assert "as they were" in str(result)
    counted = FaultyStorage(runs.copy_of(storage))
    runs.save(counted, [(2, 21)], options=TWO)
    exchanged = [name for name, _ in counted.log].index("exchange") + 1
    (result,) = runs.save(FaultyStorage(storage, fail_at=exchanged + 1, lasting=True), [(2, 21)], options=TWO, settled=True)
    assert isinstance(result, SaveError)
    assert "could not be taken back" in str(result)
    assert "as they were" not in str(result)
    assert runs.committed(storage) == {1: 10, 2: 21}
