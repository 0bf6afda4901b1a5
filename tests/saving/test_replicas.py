"""Replicas are compared before a save commits: what differs is named, on every rank, and nothing is committed."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reshard
from reshard.comm import Communicator
from reshard.errors import ReshardError, SaveError, UsageError
from reshard.format.common import CommonInfo
from reshard.saving.options import SaveOptions
from reshard.saving.replicas import Replicas
from reshard.saving.saver import Saver
from reshard.sources.resolve import list_iterations
from reshard.state import GLOBAL_STEP, HostMemory, Kind, Shard, State, TensorKey, model_key, state_of, whole_tensor
from reshard.storage import MemoryStorage
from reshard.testing import run_ranks, run_ranks_settled, state_on_rank
from tests import saving_runs as runs
from tests.counted import Counted
from tests.loading.test_matrix import ARRAYS, parts
from tests.strategies import STRATEGIES, Strategy, layouts

both = pytest.mark.parametrize("once", [False, True], ids=["kept", "removed"])


def checked(once: bool = False) -> SaveOptions:
    return SaveOptions(keep_checkpoint_max=None, remove_redundancy=once, check_replicas=True, lock_timeout=0)


def flipped(state: State, keys: list[TensorKey]) -> State:
    """The same state, but for the last bit of what a rank holds of some tensors."""
    tensors = dict(state.tensors)
    for key in keys:
        (shard,) = tensors[key].shards
        values = shard.memory.read().copy()
        values.reshape(-1).view(np.uint8)[-1] ^= 1
        tensors[key] = tensors[key]._replace(shards=(Shard(shard.region, HostMemory(values)),))
    return State(tensors)


def save_with(strategy: Strategy, changed: dict[int, list[TensorKey]], *, once: bool = False) -> tuple[MemoryStorage, list[object]]:
    """Save 1 with equal replicas, 2 with some flipped bits, 3 with equal ones again; the error of 2 on each rank."""
    storage = MemoryStorage()

    def work(comm: Communicator) -> object:
        outcome: object = None
        with Saver(storage, comm, runs.ROOT, checked(once)) as saver:
            for step in (1, 2, 3):
                state = state_on_rank(ARRAYS, layouts(strategy), comm.rank)
                if step == 2:
                    state = flipped(state, changed.get(comm.rank, []))
                try:
                    saver.save(step, state, CommonInfo(global_step=12))
                except ReshardError as error:
                    assert step == 2
                    outcome = error
        return outcome

    # An error that is returned is taken for one that was raised; here it is both.
    return storage, run_ranks_settled(strategy.world_size, work)


WEIGHT, NORM = model_key("layers.1.qkv.weight"), model_key("layers.1.norm")


@both
def test_a_bit_that_differs(once: bool) -> None:
    storage, outcomes = save_with(Strategy(dp=2, tp=2), {2: [WEIGHT]}, once=once)
    assert all(type(outcome) is SaveError for outcome in outcomes)
    assert len({str(outcome) for outcome in outcomes}) == 1
    text = str(outcomes[0])
    assert "nothing was committed" in text
    # Of tp's two halves the first one, of 36 rows; the other half is on other ranks.
    assert "layers.1.qkv.weight, offset [0, 0], shape [18, 12]: one value on rank 0, another on rank 2" in text
    assert "tensor:" in text
    assert [step for step, _ in list_iterations(storage, runs.ROOT)] == [1, 3]
    assert [name for name in runs.names(storage) if "saving" in name] == []


def test_what_most_ranks_hold_comes_first() -> None:
    _, outcomes = save_with(Strategy(dp=4), {0: [NORM]})
    text = str(outcomes[0])
    assert "layers.1.norm, offset [0], shape [12]: one value on ranks 1-3, another on rank 0" in text


def test_many_that_differ_are_counted() -> None:
    keys = [key for key, array in ARRAYS.items() if array.size and key != GLOBAL_STEP]
    _, outcomes = save_with(Strategy(dp=2), {1: keys})
    text = str(outcomes[0])
    assert f"and {len(keys) - 8} more" in text
    assert text.count("another on") == 8


def test_a_step_count_that_differs_is_told_as_such() -> None:
    """It has a check of its own, which says more."""
    _, outcomes = save_with(Strategy(dp=2), {1: [GLOBAL_STEP]})
    assert "different numbers of steps" in str(outcomes[0])


@both
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.world_size <= 4], ids=str)
def test_equal_replicas_are_saved(tmp_path: Path, strategy: Strategy, once: bool) -> None:
    """With as few collectives as without the comparison."""

    def work(comm: Communicator) -> list[str]:
        counted = Counted(comm)
        state = state_on_rank(ARRAYS, layouts(strategy), comm.rank)
        model, optimizer = parts(state, Kind.MODEL), parts(state, Kind.OPTIMIZER)
        with reshard.CheckpointManager(tmp_path, communicator=counted, remove_redundancy=once, check_replicas=True) as manager:
            manager.save(1, model=model, optimizer=optimizer, common=CommonInfo(global_step=12))
            counted.calls.clear()
            manager.save(2, model=model, optimizer=optimizer, common=CommonInfo(global_step=12))
        return counted.calls

    assert run_ranks(strategy.world_size, work) == [["all_gather", "broadcast"]] * strategy.world_size
    checkpoint = reshard.Checkpoint(tmp_path)
    for name in checkpoint:
        assert checkpoint[name].read().tobytes() == ARRAYS[checkpoint[name].key].tobytes()


def test_not_a_number_equals_itself_and_zeros_differ() -> None:
    """Bytes are compared, not values."""
    storage = MemoryStorage()
    nan = np.array([0x7FC00001, 0xFFC0DEAD], np.uint32).view(np.float32)

    def work(comm: Communicator) -> None:
        with Saver(storage, comm, runs.ROOT, checked()) as saver:
            saver.save(1, state_of(whole_tensor(model_key("w"), nan.copy())), CommonInfo())
            saver.save(2, state_of(whole_tensor(model_key("w"), np.array([0.0, -0.0][comm.rank]))), CommonInfo())

    outcomes = run_ranks_settled(2, work)
    assert all("w, offset [], shape []: one value on rank 0, another on rank 1" in str(outcome) for outcome in outcomes)
    assert [step for step, _ in list_iterations(storage, runs.ROOT)] == [1]


def test_without_the_check_the_last_writer_wins_unseen() -> None:
    """What the option is for."""
    storage = MemoryStorage()

    def work(comm: Communicator) -> None:
        with Saver(storage, comm, runs.ROOT, SaveOptions(lock_timeout=0)) as saver:
            saver.save(1, state_of(whole_tensor(model_key("w"), np.array([comm.rank]))), CommonInfo())

    run_ranks(2, work)
    assert [step for step, _ in list_iterations(storage, runs.ROOT)] == [1]


@both
def test_a_layout_that_changes_is_compared_too(once: bool) -> None:
    storage = MemoryStorage()

    def work(comm: Communicator) -> None:
        with Saver(storage, comm, runs.ROOT, checked(once)) as saver:
            saver.save(1, state_of(whole_tensor(model_key("w"), np.ones(3))), CommonInfo())
            late = [whole_tensor(model_key("late"), np.full(3, comm.rank))] if comm.rank else []
            saver.save(2, state_of(whole_tensor(model_key("w"), np.ones(3)), *late), CommonInfo())

    for outcome in run_ranks_settled(3, work):
        assert isinstance(outcome, SaveError)
        assert "late, offset [0], shape [3]: one value on rank 1, another on rank 2" in str(outcome)
    assert [step for step, _ in list_iterations(storage, runs.ROOT)] == [1]
    assert [name for name in runs.names(storage) if "saving" in name] == []


def test_a_rank_that_fails_besides_is_named_instead() -> None:
    storage = MemoryStorage()

    def work(comm: Communicator) -> None:
        with Saver(storage, comm, runs.ROOT, checked()) as saver:
            saver.save(1, state_of(whole_tensor(model_key("w"), np.ones(3))), CommonInfo())
            failure = UsageError("no state") if comm.rank == 0 else None
            saver.save(2, state_of(whole_tensor(model_key("w"), np.full(3, comm.rank))), CommonInfo(), failure)

    for outcome in run_ranks_settled(3, work):
        assert isinstance(outcome, UsageError)
        assert "on rank 0: UsageError: no state" in str(outcome)


def test_ranks_that_were_told_different_things() -> None:
    def work(comm: Communicator) -> None:
        Saver(MemoryStorage(), comm, runs.ROOT, SaveOptions(check_replicas=comm.rank == 1)).close()

    for outcome in run_ranks_settled(2, work):
        assert isinstance(outcome, UsageError)
        assert outcome.field == "check_replicas"


@given(st.data())
def test_strides_do_not_matter(data: st.DataObject) -> None:
    """Values in row-major order are hashed, in pieces where they are gathered."""
    from unittest import mock

    from reshard.planning.replicas import SharedRegion, SharedRegions
    from reshard.saving import replicas

    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    array = np.random.default_rng(1).integers(0, 100, shape).astype(data.draw(st.sampled_from([np.float32, np.int8, ml_dtypes.bfloat16])))
    other = np.array(array, order="F")
    wide = np.zeros((*shape[:-1], 2 * shape[-1]), array.dtype)
    wide[..., ::2] = array
    key = model_key("w")

    def folded(values: np.ndarray) -> dict[int, bytes]:
        tensor = whole_tensor(key, array)
        (shard,) = tensor.shards
        state = State({key: tensor._replace(shards=(Shard(shard.region, HostMemory(values)),))})
        return Replicas(0, [SharedRegions(3, (0, 1), [SharedRegion(key, shard.region, 0)])], state).folded

    with mock.patch.object(replicas, "_PIECE_BYTES", data.draw(st.integers(1, 100))):
        assert folded(array) == folded(other) == folded(wide[..., ::2])
        array.reshape(-1).view(np.uint8)[0] ^= 1
        assert folded(array) != folded(other)


def test_asynchronous_saves_are_written_once_and_compared() -> None:
    """From the snapshot: also when the layout of other ranks changed, and all write anew."""
    storage = MemoryStorage()

    def work(comm: Communicator) -> str:
        with reshard.CheckpointManager(
            runs.ROOT, communicator=comm, storage=storage, remove_redundancy=True, check_replicas=True, async_save="copy"
        ) as manager:
            for step in (1, 2, 3):
                state = state_on_rank(ARRAYS, layouts(Strategy(dp=2, tp=2)), comm.rank)
                more = {} if step == 1 or comm.rank in (0, 2) else {"late": np.ones(1000)}
                drifted = {"drift": np.full(3, comm.rank // 2)} if step == 3 else {}
                optimizer = parts(state, Kind.OPTIMIZER)
                model = {**parts(state, Kind.MODEL), **more, **drifted}
                manager.save(step, model=model, optimizer=optimizer, common=CommonInfo(global_step=12))
                for array in (*more.values(), *drifted.values()):
                    array[...] = 7  # training goes on
            try:
                manager.wait()
            except SaveError as error:
                return str(error)
        return ""

    errors = run_ranks(4, work)
    assert len(set(errors)) == 1
    assert "drift, offset [0], shape [3]: one value on ranks 0-1, another on ranks 2-3" in errors[0]
    checkpoint = reshard.Checkpoint(runs.ROOT, storage)
    assert checkpoint.iteration == 2
    assert checkpoint["late"].read().tolist() == [1.0] * 1000
    for name in checkpoint:
        view = checkpoint[name]
        assert all(len(chunk.places) == 1 for chunk in view.chunks)
        assert name == "late" or view.read().tobytes() == ARRAYS[view.key].tobytes()
