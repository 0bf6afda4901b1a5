"""Balanced loads: the bytes of a direct load, each read once in the whole job; one rank's failure is everyone's."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import CommunicationError, DataFileError, ReshardError, StorageError, UsageError
from reshard.format.names import DATA_SUFFIX, tensor_name
from reshard.format.safetensors import read_header
from reshard.state import Kind, State, TensorKey
from reshard.storage import ReadableFile, Storage
from reshard.storage.memory import MemoryStorage
from reshard.storage.posix import PosixStorage
from reshard.testing import FaultyStorage, SimulatedDeath, differences, run_ranks, run_ranks_settled, split, state_on_rank
from tests import golden
from tests.loading.test_golden import STRATEGIES as GOLDEN_STRATEGIES
from tests.loading.test_golden import layout as golden_layout
from tests.loading.test_matrix import parts
from tests.loading.test_random_layouts import named
from tests.strategies import MOSTLY_SWEPT, Strategy, arrays, layouts

ARRAYS = arrays()
NEEDED = sum(array.nbytes for array in ARRAYS.values())
LARGEST = max(array.nbytes for array in ARRAYS.values())


class CountingStorage:
    """Another storage that counts the bytes of data that are read of safetensors files (headers apart), by file and first byte."""

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self._guard = threading.Lock()
        self.small: Counter[str] = Counter()
        self.data: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_bytes(self, path: str) -> bytes:
        with self._guard:
            self.small[path.rpartition("/")[2]] += 1
        return self._inner.read_bytes(path)

    def open_read(self, path: str) -> ReadableFile:
        if not path.endswith(DATA_SUFFIX):
            with self._guard:
                self.small[path.rpartition("/")[2]] += 1
            return self._inner.open_read(path)
        return CountingFile(self, self._inner.open_read(path), read_header(self._inner, path).nbytes)


class CountingFile:
    def __init__(self, storage: CountingStorage, inner: ReadableFile, header_bytes: int) -> None:
        self._storage = storage
        self._inner = inner
        self._header_bytes = header_bytes
        self.path, self.size = inner.path, inner.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        if offset >= self._header_bytes:
            with self._storage._guard:
                self._storage.data[self.path] += buffer.nbytes
        self._inner.read_into(offset, buffer)

    def scatter(self, offset: int, pieces: np.ndarray, nbytes: int) -> None:
        with self._storage._guard:
            self._storage.data[self.path] += nbytes
        self._inner.scatter(offset, pieces, nbytes)

    def map(self, offset: int, nbytes: int) -> memoryview | None:
        return None  # so that nothing escapes the count

    def close(self) -> None:
        self._inner.close()

    def __enter__(self) -> CountingFile:
        return self

    def __exit__(self, *of_an_error: object) -> None:
        self.close()


def save(strategy: Strategy, storage: Storage, root: str = "/root") -> None:
    placed = layouts(strategy)

    def work(comm: Communicator) -> None:
        state = state_on_rank(ARRAYS, placed, comm.rank)
        reshard.save(
            root,
            12,
            communicator=comm,
            storage=storage,
            model=parts(state, Kind.MODEL),
            optimizer=parts(state, Kind.OPTIMIZER),
            extra={"numbers": np.arange(5)},
            common=reshard.CommonInfo(global_step=12),
        )

    run_ranks(strategy.world_size, work)


def load(comm: Communicator, storage: Storage, state: State, root: str = "/root", **options: Any) -> reshard.RestoreReport:
    return reshard.load(
        root,
        communicator=comm,
        storage=storage,
        model=parts(state, Kind.MODEL),
        optimizer=parts(state, Kind.OPTIMIZER),
        **{"balanced": True, **options},
    )


@pytest.fixture(scope="module")
def saved() -> dict[Strategy, MemoryStorage]:
    """A checkpoint of each of some strategies."""
    found = {}
    for strategy in (Strategy(), Strategy(tp=4), Strategy(dp=4, fsdp=True), Strategy(dp=2, tp=2, pp=2)):
        found[strategy] = MemoryStorage()
        save(strategy, found[strategy])
    return found


@pytest.mark.parametrize("target", MOSTLY_SWEPT)
def test_every_byte_is_read_once_and_evenly_and_is_right(target: Strategy, saved: dict[Strategy, MemoryStorage]) -> None:
    placed = layouts(target)
    for source, inner in saved.items():
        storages = [CountingStorage(inner) for _ in range(target.world_size)]

        def work(comm: Communicator, inner: Storage = inner, storages: list[CountingStorage] = storages) -> tuple[list[str], Any, Any]:
            state = state_on_rank(ARRAYS, placed, comm.rank, blank=True)
            report = load(comm, storages[comm.rank], state)
            direct = load(comm, inner, state_on_rank(ARRAYS, placed, comm.rank, blank=True), balanced=False)
            return differences(ARRAYS, state), report, direct

        results = run_ranks(target.world_size, work)
        assert [wrong for wrong, _, _ in results] == [[]] * target.world_size, f"{source} to {target}"
        _, report, direct = results[0]
        counted = [sum(nbytes for path, nbytes in storage.data.items() if "/extra/" not in path) for storage in storages]
        assert [rank.bytes_read for rank in report.ranks] == counted
        assert sum(counted) == NEEDED, f"{source} to {target}"
        # The state is so small that each chunk is one row block, which one rank reads.
        assert max(counted) <= 1.02 * NEEDED / target.world_size + LARGEST
        assert report.bytes_sent == sum(rank.bytes_received for rank in report.ranks)
        assert report.bytes_needed == direct.bytes_needed


@pytest.mark.parametrize("case", golden.CASES)
def test_checkpoints_of_the_published_implementation(case: str) -> None:
    root = golden.root(case)
    expected = golden.expected(case)
    checkpoint = reshard.Checkpoint(root)
    whole: dict[TensorKey, np.ndarray] = {}
    for name in checkpoint:
        view = checkpoint[name]
        whole[view.key] = expected[name].astype(view.read().dtype)
    for dp, tp, pp, sharded in GOLDEN_STRATEGIES:
        placed = {key: golden_layout(tensor_name(key), array.ndim, dp, tp, pp, sharded) for key, array in whole.items()}

        def work(comm: Communicator, placed: dict = placed) -> tuple[list[str], reshard.RestoreReport]:
            state = state_on_rank(whole, placed, comm.rank, blank=True)
            report = load(comm, PosixStorage(), state, str(root))
            return differences(whole, state), report

        results = run_ranks(dp * tp * pp, work)
        assert all(wrong == [] for wrong, _ in results), f"dp{dp} tp{tp} pp{pp} sharded {sharded}"
        assert results[0][1].bytes_read == sum(array.nbytes for array in whole.values())


def test_what_all_ranks_need_is_read_by_one(saved: dict[Strategy, MemoryStorage]) -> None:
    target = Strategy(dp=4)
    storages = [CountingStorage(saved[Strategy(tp=4)]) for _ in range(4)]

    def work(comm: Communicator) -> reshard.RestoreReport:
        return load(comm, storages[comm.rank], state_on_rank(ARRAYS, layouts(target), comm.rank, blank=True), restore_random=False)

    for report in run_ranks(4, work):
        assert report.common is not None
        assert report.common.global_step == 12
        assert np.array_equal(report.extra["numbers"], np.arange(5))
    for storage in storages[1:]:
        assert not storage.small
        assert not any("/extra/" in path for path in storage.data)


@pytest.fixture
def big() -> tuple[dict[TensorKey, np.ndarray], MemoryStorage]:
    """A checkpoint that takes several stages and messages under the least budget: 6 MB, of which one tensor has 4."""
    key = next(iter(ARRAYS))
    whole = {
        TensorKey(Kind.MODEL, None, f"w{number}"): np.random.default_rng(number).integers(0, 256, (rows, 512), np.uint8)
        for number, rows in enumerate((8000, 1000, 1001, 999, 1, 997))
    }
    storage = MemoryStorage()
    mesh = layouts(Strategy(tp=2))[key].mesh

    def save(comm: Communicator) -> None:
        state = state_on_rank(whole, {key: split(mesh, "tp", None) for key in whole}, comm.rank)
        reshard.save("/root", 1, communicator=comm, storage=storage, model=named(state))

    run_ranks(2, save)
    return whole, storage


@pytest.mark.parametrize("placement", [("tp", None), (None, "tp"), (None, None)], ids=["rows", "columns", "replicas"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_many_stages_and_messages(big: tuple[dict[TensorKey, np.ndarray], MemoryStorage], placement: tuple, world: int) -> None:
    whole, storage = big
    mesh = Strategy(tp=world).mesh(0)

    def work(comm: Communicator) -> tuple[list[str], reshard.RestoreReport]:
        state = state_on_rank(whole, {key: split(mesh, *placement) for key in whole}, comm.rank, blank=True)
        report = reshard.load("/root", communicator=comm, storage=storage, model=named(state), balanced=True, memory_budget=1 << 20)
        return differences(whole, state), report

    results = run_ranks(world, work)
    assert all(wrong == [] for wrong, _ in results)
    total = sum(array.nbytes for array in whole.values())
    reads = [rank.bytes_read for rank in results[0][1].ranks]
    assert sum(reads) == total
    assert max(reads) <= 1.05 * total / world


def fail_one(world: int, storages: list[Storage], whole: dict[TensorKey, np.ndarray]) -> list[Any]:
    mesh = Strategy(dp=world).mesh(0)

    def work(comm: Communicator) -> None:
        state = state_on_rank(whole, {key: split(mesh, None, None) for key in whole}, comm.rank, blank=True)
        reshard.load("/root", communicator=comm, storage=storages[comm.rank], model=named(state), balanced=True, memory_budget=1 << 20)

    return run_ranks_settled(world, work, timeout=20)


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("error", [StorageError, OSError])
def test_one_rank_fails_and_all_hear_the_same(
    big: tuple[dict[TensorKey, np.ndarray], MemoryStorage], failing: int, error: type[Exception]
) -> None:
    whole, storage = big
    counter = FaultyStorage(storage, operations=["read_into"])
    assert fail_one(3, [counter if rank == failing else storage for rank in range(3)], whole) == [None] * 3
    assert counter.count > 8
    for fail_at in range(1, counter.count + 1, max(1, counter.count // 12)):
        faulty = FaultyStorage(storage, fail_at=fail_at, error=error, operations=["read_into"])
        outcomes = fail_one(3, [faulty if rank == failing else storage for rank in range(3)], whole)
        assert faulty.failed is not None
        assert all(isinstance(outcome, ReshardError) for outcome in outcomes)
        assert len({(type(outcome), str(outcome)) for outcome in outcomes}) == 1
        assert "simulated failure" in str(outcomes[0])
        assert f"rank {failing}" in str(outcomes[0])


def test_all_ranks_fail_and_all_hear_the_same(big: tuple[dict[TensorKey, np.ndarray], MemoryStorage]) -> None:
    whole, storage = big
    storages: list[Storage] = [FaultyStorage(storage, fail_at=9 + rank, lasting=True, operations=["read_into"]) for rank in range(3)]
    outcomes = fail_one(3, storages, whole)
    assert len({(type(outcome), str(outcome)) for outcome in outcomes}) == 1
    assert isinstance(outcomes[0], StorageError)


def test_a_rank_that_dies_leaves_nobody_waiting(big: tuple[dict[TensorKey, np.ndarray], MemoryStorage]) -> None:
    whole, storage = big
    dying = FaultyStorage(storage, fail_at=12, error=SimulatedDeath, operations=["read_into"])
    outcomes = fail_one(3, [storage, dying, storage], whole)
    assert isinstance(outcomes[1], SimulatedDeath)
    assert all(isinstance(outcomes[rank], CommunicationError) for rank in (0, 2))


def test_a_memory_that_refuses_is_everyones_error(big: tuple[dict[TensorKey, np.ndarray], MemoryStorage]) -> None:
    whole, storage = big
    mesh = Strategy(dp=3).mesh(0)

    def work(comm: Communicator) -> None:
        state = state_on_rank(whole, {key: split(mesh, None, None) for key in whole}, comm.rank, blank=True)
        if comm.rank == 1:
            for tensor in state.tensors.values():
                tensor.shards[0].memory.read().flags.writeable = False
        reshard.load("/root", communicator=comm, storage=storage, model=named(state), balanced=True, memory_budget=1 << 20)

    outcomes = run_ranks_settled(3, work, timeout=20)
    assert len({str(outcome) for outcome in outcomes}) == 1
    assert "read-only" in str(outcomes[0])


def test_a_truncated_file_changes_nothing(saved: dict[Strategy, MemoryStorage], tmp_path: Path) -> None:
    save(Strategy(tp=2), PosixStorage(), str(tmp_path))
    file = next(tmp_path.glob("iteration_*/*model-0000001*"))
    file.write_bytes(file.read_bytes()[:-8])

    def work(comm: Communicator) -> State:
        state = state_on_rank(ARRAYS, layouts(Strategy(dp=4)), comm.rank, blank=True)
        with pytest.raises(DataFileError, match="model-0000001"):
            load(comm, PosixStorage(), state, str(tmp_path))
        return state

    for rank, state in enumerate(run_ranks(4, work)):
        untouched = state_on_rank(ARRAYS, layouts(Strategy(dp=4)), rank, blank=True)
        for key, tensor in state.tensors.items():
            assert tensor.shards[0].memory.read().tobytes() == untouched.tensors[key].shards[0].memory.read().tobytes()


@pytest.mark.parametrize(
    "options",
    [
        lambda rank: {"balanced": rank == 1},
        lambda rank: {"balanced": rank == 0},
        lambda rank: {"memory_budget": (rank + 1) << 20},
        lambda rank: {"verify": rank == 1},
    ],
)
def test_ranks_with_different_options_hear_so(saved: dict[Strategy, MemoryStorage], options: Callable[[int], dict]) -> None:
    def work(comm: Communicator) -> None:
        state = state_on_rank(ARRAYS, layouts(Strategy(dp=2)), comm.rank, blank=True)
        load(comm, saved[Strategy()], state, **options(comm.rank))

    for outcome in run_ranks_settled(2, work, timeout=20):
        assert isinstance(outcome, UsageError)
        assert "different options" in str(outcome)


def test_a_budget_too_small_is_refused(saved: dict[Strategy, MemoryStorage]) -> None:
    def work(comm: Communicator) -> None:
        load(comm, saved[Strategy()], state_on_rank(ARRAYS, layouts(Strategy(dp=2)), comm.rank, blank=True), memory_budget=1000)

    with pytest.raises(UsageError, match="memory_budget"):
        run_ranks(2, work)


def test_a_part_of_the_tensors_and_other_types(saved: dict[Strategy, MemoryStorage]) -> None:
    """`only` and `cast` go with it: both are done where the bytes arrive."""
    chosen = [key for key in ARRAYS if key.parameter == "layers.1.qkv.weight"]
    wanted = {key: array.astype(np.float64) if key in chosen else array for key, array in ARRAYS.items()}

    def work(comm: Communicator) -> tuple[list[str], reshard.RestoreReport]:
        state = state_on_rank(wanted, layouts(Strategy(dp=2)), comm.rank, blank=True)
        report = load(
            comm, saved[Strategy(tp=4)], state, only="layers.1.qkv.weight", exclude="global_step", strict=reshard.Strictness(dtype="cast")
        )
        return [key.parameter for key in chosen if differences({key: wanted[key]}, State({key: state.tensors[key]}))], report

    for wrong, report in run_ranks(2, work):
        assert wrong == []
        assert len(report.cast) == 3
        assert report.bytes_read == sum(ARRAYS[key].nbytes for key in chosen)
