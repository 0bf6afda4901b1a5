"""Which checkpoints stay."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.checkpoint import Checkpoint
from reshard.comm import SingleProcess
from reshard.errors import UsageError
from reshard.format.common import CommonInfo
from reshard.saving.options import SaveOptions
from reshard.saving.policies import Committed, KeepAny, KeepBest, KeepEvery, KeepFor, KeepNewest, KeepPolicy
from reshard.saving.retention import choose_expired
from reshard.saving.saver import Saver
from reshard.sources.resolve import list_iterations
from reshard.storage import MemoryStorage, PosixStorage
from reshard.testing import FaultyStorage, run_ranks
from reshard.verification import verify
from tests import saving_runs as runs


def keep(count: int | None) -> SaveOptions:
    return SaveOptions(keep_checkpoint_max=count, lock_timeout=0)


def committed(steps: Iterable[int], metrics: Mapping[int, Mapping[str, float] | None] = MappingProxyType({})) -> list[Committed]:
    """Iterations that were committed at the second of their number."""
    return [Committed(step, float(step), metrics.get(step, {})) for step in sorted(steps)]


def keeps(policy: KeepPolicy, iterations: list[Committed], now: float = 0.0) -> list[int]:
    return sorted(policy.keeps(iterations, now))


@given(st.sets(st.integers(0, 50)), st.integers(1, 10), st.integers(0, 50), st.sets(st.integers(0, 50), max_size=3))
def test_the_oldest_go_and_no_more_than_must(steps, count, newest, spare):
    expired = choose_expired(committed(steps), KeepNewest(count), newest, spare, 0.0)
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


def test_every_policy_keeps_what_it_says():
    losses = {10: {"loss": 3.0}, 20: {"loss": 1.0}, 25: {"loss": 2.0}, 30: {"loss": 1.0}, 40: {"loss": float("nan")}, 50: {"other": 0.0}}
    iterations = committed([10, 20, 25, 30, 40, 50], losses)
    assert keeps(KeepNewest(2), iterations) == [40, 50]
    assert keeps(KeepNewest(99), iterations) == [10, 20, 25, 30, 40, 50]
    assert keeps(KeepEvery(20), iterations) == [20, 40]
    assert keeps(KeepEvery(20), committed([0, 1])) == [0]
    assert keeps(KeepFor(days=1), iterations, now=86400 + 25) == [25, 30, 40, 50]
    assert keeps(KeepFor(days=1, hours=0.5), iterations, now=86400 + 1800 + 41) == [50]
    assert keeps(KeepBest("loss"), iterations) == [30], "of equal ones the later"
    assert keeps(KeepBest("loss", 2), iterations) == [20, 30]
    assert keeps(KeepBest("loss", 9), iterations) == [10, 20, 25, 30], "neither NaN nor what has no loss"
    assert keeps(KeepBest("loss", 1, mode="max"), iterations) == [10]
    assert keeps(KeepBest("accuracy", 3), iterations) == []
    assert keeps(KeepBest("loss"), committed([1, 2, 3], {1: {"loss": 1.0}, 2: None, 3: {"loss": 2.0}})) == [1, 2], "2 can't be judged"


_policies = st.one_of(
    st.builds(KeepNewest, st.integers(1, 5)),
    st.builds(KeepEvery, st.integers(1, 12)),
    st.builds(KeepFor, hours=st.integers(1, 60).map(lambda seconds: seconds / 3600)),
    st.builds(KeepBest, st.sampled_from(["loss", "accuracy"]), st.integers(1, 4), st.sampled_from(["min", "max"])),
)


@given(
    st.dictionaries(st.integers(0, 60), st.dictionaries(st.sampled_from(["loss", "accuracy"]), st.floats()), min_size=1),
    st.lists(_policies, min_size=1, max_size=4),
    st.data(),
)
def test_joined_policies_keep_what_any_of_them_keeps(metrics, policies, data):
    iterations = committed(metrics, metrics)
    joined = policies[0]
    for policy in policies[1:]:
        joined = joined | policy
    each = [policy.keeps(iterations, 60.0) for policy in policies]
    assert joined.keeps(iterations, 60.0) == set().union(*each)
    assert joined.needs_metrics == any(isinstance(policy, KeepBest) for policy in policies)
    newest = data.draw(st.sampled_from(sorted(metrics)))
    gone = choose_expired(iterations, joined, newest, set(), 60.0)
    assert newest not in gone
    for policy in policies:
        # One more policy never removes what the others keep.
        assert set(gone) <= set(choose_expired(iterations, policy, newest, set(), 60.0))


def test_joining_is_flat_and_takes_policies_only():
    joined = KeepNewest(1) | KeepEvery(2) | (KeepFor(days=1) | KeepBest("loss"))
    assert joined == KeepAny((KeepNewest(1), KeepEvery(2), KeepFor(days=1), KeepBest("loss")))
    with pytest.raises(TypeError):
        KeepNewest(1) | 5  # type: ignore[operator]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepNewest(0),
        lambda: KeepNewest(True),
        lambda: KeepEvery(1.5),  # type: ignore[arg-type]
        KeepFor,
        lambda: KeepFor(days=-1),
        lambda: KeepFor(days=float("inf")),
        lambda: KeepBest(""),
        lambda: KeepBest("loss", 0),
        lambda: KeepBest("loss", mode="least"),  # type: ignore[arg-type]
        lambda: KeepAny(()),
        lambda: SaveOptions(keep=5),  # type: ignore[arg-type]
    ],
)
def test_a_policy_that_can_not_be_is_refused(make):
    with pytest.raises(UsageError) as error:
        make()
    assert error.value.field


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


def saved(storage, steps, policy, *, world_size=1, keep_checkpoint_max=None, protect=None):
    """Save iterations, each with metrics or none; what each save removed."""
    options = SaveOptions(keep_checkpoint_max=keep_checkpoint_max, keep=policy, lock_timeout=0)

    def run(comm):
        with Saver(storage, comm, runs.ROOT, options, protect) as saver:
            return [
                saver.save(step, runs.state(comm.rank, comm.world_size, step), CommonInfo(global_step=step), metrics=metrics).removed
                for step, metrics in steps
            ]

    return run_ranks(world_size, run)


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_best_and_the_newest_stay(world_size):
    storage = MemoryStorage()
    losses = [(1, 5.0), (2, 1.0), (3, 4.0), (4, 0.5), (5, 3.0), (6, float("nan")), (7, 2.0)]
    results = saved(storage, [(step, {"loss": loss}) for step, loss in losses], KeepNewest(1) | KeepBest("loss", 2), world_size=world_size)
    assert list(runs.committed(storage)) == [2, 4, 7]
    assert results == [[(), (), (1,), (3,), (), (), (5, 6)]] * world_size, "5 stays while 6 is unhealthy"
    assert Checkpoint(f"{runs.ROOT}/iteration_00000002", storage).metrics == {"loss": 1.0}


def test_a_number_and_a_policy_keep_what_either_keeps():
    storage = MemoryStorage()
    saved(storage, [(step, None) for step in range(1, 10)], KeepEvery(3), keep_checkpoint_max=2)
    assert list(runs.committed(storage)) == [3, 6, 8, 9]


def test_a_policy_without_a_number_decides_alone():
    storage = MemoryStorage()
    saved(storage, [(step, None) for step in range(1, 6)], KeepEvery(100))
    assert list(runs.committed(storage)) == [5], "the tracker's stays in any case"


def test_age_counts_from_the_commit(tmp_path):
    storage = PosixStorage()
    root = str(tmp_path)
    runs.save(storage, [(1, 1), (2, 2)], root=root)
    for name in ("metadata.json", "common.json"):
        os.utime(tmp_path / "iteration_00000001" / name, (1, 1))
    runs.save(storage, [(3, 3)], root=root, options=SaveOptions(keep_checkpoint_max=None, keep=KeepFor(hours=1), lock_timeout=0))
    assert list(runs.committed(storage, root)) == [2, 3]


def test_what_was_given_up_goes_first_under_any_policy_that_counts():
    storage = MemoryStorage()
    saved(storage, [(step, {"loss": 1.0}) for step in (100, 200, 300, 400)], None)
    saved(storage, [(150, {"loss": 1.0})], KeepBest("loss", 2) | KeepNewest(1), protect=100)
    assert list(runs.committed(storage)) == [100, 150], "equally good ones of the continuation that was given up lose"


def test_metrics_that_can_not_be_read_keep_their_checkpoint(caplog):
    storage = MemoryStorage()
    saved(storage, [(1, {"loss": 9.0}), (2, {"loss": 8.0}), (3, {"loss": 1.0})], None)
    path = f"{runs.ROOT}/iteration_00000001/extra/metrics.json"
    data = storage.read_bytes(path).replace(b"9", b"7")
    storage.remove(path)
    storage.write_bytes(path, data)
    saved(storage, [(4, {"loss": 0.5})], KeepBest("loss", 2))
    assert sorted(step for step, _ in list_iterations(storage, runs.ROOT)) == [1, 3, 4]
    assert "can't read the metrics" in caplog.text


def test_the_last_healthy_one_stays_while_the_newest_is_not():
    storage = MemoryStorage()
    bad = {"loss": float("inf")}
    results = saved(storage, [(1, {"loss": 1.0}), (2, {"loss": 1.0}), (3, bad), (4, bad), (5, bad)], KeepNewest(1))
    assert list(runs.committed(storage)) == [2, 5]
    assert results == [[(), (1,), (), (3,), (4,)]]
    saved(storage, [(6, {"loss": 1.0})], KeepNewest(1))
    assert list(runs.committed(storage)) == [6]


def test_a_policy_that_fails_removes_nothing(caplog):
    class Broken(KeepPolicy):
        def keeps(self, iterations, now):
            raise RuntimeError("no idea")

    storage = MemoryStorage()
    assert saved(storage, [(1, None), (2, None)], Broken()) == [[(), ()]]
    assert list(runs.committed(storage)) == [1, 2]
    assert "no idea" in caplog.text


@pytest.mark.parametrize("metrics", [{"loss": "1"}, {"loss": True}, {"loss": None}, {"": 1.0}, {3: 1.0}, [1.0], {"loss": 10**400}])
@pytest.mark.parametrize("world_size", [1, 2])
def test_metrics_that_are_no_numbers_are_refused_on_every_rank(metrics, world_size):
    storage = MemoryStorage()
    with pytest.raises(UsageError, match="metric"):
        saved(storage, [(1, metrics)], None, world_size=world_size)
    assert runs.committed(storage) == {}


def test_metrics_come_back_as_they_were():
    storage = MemoryStorage()
    metrics = {"loss": np.float32(0.5), "steps": np.int64(7), "lowest": float("-inf"), "odd": float("nan"), "größe": 1e-300}
    saved(storage, [(1, metrics), (2, {}), (3, None)], None)
    (read, empty, none) = (Checkpoint(f"{runs.ROOT}/iteration_0000000{step}", storage).metrics for step in (1, 2, 3))
    assert repr(dict(read)) == repr({name: float(value) for name, value in metrics.items()})
    assert empty == none == {}
    assert storage.stat(f"{runs.ROOT}/iteration_00000003/extra/metrics.json") is None
    assert verify(runs.ROOT, storage=storage).is_intact


@pytest.mark.parametrize(
    ("stated", "metrics", "status"),
    [(None, None, None), (None, {"loss": 1}, 0), (None, {"loss": float("nan")}, 1), (0, {"loss": float("nan")}, 0), (1, {"loss": 1}, 1)],
)
def test_the_health_is_what_was_stated_else_what_the_loss_says(stated, metrics, status):
    storage = MemoryStorage()
    with Saver(storage, SingleProcess(), runs.ROOT) as saver:
        saver.save(1, runs.state(0, 1, 1), CommonInfo(ckpt_status=stated), metrics=metrics)
    common = Checkpoint(runs.ROOT, storage).common
    assert common is not None
    assert common.ckpt_status == status
