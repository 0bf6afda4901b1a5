"""Ranks of torch.distributed in one process: its fake backend, whose collectives do nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from reshard.state import ShardedTensor


@contextmanager
def fake_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a job of this size, for as long as the context lasts."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def make_mesh(shape: Sequence[int], names: Sequence[str] | None) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=None if names is None else tuple(names))


def numbered(shape: Sequence[int], start: int = 0) -> torch.Tensor:
    """A tensor whose elements all differ."""
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).reshape(tuple(shape))


def distribute(tensor: torch.Tensor, mesh: DeviceMesh, placements: Sequence) -> DTensor:
    """This rank's part of a tensor that it has whole; nothing is sent."""
    return distribute_tensor(tensor, mesh, list(placements), src_data_rank=None)


class Coverage:
    """What the ranks hold of a tensor, held against the whole."""

    def __init__(self, whole: np.ndarray) -> None:
        self.whole = whole
        self.holders = np.zeros(whole.shape, int)

    def add(self, tensor: ShardedTensor) -> None:
        """Check what one rank holds: every shard has the whole's values in its region."""
        assert tensor.global_shape == self.whole.shape
        own = np.zeros(self.whole.shape, int)
        for shard in tensor.shards:
            np.testing.assert_array_equal(shard.memory.read(), self.whole[shard.region.slices])
            own[shard.region.slices] += 1
        assert own.max(initial=0) <= 1, "a rank's shards overlap"
        self.holders += own

    def check(self) -> None:
        """Check that the ranks hold everything together."""
        assert (self.holders > 0).all()
