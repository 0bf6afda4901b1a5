"""Hybrid sharding on real ranks: what replicas hold is written once, only outcomes are told, and drifted replicas are found."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.errors import CommunicationError
from reshard.frameworks.select import default_communicator
from reshard.verification import verify
from tests.counted import Counted
from tests.loading.test_real_ranks import SETTINGS, build, sizes, wrong_tensors
from tests.processes import RankPool

# Two copies, each of which two ranks share.
HYBRID = sizes(replicate=2, shard=2)


def train_and_save(root: Path, drifts: bool) -> tuple[list[list[str]], str, int]:
    """Two steps and three saves: what each save called on this rank, the error of the last one, and the bytes written in the first."""
    import torch

    model, optimizer = build(SETTINGS, HYBRID, seed=1)
    inner = default_communicator()
    counted = Counted(inner)
    calls, error, written = [], "", 0
    with reshard.CheckpointManager(root, communicator=counted, remove_redundancy=True, check_replicas=drifts) as manager:
        for step in (1, 2, 3):
            if step < 3:
                for parameter in model.parameters():
                    parameter.grad = parameter.detach().clone().mul_(0.5)
                optimizer.step()
            if drifts and step == 3 and inner.rank == 3:
                with torch.no_grad():
                    model.get_parameter("model.norm.weight").to_local().add_(1)
            counted.calls.clear()
            try:
                report = manager.save(step, model=model, optimizer=optimizer)
                written = written or report.nbytes
            except reshard.ReshardError as caught:
                error = str(caught)
            calls.append(list(counted.calls))
    inner.close()
    return calls, error, written


def load(root: Path) -> list[str]:
    model, optimizer = build(SETTINGS, sizes(tensor=4), seed=2)
    reshard.load(root, model=model, optimizer=optimizer, balanced=True)
    return wrong_tensors(root, model, optimizer)


def test_replicas_on_real_ranks(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    steady = ["all_gather", "broadcast"]
    results = rank_pool(4).run(train_and_save, tmp_path / "a", False)
    assert [(calls, error) for calls, error, _ in results] == [([["all_gather", *steady], steady, steady], "")] * 4
    checkpoint = reshard.Checkpoint(tmp_path / "a")
    assert verify(checkpoint.directory).faults == ()
    held = [chunk for name in checkpoint for chunk in checkpoint[name].chunks]
    assert all(len(chunk.places) == 1 for chunk in held)
    assert {len(chunk.holders) for chunk in held} == {2, 4}
    written = [nbytes for _, _, nbytes in results]
    assert max(written) <= 1.05 * sum(written) / 4
    assert rank_pool(4).run(load, tmp_path / "a") == [[]] * 4

    drifted = rank_pool(4).run(train_and_save, tmp_path / "b", True)
    assert [calls for calls, _, _ in drifted] == [[["all_gather", *steady], steady, ["all_gather", *steady]]] * 4
    errors = {error for _, error, _ in drifted}
    assert len(errors) == 1
    # Of the norm's 20 elements ranks 1 and 3 hold the second half.
    (error,) = errors
    assert "model.norm.weight, offset [10], shape [10]: one value on rank 1, another on rank 3" in error
    assert reshard.Checkpoint(tmp_path / "b").iteration == 2


def save_beside_collectives(root: Path) -> list[tuple[int, int]]:
    """Asynchronous saves, with training's collectives beside them: how many files and threads there are after some, and after more."""
    import torch
    import torch.distributed as dist

    left = []
    with reshard.CheckpointManager(root, async_save=True, remove_redundancy=True) as manager:
        model = torch.nn.Linear(64, 64)
        for step in range(1, 13):
            manager.save(step, model=model)
            summed = torch.full((256,), float(step))
            dist.all_reduce(summed)
            assert summed.eq(step * dist.get_world_size()).all()
            if step in (4, 12):
                manager.wait()
                deadline = time.monotonic() + 60
                while any(thread.name == "reshard-heartbeat" for thread in threading.enumerate()):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                dist.barrier()
                # Rank 0 serves the store: it sees the ends of the others' connections when it comes to it.
                most = left[0] if left else (0, 0)
                deadline = time.monotonic() + (30 if left else 2)
                counts = []
                while not counts or (min(counts) > most and time.monotonic() < deadline):
                    counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
                    time.sleep(0.02)
                left.append(min(counts))
    return left


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system doesn't tell which files are open")
def test_asynchronous_saves_leave_no_files_and_no_threads(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    for early, late in rank_pool(2).run(save_beside_collectives, tmp_path):
        assert late <= early
    assert reshard.Checkpoint(tmp_path).iteration == 12


def end_torch_first(root: Path) -> int:
    import torch
    import torch.distributed as dist

    model = torch.nn.Linear(8, 8)
    manager = reshard.CheckpointManager(root, async_save="copy")
    manager.save(1, model=model)
    dist.destroy_process_group()
    manager.save(2, model=model)
    manager.close()
    return reshard.Checkpoint(root).iteration


def test_a_save_goes_on_after_torch_distributed_has_ended(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    """On one machine, where its ranks agree over sockets of their own."""
    pool = rank_pool(2)
    try:
        assert pool.run_settled(end_torch_first, tmp_path / "root", timeout=60) == [2] * 2
    finally:
        pool.restart()


def test_who_ends_torch_distributed_before_the_manager_is_told_so() -> None:
    from reshard.frameworks.torch.communicator import TorchCommunicator

    left: Any = TorchCommunicator.__new__(TorchCommunicator)
    left.rank, left.world_size, left._group, left._star, left._told = 0, 2, object(), None, 0
    with pytest.raises(CommunicationError, match=r"destroy_process_group[\s\S]*close the manager first"):
        left.broadcast(b"")
