"""Which checkpoints stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.comm import SingleProcess
from reshard.format.common import CommonInfo
from reshard.saving.retention import choose_expired
from reshard.saving.saver import SaveOptions, Saver
from reshard.storage import MemoryStorage
from reshard.testing import FaultyStorage
from tests import saving_runs as runs


def keep(count: int | None) -> SaveOptions:
    return SaveOptions(keep_checkpoint_max=count, lock_timeout=0)


@given(st.sets(st.integers(0, 50)), st.integers(1, 10), st.integers(0, 50), st.sets(st.integers(0, 50), max_size=3))
def test_the_oldest_go_and_no_more_than_must(steps, count, newest, spare):
    expired = choose_expired(sorted(steps), count, newest, spare)
    left = steps - set(expired)
    stays = spare | {newest}
    assert not stays & set(expired)
    assert len(left) == max(min(count, len(steps)), len(left & stays)) or (len(left) > count and left <= stays)
    # In the order in which they were saved: higher numbers than the newest came before all lower ones that were saved since.
    given_up, earlier = [[s for s in expired if (s > newest) is later] for later in (True, False)]
    assert expired == sorted(given_up) + sorted(earlier)
    if expired:
        assert len(steps) > count
        assert not earlier or max(earlier) < min({s for s in left - stays if s < newest}, default=51)
        assert not earlier or not {s for s in left - stays if s > newest}


@pytest.mark.parametrize("world_size", [1, 2])
def test_as_many_as_asked_stay(world_size):
    storage = MemoryStorage()
    results = runs.save(storage, [(step, step) for step in range(1, 6)], options=keep(2), world_size=world_size)
    assert runs.committed(storage) == {4: 4, 5: 5}
    for reports in results:
        assert [report.removed for report in reports] == [(), (), (1,), (2,), (3,)]


def test_none_keeps_all():
    storage = MemoryStorage()
    runs.save(storage, [(step, step) for step in range(1, 8)], options=keep(None))
    assert list(runs.committed(storage)) == list(range(1, 8))


def test_earlier_runs_count():
    storage = MemoryStorage()
    for step in range(1, 5):
        runs.save(storage, [(step, step)], options=keep(3))
    assert list(runs.committed(storage)) == [2, 3, 4]
    ((report,),) = runs.save(storage, [(5, 5)], options=keep(1))
    assert report.removed == (2, 3, 4)
    assert list(runs.committed(storage)) == [5]


def test_one_that_was_replaced_counts_once():
    storage = MemoryStorage()
    runs.save(storage, [(1, 1), (2, 2), (2, 3), (1, 4)], options=keep(2))
    assert runs.committed(storage) == {1: 4, 2: 3}


def test_the_trackers_checkpoint_stays_though_others_have_higher_numbers():
    """The run went back to an earlier iteration and saves its own."""
    storage = MemoryStorage()
    runs.save(storage, [(10, 10), (20, 20), (30, 30)], options=keep(3))
    runs.save(storage, [(11, 11)], options=keep(1))
    assert runs.committed(storage) == {11: 11}
    assert runs.tracked(storage) == 11


def test_a_run_that_went_back_keeps_its_own_and_not_those_that_it_gave_up():
    storage = MemoryStorage()
    runs.save(storage, [(step, step) for step in (100, 200, 300, 400)], options=keep(None))
    with Saver(storage, SingleProcess(), runs.ROOT, keep(3), protect=100) as saver:
        for step, left in ((150, [100, 150, 400]), (180, [100, 150, 180]), (210, [150, 180, 210])):
            saver.save(step, runs.state(0, 1, step), CommonInfo())
            assert list(runs.committed(storage)) == left
            assert runs.tracked(storage) == step


def test_the_checkpoint_that_the_run_was_loaded_from_stays_until_a_newer_one_is_there():
    storage = MemoryStorage()
    runs.save(storage, [(5, 5), (6, 6)], options=keep(None))
    with Saver(storage, SingleProcess(), runs.ROOT, keep(1), protect=6) as saver:
        # An older number is no newer checkpoint.
        saver.save(4, runs.state(0, 1, 4), CommonInfo())
        assert runs.committed(storage) == {4: 4, 6: 6}
        saver.save(7, runs.state(0, 1, 7), CommonInfo())
        assert runs.committed(storage) == {7: 7}
        saver.protect(9)
        saver.save(8, runs.state(0, 1, 8), CommonInfo())
        assert runs.committed(storage) == {8: 8}


def test_once_a_newer_one_is_there_the_protection_is_over():
    storage = MemoryStorage()
    runs.save(storage, [(6, 6)])
    with Saver(storage, SingleProcess(), runs.ROOT, keep(2), protect=6) as saver:
        for step, left in ((7, {6: 6, 7: 7}), (3, {3: 3, 7: 7})):
            saver.save(step, runs.state(0, 1, step), CommonInfo())
            assert runs.committed(storage) == left


def test_what_is_not_recognised_stays_and_does_not_count():
    storage = MemoryStorage()
    runs.save(storage, [(1, 1)])
    for name in ("iteration_00000000", "iteration_7", "best", "iteration_00000001.bak"):
        storage.make_directory(f"{runs.ROOT}/{name}")
    storage.write_bytes(f"{runs.ROOT}/iteration_00000000/half.safetensors", b"")
    storage.write_bytes(f"{runs.ROOT}/iteration_00000003", b"a file")
    runs.save(storage, [(2, 2), (4, 4)], options=keep(2))
    assert runs.committed(storage) == {2: 2, 4: 4}
    for name in ("iteration_00000000", "iteration_7", "best", "iteration_00000001.bak", "iteration_00000003"):
        assert name in runs.names(storage)


def test_a_checkpoint_of_the_published_implementation_counts(tmp_path):
    """A single card's, which has no metadata.json."""
    storage = MemoryStorage()
    directory = f"{runs.ROOT}/iteration_00000001"
    storage.make_directory(directory)
    for name in ("common.json", "qwen3-model-0000000-0000001.safetensors", "qwen3-opt-0000000-0000001.safetensors"):
        storage.write_bytes(f"{directory}/{name}", b"")
    ((report,),) = runs.save(storage, [(2, 2)], options=keep(1))
    assert report.removed == (1,)


def test_one_that_can_not_be_removed_is_no_reason_to_fail(caplog):
    storage = MemoryStorage()
    runs.save(storage, [(1, 1), (2, 2)])
    stuck = FaultyStorage(storage, fail_at=2, operations={"rename"})
    ((report,),) = runs.save(stuck, [(3, 3)], options=keep(1))
    assert report.removed == (2,)
    assert runs.committed(storage) == {1: 1, 3: 3}
    assert "can't remove the old checkpoint" in caplog.text
    ((report,),) = runs.save(storage, [(4, 4)], options=keep(1))
    assert report.removed == (1, 3)


def test_one_that_is_half_removed_is_no_checkpoint(caplog):
    storage = MemoryStorage()
    runs.save(storage, [(1, 1)])
    broken = FaultyStorage(storage, fail_at=1, operations={"remove_tree"})
    ((report,),) = runs.save(broken, [(2, 2)], options=keep(1))
    assert report.removed == (1,)
    assert runs.committed(storage) == {2: 2}
    assert any(name.startswith(".deleting-iteration_00000001") for name in runs.names(storage))
    runs.save(storage, [], options=keep(1))
    assert runs.names(storage) == [".reshard.lock", "iteration_00000002", "latest_checkpointed_iteration.txt"]
    assert "can't remove" in caplog.text


def test_what_an_interrupted_replacement_left_does_not_come_back():
    storage = MemoryStorage(can_exchange=False)
    runs.save(storage, [(1, 1)])
    stuck = FaultyStorage(storage, fail_at=2, operations={"remove_tree"})
    with Saver(stuck, SingleProcess(), runs.ROOT, keep(1)) as saver:
        saver.save(1, runs.state(0, 1, 2), CommonInfo(global_step=1))
        assert ".replaced-iteration_00000001" in runs.names(storage)
        assert runs.committed(storage) == {1: 2}
        saver.save(2, runs.state(0, 1, 3), CommonInfo(global_step=2))
        assert runs.committed(storage) == {2: 3}
