"""An adapter that captures again: it finds what a new one finds, whatever has changed in between, and keeps no tensor alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard

from reshard.frameworks.torch import TorchAdapter
from reshard.state import State
from tests.frameworks.torch.simulated import distribute, fake_rank, make_mesh, numbered

Change = Callable[[nn.Module, torch.optim.Optimizer, Any], "tuple[nn.Module, torch.optim.Optimizer]"]


def made(mesh: Any, rows: int = 6) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.LayerNorm(4), nn.Linear(1, 1, bias=False))
    module[0].weight = nn.Parameter(distribute(numbered((rows, 4)), mesh["tp"], [Shard(0)]))
    module[2].weight = nn.Parameter(distribute(numbered((5, 4), 100), mesh["tp"], [Shard(1)]))
    fully_shard(module[1], mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(module.parameters(), foreach=False)
    step(module, optimizer)
    return module, optimizer


def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def nothing(module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    step(module, optimizer)
    return module, optimizer


def another_placement(module: Any, optimizer: torch.optim.Optimizer, mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    module[0].weight = nn.Parameter(distribute(numbered((6, 4), 7), mesh["tp"], [Replicate()]))
    return module, torch.optim.AdamW(module.parameters())


def another_slice_of_the_mesh(module: Any, optimizer: torch.optim.Optimizer, mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    module[2].weight = nn.Parameter(distribute(numbered((5, 4), 7), mesh["dp"], [Shard(0)]))
    return module, torch.optim.AdamW(module.parameters())


def all_of_the_mesh(module: Any, optimizer: torch.optim.Optimizer, mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    module[2].weight = nn.Parameter(distribute(numbered((5, 4), 7), mesh, [Shard(0), Shard(1)]))
    return module, torch.optim.AdamW(module.parameters())


def another_model_in_its_place(module: Any, optimizer: torch.optim.Optimizer, mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    del module, optimizer
    gc.collect()
    return made(mesh, rows=7)


def moments_loaded(module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer.load_state_dict(optimizer.state_dict())
    return module, optimizer


CHANGES: list[Change] = [
    nothing,
    another_placement,
    another_slice_of_the_mesh,
    all_of_the_mesh,
    another_model_in_its_place,
    moments_loaded,
]


def assert_same(one: State, other: State) -> None:
    assert list(one.tensors) == list(other.tensors)
    for key, tensor in one.tensors.items():
        expected = other.tensors[key]
        assert tensor[:4] == expected[:4], key
        assert [shard.region for shard in tensor.shards] == [shard.region for shard in expected.shards], key
        for mine, theirs in zip(tensor.shards, expected.shards, strict=True):
            np.testing.assert_array_equal(mine.memory.read(), theirs.memory.read())
    assert (one.groups, one.updated) == (other.groups, other.updated)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("rank", [0, 3])
def test_it_finds_what_a_new_one_finds(change: Change, rank: int) -> None:
    with fake_rank(rank, 4):
        mesh = make_mesh((2, 2), ("dp", "tp"))
        module, optimizer = made(mesh)
        adapter = TorchAdapter()
        assert_same(adapter.capture(module, optimizer, global_step=None), TorchAdapter().capture(module, optimizer, global_step=None))
        for _ in range(2):
            module, optimizer = change(module, optimizer, mesh)
            assert_same(adapter.capture(module, optimizer, global_step=None), TorchAdapter().capture(module, optimizer, global_step=None))
        module, optimizer = made(make_mesh((4, 1), ("dp", "tp")))
        assert_same(adapter.capture(module, optimizer, global_step=None), TorchAdapter().capture(module, optimizer, global_step=None))
        plain = nn.Linear(3, 2)
        assert_same(adapter.capture(plain, None, global_step=None), TorchAdapter().capture(plain, None, global_step=None))


def test_it_gives_the_same_layouts_again_and_keeps_no_tensor_alive() -> None:
    with fake_rank(1, 4):
        module, optimizer = made(make_mesh((2, 2), ("dp", "tp")))
        adapter = TorchAdapter()
        first, second = (adapter.capture(module, optimizer, global_step=None).tensors for _ in range(2))
        assert list(first) == list(second)
        assert all(one.layout is other.layout for one, other in zip(first.values(), second.values(), strict=True))
        gone = [weakref.ref(parameter) for parameter in module.parameters()]
        gone += [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
        del module, optimizer, first, second
        gc.collect()
        assert [reference() for reference in gone] == [None] * len(gone)
