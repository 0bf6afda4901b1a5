"""What each rank does under msrun: every case of one world size in one launch. Arguments: a directory, and whether all cases are run."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

import mindspore
import numpy as np
from mindspore import communication

import reshard
from reshard.comm import Communicator
from reshard.comm.sockets import SocketCommunicator
from reshard.errors import ReshardError
from reshard.frameworks.mindspore import MindSporeAdapter
from tests import golden
from tests.frameworks.mindspore.qwen3 import Strategy, differences, rank_part, trained, whole_arrays

DIRECTORY = Path(sys.argv[1])


def talk(comm: Communicator) -> None:
    """Everything that a communicator does."""
    rank, size = comm.rank, comm.world_size
    assert isinstance(comm, SocketCommunicator)
    for length in (0, 1, 5000, 3_000_000):
        rows = [bytes([number]) * (length + number) for number in range(size)]
        assert comm.all_gather(rows[rank]) == rows
        for source in {0, size - 1}:
            assert comm.broadcast(rows[rank], source) == rows[source]
        if rank == 0:
            comm.send(memoryview(rows[0]), 1)
            assert comm.recv(1) == rows[1]
        elif rank == 1:
            assert comm.recv(0) == rows[0]
            comm.send(rows[1], 0)
    other = comm.duplicate()
    comm.barrier()
    assert other.all_gather(b"x") == [b"x"] * size
    other.close()
    comm.board().post("topic", bytes([rank]))
    comm.board().post("shared", b"s", shared=True)
    comm.barrier()
    assert comm.board().read_all("topic", size) == [bytes([number]) for number in range(size)]
    assert comm.board().read("shared", None) == b"s"
    assert comm.board().read("nothing", 1) is None


def strategies(size: int) -> list[Strategy]:
    found = [Strategy(dp=size), Strategy(tp=size), Strategy(dp=size, sharded=True)]
    if size >= 4:
        found += [Strategy(dp=2, tp=size // 2), Strategy(tp=size // 2, pp=2), Strategy(dp=2, tp=size // 4, pp=2, sharded=True)]
    else:
        found += [Strategy(pp=2)]
    # Sizes that the small model can be cut to.
    return [one for one in found if not (one.sharded and one.dp > 4)]


def save_and_load(size: int, comm: Communicator) -> None:
    """Each strategy saves, in another way each, and the next one loads, balanced and not."""
    whole = whole_arrays(*trained(3))
    every = strategies(size)
    ways = [
        {},
        {"remove_redundancy": True},
        {"async_save": True},
        {"remove_redundancy": True, "async_save": True, "check_replicas": True},
        {"async_save": "deferred", "prefix": "qwen3"},
        {"save_optimizer": True, "keep_checkpoint_max": 1},
    ]
    for number, strategy in enumerate(every):
        model, optimizer = rank_part(whole, strategy, comm.rank)
        root = DIRECTORY / f"saved-{size}-{number}"
        with reshard.CheckpointManager(root, communicator=comm, **ways[number]) as manager:
            manager.save(3, model=model, optimizer=optimizer)
            model.rows[0].set_data(model.rows[0] * 0)  # the snapshot was taken before
        following = every[(number + 1) % len(every)]
        for balanced in (False, True):
            model, optimizer = rank_part(whole, following, comm.rank, blank=True)
            report = reshard.load(root, model=model, optimizer=optimizer, balanced=balanced, communicator=comm)
            assert not report.missing
            assert not report.unexpected
            assert differences(whole, following, comm.rank, model, optimizer) == [], f"{strategy} to {following}"


def fewer_regions_than_ranks(comm: Communicator) -> None:
    whole = whole_arrays(*trained(1))
    model, _ = rank_part(whole, Strategy(dp=comm.world_size), comm.rank)
    small = model.rows[1]  # one tensor, which all ranks hold
    cell = mindspore.nn.Cell()
    cell.one = mindspore.Parameter(small.value(), name="one")
    root = DIRECTORY / f"few-{comm.world_size}"
    report = reshard.save(root, 1, model=cell, remove_redundancy=True, communicator=comm)
    assert report.state == "committed"
    assert reshard.Checkpoint(root)["one"][:].tobytes() == small.asnumpy().tobytes()


def golden_checkpoints(comm: Communicator) -> None:
    """What the published implementation wrote goes into real cells."""
    for case in golden.CASES:
        whole = golden.typed(case)
        for strategy in strategies(comm.world_size):
            model, optimizer = rank_part(whole, strategy, comm.rank, blank=True)
            reshard.load(golden.root(case), model=model, optimizer=optimizer, communicator=comm)
            assert differences(whole, strategy, comm.rank, model, optimizer) == [], f"{case} to {strategy}"


def failing_ranks(comm: Communicator) -> None:
    """A rank that can't capture: all hear of it, nothing is committed, and the next save works."""
    cell = mindspore.nn.Cell()
    kind = np.complex128 if comm.rank == comm.world_size - 1 else np.float32
    cell.w = mindspore.Parameter(mindspore.Tensor(np.ones(2, kind)), name="w")
    root = DIRECTORY / f"failed-{comm.world_size}"
    with reshard.CheckpointManager(root, communicator=comm) as manager:
        try:
            manager.save(1, model=cell)
        except ReshardError as error:
            assert f"rank {comm.world_size - 1}" in str(error)  # noqa: PT017 - no pytest here
        else:
            raise AssertionError("nobody heard of the rank that failed")
        cell.w = mindspore.Parameter(mindspore.Tensor(np.ones(2, np.float32)), name="w")
        assert manager.save(2, model=cell).state == "committed"


def main() -> None:
    communication.init("mccl")
    rank, size = communication.get_rank(), communication.get_group_size()
    results: dict[str, str | float] = {}
    comm = MindSporeAdapter(timeout=60).communicator()
    cases = {
        "talk": lambda: talk(comm),
        "save and load": lambda: save_and_load(size, comm),
        "fewer regions than ranks": lambda: fewer_regions_than_ranks(comm),
        "a rank that fails": lambda: failing_ranks(comm),
        "golden checkpoints": lambda: golden_checkpoints(comm),
    }
    for name, case in cases.items():
        began = time.monotonic()
        try:
            case()
            results[name] = round(time.monotonic() - began, 2)
        except BaseException:  # noqa: BLE001 - the test must see it
            results[name] = traceback.format_exc()
            break
    (DIRECTORY / f"rank-{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    comm.close()
    if any(isinstance(value, str) for value in results.values()):
        os._exit(1)  # at once: the others may wait for this rank


if __name__ == "__main__":
    main()
