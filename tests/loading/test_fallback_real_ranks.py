"""Falling back in real processes: FSDP2 and AdamW, damage that one rank meets in the middle of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import reshard
from reshard.format.safetensors import read_header
from reshard.storage.posix import PosixStorage
from tests.loading.test_truncated import READS, Cutting
from tests.processes import RankPool


def made() -> tuple[Any, Any]:
    """A sharded model and a fresh optimizer, the same every time."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def step(model: Any, optimizer: Any, number: int) -> None:
    import torch

    model(torch.randn(4, 64, generator=torch.Generator().manual_seed(number))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model: Any, optimizer: Any) -> dict[str, bytes]:
    """All local values, the moments among them."""
    found = {name: parameter.to_local().detach().numpy().tobytes() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state[parameter].items():
            local = value.to_local() if hasattr(value, "to_local") else value
            found[f"{slot}.{name}"] = local.numpy().tobytes()
    return found


def train(root: Path) -> None:
    model, optimizer = made()
    with reshard.CheckpointManager(root) as manager:
        for number in (1, 2, 3):
            step(model, optimizer, number)
            manager.save(number, model=model, optimizer=optimizer)


def resume(root: Path, balanced: bool, cuts: bool) -> tuple[int | None, str, bool]:
    """Fall back into a fresh run, and into one that has trained elsewhere; whether both are what iteration 2 is, and train on alike."""
    import torch.distributed as dist

    plain_model, plain_optimizer = made()
    reshard.load(root / "iteration_00000002", model=plain_model, optimizer=plain_optimizer)
    step(plain_model, plain_optimizer, 9)
    wanted = values(plain_model, plain_optimizer)
    is_same = True
    report = None
    for trained in (False, True):
        model, optimizer = made()
        if trained:
            step(model, optimizer, 77)
        is_cutting = cuts and dist.get_rank() == dist.get_world_size() - 1
        storage = Cutting(READS) if is_cutting and not trained else PosixStorage()
        report = reshard.load(root, model=model, optimizer=optimizer, storage=storage, balanced=balanced, on_corrupt="fallback")
        step(model, optimizer, 9)
        is_same &= values(model, optimizer) == wanted
    assert report is not None
    return report.iteration, " ".join(map(str, report.passed_over)), is_same


@pytest.mark.parametrize("balanced", [True, False], ids=["balanced", "direct"])
def test_a_file_that_is_cut_short_while_it_is_read(rank_pool: Callable[[int], RankPool], tmp_path: Path, balanced: bool) -> None:
    rank_pool(2).run(train, tmp_path)
    assert rank_pool(2).run(resume, tmp_path, balanced, True) == [(2, "iteration 3 (damaged)", True)] * 2


def test_a_flipped_bit_in_the_data(rank_pool: Callable[[int], RankPool], tmp_path: Path) -> None:
    rank_pool(2).run(train, tmp_path)
    (path,) = (tmp_path / "iteration_00000003").glob("*-opt-0000001-*")
    entry = read_header(PosixStorage(), str(path)).entries["adam_m.2.weight"]
    data = bytearray(path.read_bytes())
    data[entry.end - 3] ^= 16
    path.write_bytes(data)
    assert rank_pool(2).run(resume, tmp_path, True, False) == [(2, "iteration 3 (damaged)", True)] * 2
