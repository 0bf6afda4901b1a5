"""Ranks of one machine read rows for each other where each needs columns."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import reshard
from benchmarks import states
from reshard.comm import Communicator, neighbours
from reshard.comm.neighbours import MOST_PIECES, Door, Neighbour, Pieces, are_writable
from reshard.errors import CommunicationError, DataFileError, ReshardError
from reshard.geometry import Mesh
from reshard.loading import filling, handing, handover
from reshard.planning import columns
from reshard.state import model_key
from reshard.storage import MemoryStorage, Storage
from reshard.testing import FaultyStorage, differences, run_ranks, run_ranks_settled, split, state_on_rank
from tests.interrupts import interrupted_at
from tests.processes import RankPool

WHOLE = {
    model_key("long"): np.random.default_rng(0).integers(0, 2**32, (600, 768), np.uint32).view(np.float32),
    model_key("short"): np.random.default_rng(1).integers(0, 256, (900, 120), np.uint8),
    model_key("deep"): np.random.default_rng(2).integers(0, 2**16, (24, 50, 144), np.uint16),
}
NBYTES = sum(array.nbytes for array in WHOLE.values())


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handing, "_LEAST_BYTES", 1)
    monkeypatch.setattr(columns, "_LEAST_BYTES", 1)


def part_of(rank: int, world: int, dimension: int, *, blank: bool = False) -> Any:
    """A rank's part of the tensors, split along their first or their last dimension."""
    mesh = Mesh((world,), ("tp",), tuple(range(world)))
    placements = {key: ["tp" if d == dimension % array.ndim else None for d in range(array.ndim)] for key, array in WHOLE.items()}
    return state_on_rank(WHOLE, {key: split(mesh, *placements[key]) for key in WHOLE}, rank, blank=blank)


def named(state: Any) -> dict[str, Any]:
    return {key.parameter: tensor for key, tensor in state.tensors.items()}


def save(root: str | Path, storage: Storage | None = None) -> None:
    run_ranks(2, lambda comm: reshard.save(root, 1, communicator=comm, storage=storage, model=named(part_of(comm.rank, 2, 0))))


def load(comm: Communicator, root: str | Path, storage: Storage | None = None, **options: Any) -> tuple[list[str], reshard.RestoreReport]:
    state = part_of(comm.rank, comm.world_size, -1, blank=True)
    report = reshard.load(root, communicator=comm, storage=storage, model=named(state), **options)
    return differences(WHOLE, state), report


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("budget", [1 << 20, 256 << 20])
@pytest.mark.parametrize("verify", [True, False])
def test_every_row_is_read_once_and_verified(world: int, budget: int, verify: bool) -> None:
    storage = MemoryStorage()
    save("/root", storage)
    results = run_ranks(world, lambda comm: load(comm, "/root", storage, memory_budget=budget, verify=verify))
    assert [wrong for wrong, _ in results] == [[]] * world
    report = results[0][1]
    assert report.bytes_needed == report.bytes_read == NBYTES
    assert report.bytes_verified == NBYTES * verify
    assert report.bytes_sent == sum(rank.bytes_received for rank in report.ranks) == NBYTES * (world - 1) // world
    assert report.bytes_of_pages == 0


@pytest.mark.parametrize("block_bytes", [3000, 20_000, 65_536])
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("world", [2, 3])
def test_tensors_of_many_blocks(monkeypatch: pytest.MonkeyPatch, block_bytes: int, verify: bool, world: int) -> None:
    monkeypatch.setattr(handover, "_BLOCK_BYTES", block_bytes)
    storage = MemoryStorage()
    save("/root", storage)
    results = run_ranks(world, lambda comm: load(comm, "/root", storage, verify=verify))
    assert [wrong for wrong, _ in results] == [[]] * world
    assert results[0][1].bytes_read == NBYTES


def test_without_it_the_result_is_the_same(tmp_path: Path) -> None:
    save(tmp_path)
    results = run_ranks(3, lambda comm: load(comm, tmp_path, neighbours=False))
    assert [wrong for wrong, _ in results] == [[]] * 3
    assert results[0][1].bytes_sent == 0


@pytest.mark.parametrize("missed", [{(0, 2)}, {(2, 0)}, {(0, 1), (1, 0)}, {(0, 1), (1, 2), (2, 0)}])
def test_what_a_rank_cannot_hand_over_its_neighbours_read_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missed: set[tuple[int, int]]
) -> None:
    """`missed`: which rank doesn't reach which."""
    save(tmp_path)

    class Unreachable(Neighbour):
        def __init__(self, rank: int, notice: Any, own: int) -> None:
            if (own, rank) in missed:
                raise PermissionError(1, "not allowed")
            super().__init__(rank, notice, own)

    def work(comm: Communicator) -> tuple[list[str], reshard.RestoreReport]:
        return load(comm, tmp_path)

    monkeypatch.setattr(handing, "Neighbour", Unreachable)
    results = run_ranks(3, work)
    assert [wrong for wrong, _ in results] == [[]] * 3
    alone = {rank for rank, _ in missed}
    report = results[0][1]
    assert [rank.bytes_sent > 0 for rank in report.ranks] == [rank not in alone for rank in range(3)]
    assert report.bytes_sent == sum(rank.bytes_received for rank in report.ranks)
    # Who read a part for all has read the rest, too.
    assert all(rank.bytes_read >= NBYTES // 3 for rank in report.ranks)


@pytest.mark.parametrize("missed", [set(), {(0, 1)}, {(3, 2)}, {(1, 0), (2, 3)}], ids=str)
@pytest.mark.parametrize("verify", [True, False])
def test_machines_hand_over_each_by_itself(monkeypatch: pytest.MonkeyPatch, missed: set[tuple[int, int]], verify: bool) -> None:
    """Two of two ranks, which together have whole tensors, and one of one; `missed`: which rank doesn't reach which."""
    storage = MemoryStorage()
    save("/root", storage)
    here = threading.local()

    class Unreachable(Neighbour):
        def __init__(self, rank: int, notice: Any, own: int) -> None:
            assert own // 2 == rank // 2
            if (own, rank) in missed:
                raise PermissionError(1, "not allowed")
            super().__init__(rank, notice, own)

    def work(comm: Communicator) -> tuple[list[str], reshard.RestoreReport]:
        here.rank = comm.rank
        state = part_of(comm.rank % 2, 2, -1, blank=True)
        report = reshard.load("/root", communicator=comm, storage=storage, model=named(state), verify=verify)
        return differences(WHOLE, state), report

    monkeypatch.setattr(handing, "Neighbour", Unreachable)
    monkeypatch.setattr(neighbours, "find_host", lambda _: f"machine {here.rank // 2}")
    results = run_ranks(5, work)
    assert [wrong for wrong, _ in results] == [[]] * 5
    report = results[0][1]
    hand_over = {0, 1, 2, 3} - {rank for rank, _ in missed}
    assert {rank.rank for rank in report.ranks if rank.bytes_sent} == hand_over
    assert report.bytes_sent == sum(rank.bytes_received for rank in report.ranks)


def test_what_one_rank_cannot_prepare_is_everyones_error(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    save("/root", storage)
    prepare = filling.prepare_handing

    def fail(*arguments: Any) -> Any:
        if arguments[-1] == 1:
            raise DataFileError("the file is gone", file="x")
        return prepare(*arguments)

    monkeypatch.setattr(filling, "prepare_handing", fail)
    results = run_ranks_settled(3, lambda comm: load(comm, "/root", storage))
    assert [type(result) for result in results] == [DataFileError] * 3
    assert all("the file is gone" in str(result) and "partly overwritten" in str(result) for result in results)


@pytest.mark.parametrize("verify", [True, False])
def test_a_rank_may_read_a_tensor_of_which_it_has_nothing(verify: bool) -> None:
    """As with stages of a pipeline: two ranks have one half of the tensors, two the other."""
    storage = MemoryStorage()
    save("/root", storage)

    def work(comm: Communicator) -> tuple[list[str], int]:
        state = part_of(comm.rank % 2, 2, -1, blank=True)
        mine = {key: state.tensors[key] for key in list(WHOLE)[:1] if comm.rank < 2} or {key: state.tensors[key] for key in list(WHOLE)[1:]}
        held = replace(state, tensors=mine)
        report = reshard.load("/root", communicator=comm, storage=storage, model=named(held), verify=verify)
        return differences({key: WHOLE[key] for key in mine}, held), report.ranks[comm.rank].bytes_read

    results = run_ranks(4, work)
    assert [wrong for wrong, _ in results] == [[]] * 4
    assert max(read for _, read in results) <= 1.3 * NBYTES / 4


@pytest.mark.parametrize("verify", [True, False])
def test_who_needs_a_tensor_whole_gets_it_while_others_hand_each_other_columns(verify: bool) -> None:
    """The third rank is one of those that read together, for another tensor's sake."""
    storage = MemoryStorage()
    save("/root", storage)
    whole, mesh = WHOLE[model_key("long")], Mesh((1,), ("tp",), (2,))

    def work(comm: Communicator) -> list[str]:
        state = part_of(comm.rank, comm.world_size, -1, blank=True)
        halves = part_of(comm.rank % 2, 2, -1, blank=True)
        key = model_key("long")
        own = state_on_rank({key: whole}, {key: split(mesh, None, None)}, 2, blank=True) if comm.rank == 2 else halves
        held = replace(state, tensors={**state.tensors, key: own.tensors[key]})
        reshard.load("/root", communicator=comm, storage=storage, model=named(held), verify=verify)
        return differences(WHOLE, held)

    assert run_ranks(3, work) == [[]] * 3


def test_memory_that_others_cannot_write_is_filled_by_its_own_rank(tmp_path: Path) -> None:
    """Memory of a device may have an address, and be none of this."""
    save(tmp_path)
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        assert are_writable([(address, mmap.PAGESIZE)] * MOST_PIECES)
        libc = ctypes.CDLL(None)
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ) == 0
        assert not are_writable([(address, mmap.PAGESIZE)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handing, "are_writable", lambda places: False)
        results = run_ranks(3, lambda comm: load(comm, tmp_path))
    assert [(wrong, report.bytes_sent) for wrong, report in results] == [([], 0)] * 3


def test_a_flipped_bit_is_everyones_error(tmp_path: Path) -> None:
    save(tmp_path)
    file = next(tmp_path.glob("iteration_*/*0000001-0000002.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100_000] ^= 4
    file.write_bytes(data)
    results = run_ranks_settled(3, lambda comm: load(comm, tmp_path))
    assert [type(result) for result in results] == [DataFileError] * 3


def test_a_rank_that_was_interrupted_gets_nothing_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its caller goes on, and only then another rank has read something for it."""
    storage = MemoryStorage()
    save("/root", storage)
    resumed, ended, inside = threading.Event(), threading.Event(), threading.local()
    hands = handover._Hands._read

    def handing_over(*arguments: Any) -> Any:
        inside.it = True
        try:
            return hands(*arguments)
        finally:
            inside.it = False

    class Slow(FaultyStorage):
        def _do(self, name: str, path: str, work: Any, torn: Any = None) -> Any:
            if name == "read_into" and getattr(inside, "it", False):
                assert resumed.wait(60)
            return work()

    class Interrupted(FaultyStorage):
        def _do(self, name: str, path: str, work: Any, torn: Any = None) -> Any:
            if name == "read_into" and getattr(inside, "it", False):
                raise KeyboardInterrupt
            return work()

    def work(comm: Communicator) -> None:
        state = part_of(comm.rank, 2, -1, blank=True)
        if comm.rank == 0:
            try:
                reshard.load("/root", communicator=comm, storage=Slow(storage), model=named(state))
            finally:
                ended.set()
        with pytest.raises(KeyboardInterrupt):
            reshard.load("/root", communicator=comm, storage=Interrupted(storage), model=named(state))
        left = [tensor.shards[0].memory.read().copy() for tensor in state.tensors.values()]
        resumed.set()
        assert ended.wait(60)
        assert all(np.array_equal(old, tensor.shards[0].memory.read()) for old, tensor in zip(left, state.tensors.values(), strict=True))

    monkeypatch.setattr(handover._Hands, "_read", handing_over)
    results = run_ranks_settled(2, work)
    assert isinstance(results[0], CommunicationError)
    assert "rank 1: it has left the load" in str(results[0])
    assert results[1] is None


def write_pieces(neighbour: Neighbour, source: int, target: int, nbytes: int) -> None:
    neighbour.write(*(Pieces.of(np.array([(0, nbytes)], np.int64), begin) for begin in (source, target)), nbytes)


WAYS = pytest.mark.parametrize("write", [write_pieces, Neighbour.write_run], ids=["pieces", "run"])


@WAYS
def test_nobody_writes_through_a_closed_door(write: Callable[[Neighbour, int, int, int], None]) -> None:
    target, source = np.zeros(4, np.int64), np.arange(4)
    door = Door.open(b"told")
    assert door is not None
    neighbour = Neighbour(5, door.notice, 0)
    assert neighbour.told == b"told"
    write(neighbour, source.ctypes.data, target.ctypes.data, source.nbytes)
    assert (target == source).all()
    target[:] = 0
    door.close()
    with pytest.raises(CommunicationError, match=r"rank: +0\n.*rank 5: it has left the load"):
        write(neighbour, source.ctypes.data, target.ctypes.data, source.nbytes)
    neighbour.close()
    # Whoever comes too late meets no other file either, which has the number of the door now.
    with open(os.devnull, "rb"), pytest.raises(ValueError, match="negative"):
        write(neighbour, source.ctypes.data, target.ctypes.data, source.nbytes)
    assert not target.any()


@WAYS
def test_memory_that_is_not_there_is_an_error(write: Callable[[Neighbour, int, int, int], None]) -> None:
    door = Door.open(b"")
    assert door is not None
    neighbour = Neighbour(1, door.notice, 0)
    source = np.arange(4)
    # The rank is there, so that it can be told.
    with pytest.raises(ReshardError, match="rank 1: its memory can't be written") as raised:
        write(neighbour, source.ctypes.data, 64, 32)
    assert not isinstance(raised.value, CommunicationError)
    neighbour.close()
    door.close()


@WAYS
def test_threads_that_fail_together_all_say_why(monkeypatch: pytest.MonkeyPatch, write: Callable[[Neighbour, int, int, int], None]) -> None:
    monkeypatch.setattr(neighbours, "_ENDING_MS", 200)
    door = Door.open(b"")
    assert door is not None
    neighbour = Neighbour(1, door.notice, 0)
    source = np.arange(4)
    with ThreadPoolExecutor(4) as pool:
        errors = [future.exception() for future in [pool.submit(write, neighbour, source.ctypes.data, 64, 32) for _ in range(8)]]
    assert all("its memory can't be written" in str(error) for error in errors)
    neighbour.close()
    door.close()


def test_a_door_that_is_forgotten_is_closed() -> None:
    door = Door.open(b"")
    assert door is not None
    neighbour = Neighbour(1, door.notice, 0)
    array = np.zeros(1, np.int64)
    pieces = Pieces.of(np.array([(array.ctypes.data, 8)], np.int64))
    del door
    gc.collect()
    with pytest.raises(CommunicationError, match="it has left the load"):
        neighbour.write(pieces, pieces, 8)
    neighbour.close()


def test_a_rank_that_leaves_waits_for_who_is_writing() -> None:
    door = Door.open(b"")
    assert door is not None
    with open(f"/proc/{os.getpid()}/fd/{door.notice.descriptor}", "rb") as written:
        fcntl.flock(written, fcntl.LOCK_SH)
        leaves = threading.Thread(target=door.close)
        leaves.start()
        deadline = time.monotonic() + 60
        while os.fstat(written.fileno()).st_size:  # nobody else begins
            assert time.monotonic() < deadline
            time.sleep(0.001)
        leaves.join(0.2)
        assert leaves.is_alive()
        fcntl.flock(written, fcntl.LOCK_UN)
        leaves.join(60)
        assert not leaves.is_alive()


def test_a_door_that_is_interrupted_while_it_closes_is_closed() -> None:
    array = np.zeros(1, np.int64)
    pieces = Pieces.of(np.array([(array.ctypes.data, 8)], np.int64))
    for point in count(1):
        door = Door.open(b"")
        assert door is not None
        neighbour = Neighbour(1, door.notice, 0)
        came = interrupted_at(point, door.close, [neighbours])
        if point == 1:  # before anything was done
            door.close()
        with pytest.raises(CommunicationError, match="it has left the load"):
            neighbour.write(pieces, pieces, 8)
        neighbour.close()
        door.close()
        if not came:
            break
    assert point > 4


def save_and_load(root: Path) -> tuple[bool, int]:
    """What a rank of four does: whether its columns of a tensor that was saved by rows are right, and how much was handed over."""
    import torch.distributed as dist

    tensors = (states.TensorSpec("w", (8192, 2048), 0),)  # 64 MiB: each rank needs half
    model, memory = states.build(tensors, states.TENSOR_PARALLEL)
    states.fill(tensors, states.TENSOR_PARALLEL, memory, dist.get_rank())
    reshard.save(root, 1, model=model)
    model, memory = states.build(tensors, states.TRANSPOSED)
    expected = states.digests(tensors, states.TRANSPOSED, dist.get_rank())
    report = reshard.load(root, model=model)
    return [xxhash.xxh3_128_digest(array) for array in memory] == expected, report.bytes_sent


def test_processes_write_into_each_others_memory(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    results = rank_pool(4).run(save_and_load, tmp_path)
    # All need 128 MiB together; of the 64 MiB that are read each row's reader keeps half.
    assert results == [(True, 96 << 20)] * 4
