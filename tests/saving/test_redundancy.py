"""Each region written once: files, their numbers, what is told, and what comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import reshard
from reshard.checkpoint import Checkpoint
from reshard.cli.app import app
from reshard.comm import Communicator
from reshard.errors import CaptureError, ReshardError, UsageError
from reshard.format.common import CommonInfo
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.sources.resolve import list_iterations
from reshard.state import GLOBAL_STEP, Kind, State, model_key, slot_key, state_of, whole_tensor
from reshard.storage import MemoryStorage, PosixStorage, Storage
from reshard.testing import FaultyStorage, differences, mesh_of, run_ranks, run_ranks_settled, split, state_on_rank, tensor_on_rank
from reshard.verification import verify
from tests import saving_runs as runs
from tests.loading.test_matrix import ARRAYS, parts
from tests.strategies import STRATEGIES, Strategy, layouts

ONCE = SaveOptions(keep_checkpoint_max=None, remove_redundancy=True, lock_timeout=0)


def data_files(directory: Path | str) -> list[str]:
    return sorted(name for name in os.listdir(directory) if name.endswith(".safetensors"))


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.world_size > 1], ids=str)
def test_what_is_stored_is_the_state_itself(tmp_path: Path, strategy: Strategy) -> None:
    """Every strategy, saved once over; read whole, verified, and loaded by other ranks in both ways."""
    placed = layouts(strategy)

    def save(comm: Communicator) -> None:
        state = state_on_rank(ARRAYS, placed, comm.rank)
        with reshard.CheckpointManager(tmp_path, communicator=comm, remove_redundancy=True) as manager:
            manager.save(12, model=parts(state, Kind.MODEL), optimizer=parts(state, Kind.OPTIMIZER))

    run_ranks(strategy.world_size, save)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check()
    for name in checkpoint:
        view = checkpoint[name]
        assert view.read().tobytes() == ARRAYS[view.key].tobytes()
        assert all(len(chunk.places) == 1 and chunk.places[0].rank in chunk.holders for chunk in view.chunks)
    assert verify(checkpoint.directory).faults == ()
    for target, balanced in ((Strategy(), False), (Strategy(dp=2, tp=2, fsdp=True), True), (Strategy(tp=2, pp=4), False)):

        def load(comm: Communicator, target: Strategy = target, balanced: bool = balanced) -> list[str]:
            state = state_on_rank(ARRAYS, layouts(target), comm.rank, blank=True)
            model, optimizer = parts(state, Kind.MODEL), parts(state, Kind.OPTIMIZER)
            report = reshard.load(tmp_path, communicator=comm, model=model, optimizer=optimizer, balanced=balanced)
            assert len(report.restored) == len(ARRAYS)
            return differences(ARRAYS, state)

        assert run_ranks(target.world_size, load) == [[]] * target.world_size


WEIGHT, MOMENT = model_key("w"), slot_key("adam_m", "w")


def small(world: int, rank: int, **changes: np.ndarray) -> State:
    """A weight that every rank holds whole, a larger moment that the ranks from the second on hold, and the step count."""
    arrays = {WEIGHT: np.arange(6, dtype=np.float32), MOMENT: np.arange(100, dtype=np.float32), GLOBAL_STEP: np.array([3], np.int32)}
    tensors = [tensor_on_rank(WEIGHT, arrays[WEIGHT], split(mesh_of(dp=world), None), rank)]
    if rank:
        tensors.append(tensor_on_rank(MOMENT, arrays[MOMENT], split(mesh_of(range(1, world), dp=world - 1), None), rank))
    tensors.append(whole_tensor(GLOBAL_STEP, arrays[GLOBAL_STEP]))
    tensors += [whole_tensor(model_key(name), array) for name, array in changes.items()]
    return state_of(*[tensor for tensor in tensors if tensor is not None])


def save_all(storage: Storage, root: str, world: int, states: Sequence[Callable[[int], State]], options: SaveOptions = ONCE) -> None:
    def run(comm: Communicator) -> None:
        with Saver(storage, comm, root, options) as saver:
            for step, state in enumerate(states, 1):
                saver.save(step, state(comm.rank), CommonInfo(global_step=step))

    run_ranks(world, run)


def test_fewer_regions_than_ranks(tmp_path: Path) -> None:
    """Four ranks and three regions: files count the ranks that write, kind by kind; the last rank writes none."""
    save_all(PosixStorage(), str(tmp_path), 4, [lambda rank: small(4, rank)])
    directory = tmp_path / "iteration_00000001"
    assert data_files(directory) == [
        "CKP-model-0000000-0000001.safetensors",
        "CKP-opt-0000000-0000002.safetensors",
        "CKP-opt-0000001-0000002.safetensors",
    ]
    # The moment can't be on rank 0, so it is on rank 1; the weight and the step count follow where least is.
    stored = json.loads((directory / "metadata.json").read_text())["storage_data"]
    group = [0, 1, 2, 3]
    assert stored == {
        "('w', (0,))": [{"file_name": "CKP-model-0000000-0000001.safetensors", "storage_rank": 0, "rank_group": group}],
        "('adam_m.w', (0,))": [{"file_name": "CKP-opt-0000000-0000002.safetensors", "storage_rank": 1, "rank_group": [1, 2, 3]}],
        "('global_step', (0,))": [{"file_name": "CKP-opt-0000001-0000002.safetensors", "storage_rank": 2, "rank_group": group}],
    }
    assert sorted(json.loads((directory / "seal.json").read_text())["files"]) == sorted(
        [*data_files(directory), "common.json", "metadata.json", "extra/global.safetensors", "extra/metadata.index"]
        + [f"extra/rank-000000{rank}.safetensors" for rank in range(4)]
    )
    assert verify(directory).faults == ()
    for world in (1, 2, 4, 8):
        for balanced in (False, True):

            def load(comm: Communicator, balanced: bool = balanced) -> list[list[float]]:
                model, optimizer = (
                    {"w": np.full(6, 7, np.float32)},
                    {"adam_m.w": np.full(100, 7, np.float32), "global_step": np.zeros(1, np.int32)},
                )
                reshard.load(tmp_path, communicator=comm, model=model, optimizer=optimizer, balanced=balanced, restore_random=False)
                return [array.tolist() for array in (model["w"], optimizer["adam_m.w"], optimizer["global_step"])]

            expected = [np.arange(6).tolist(), np.arange(100).tolist(), [3]]
            assert run_ranks(world, load) == [expected] * world
    for command in (["verify"], ["show"], ["show", "w"], ["plan", "--strategy", "dp=2,tp=2"]):
        result = CliRunner().invoke(app, [command[0], str(tmp_path), *command[1:]])
        assert result.exit_code == 0, result.output


def test_a_state_without_optimizer_or_without_model(tmp_path: Path) -> None:
    save_all(PosixStorage(), f"{tmp_path}/a", 3, [lambda rank: state_of(whole_tensor(WEIGHT, np.ones(2)))])
    save_all(PosixStorage(), f"{tmp_path}/b", 3, [lambda rank: state_of(whole_tensor(GLOBAL_STEP, np.ones(1, np.int32)))])
    save_all(PosixStorage(), f"{tmp_path}/c", 3, [lambda rank: State()])
    save_all(PosixStorage(), f"{tmp_path}/d", 3, [lambda rank: small(3, rank)], SaveOptions(save_optimizer=False, remove_redundancy=True))
    assert data_files(tmp_path / "a/iteration_00000001") == ["CKP-model-0000000-0000001.safetensors"]
    assert data_files(tmp_path / "b/iteration_00000001") == ["CKP-opt-0000000-0000001.safetensors"]
    assert data_files(tmp_path / "c/iteration_00000001") == []
    assert data_files(tmp_path / "d/iteration_00000001") == ["CKP-model-0000000-0000001.safetensors"]
    for root in "abcd":
        assert verify(tmp_path / root / "iteration_00000001").faults == ()
        Checkpoint(tmp_path / root).check()


def test_one_rank_has_nothing_redundant(tmp_path: Path) -> None:
    for root, options in (("a", ONCE), ("b", SaveOptions(keep_checkpoint_max=None))):
        save_all(PosixStorage(), f"{tmp_path}/{root}", 1, [lambda rank: state_of(whole_tensor(GLOBAL_STEP, np.ones(1, np.int32)))], options)
    assert data_files(tmp_path / "a/iteration_00000001") == data_files(tmp_path / "b/iteration_00000001")


def test_saves_of_one_state_are_alike(tmp_path: Path) -> None:
    save_all(PosixStorage(), str(tmp_path), 4, [lambda rank: small(4, rank)] * 3)
    first, *others = (
        {name: (tmp_path / directory / name).read_bytes() for name in [*data_files(tmp_path / directory), "metadata.json"]}
        for directory in ("iteration_00000001", "iteration_00000002", "iteration_00000003")
    )
    assert others == [first, first]


def whole_values(storage: Storage, root: str, step: int) -> dict[str, list[float]]:
    checkpoint = Checkpoint(dict(list_iterations(storage, root))[step], storage)
    checkpoint.check()
    return {name: checkpoint[name].read().tolist() for name in checkpoint}


@pytest.mark.parametrize("changed", [{0}, {3}, {1, 2}, {0, 1, 2, 3}], ids=str)
def test_a_layout_that_changes_on_some_ranks(changed: set[int]) -> None:
    """They tell it with their outcomes; then all write anew. Files of the first attempt are gone."""
    storage = MemoryStorage()

    def state(rank: int) -> State:
        return small(4, rank, **({"late": np.ones(50)} if rank in changed else {}))

    save_all(storage, runs.ROOT, 4, [lambda rank: small(4, rank), state, state, lambda rank: small(4, rank)])
    assert [whole_values(storage, runs.ROOT, step).get("late") for step in (1, 2, 3, 4)] == [None, [1.0] * 50, [1.0] * 50, None]
    for step in (1, 2, 3, 4):
        assert verify(f"{runs.ROOT}/iteration_0000000{step}", storage=storage).faults == ()
    assert [name for name in runs.names(storage) if "saving" in name] == []
    second = {entry.name for entry in storage.list(f"{runs.ROOT}/iteration_00000002") if entry.name.endswith(".safetensors")}
    assert second == {entry.name for entry in storage.list(f"{runs.ROOT}/iteration_00000003") if entry.name.endswith(".safetensors")}


def test_a_failure_at_any_operation_while_a_layout_changes() -> None:
    """Also between the two attempts: every rank gets the error, what was committed stays, and the next save works."""

    def run(storages: Sequence[Storage]) -> list[object]:
        def on_rank(comm: Communicator) -> tuple[bool, str]:
            with Saver(storages[comm.rank], comm, runs.ROOT, ONCE) as saver:
                saver.save(1, small(2, comm.rank), CommonInfo())
                changed = small(2, comm.rank, **({"late": np.ones(50)} if comm.rank else {}))
                try:
                    saver.save(2, changed, CommonInfo())
                except ReshardError as error:
                    failure = str(error)
                else:
                    failure = ""
                saver.save(3, changed, CommonInfo())
            return failure == "", failure

        return list(run_ranks(2, on_rank))

    seen: set[bool] = set()
    for rank in range(2):
        shared = MemoryStorage()
        counted = [FaultyStorage(shared), FaultyStorage(shared)]
        assert [saved for saved, _ in run(counted)] == [True, True]
        first = next(i for i, (_, path) in enumerate(counted[rank].log, 1) if "00000002" in path)
        last = max(i for i, (_, path) in enumerate(counted[rank].log, 1) if "00000002" in path)
        assert last - first > 15
        for k in range(first, last + 1):
            storage = MemoryStorage()
            faulty = FaultyStorage(storage, fail_at=k)
            outcomes = run([faulty if r == rank else storage for r in range(2)])
            assert faulty.failed is not None
            assert outcomes[0] == outcomes[1], faulty.failed
            saved = outcomes[0][0]
            seen.add(saved)
            assert [step for step, _ in list_iterations(storage, runs.ROOT)] == ([1, 2, 3] if saved else [1, 3]), faulty.failed
            for step, directory in list_iterations(storage, runs.ROOT):
                assert ("late" in whole_values(storage, runs.ROOT, step)) == (step > 1)
                assert verify(directory, storage=storage).faults == ()
    assert seen == {True, False}


def test_ranks_that_were_told_different_things() -> None:
    def run(comm: Communicator) -> None:
        Saver(MemoryStorage(), comm, runs.ROOT, SaveOptions(remove_redundancy=comm.rank == 1)).close()

    for outcome in run_ranks_settled(2, run):
        assert isinstance(outcome, UsageError)
        assert outcome.field == "remove_redundancy"


def test_states_that_do_not_fit_together() -> None:
    storage = MemoryStorage()

    def run(comm: Communicator) -> None:
        with Saver(storage, comm, runs.ROOT, ONCE) as saver:
            saver.save(1, state_of(whole_tensor(WEIGHT, np.ones(2 + comm.rank))), CommonInfo())

    outcomes = run_ranks_settled(2, run)
    assert all(isinstance(outcome, CaptureError) for outcome in outcomes)
    assert "different shapes" in str(outcomes[0])
    assert str(outcomes[0]) == str(outcomes[1])
    assert runs.names(storage) == [".reshard.lock"]
