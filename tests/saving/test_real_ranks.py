"""Hybrid sharding on real ranks: what replicas hold is written once, only outcomes are told, and drifted replicas are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import reshard
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
