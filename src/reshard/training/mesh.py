"""The ranks of a run as a mesh, and this rank's place in it."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reshard.config.sizes import ParallelSizes

# Pipeline stages outermost (they exchange least), tensor parallelism innermost (it exchanges most), as is usual.
AXES = ("pp", "dp_replicate", "dp_shard", "tp")

# The same ranks as experts see them: data-parallel ranks next to each other share the experts out (ep), those at the same place among
# them have the same ones, as copies or as shards (edp: expert data parallelism).
EXPERT_AXES = ("pp", "edp_replicate", "edp_shard", "ep", "tp")


@dataclass(frozen=True)
class Place:
    """This rank's place.

    Attributes:
        rank: the global rank.
        sizes: how the ranks are arranged.
        mesh: all ranks with the axes `AXES`; None for a run of one rank, which needs no process group.
        device: where this rank's tensors are.
        expert_mesh: all ranks with the axes `EXPERT_AXES`; None without expert parallelism.
    """

    rank: int
    sizes: ParallelSizes
    mesh: DeviceMesh | None
    device: torch.device
    expert_mesh: DeviceMesh | None = None

    def coordinate(self, axis: str) -> int:
        """This rank's index along an axis."""
        return 0 if self.mesh is None else self.mesh.get_local_rank(axis)

    @property
    def stage(self) -> int:
        """The pipeline stage."""
        return self.coordinate("pp")

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds the tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.stage == self.sizes.pipeline - 1

    @property
    def data_index(self) -> int:
        """Which part of every global batch this rank sees."""
        return self.coordinate("dp_replicate") * self.sizes.shard + self.coordinate("dp_shard")

    @property
    def tensor_index(self) -> int:
        """Which part of the layers' matrices this rank has."""
        return self.coordinate("tp")


def make_place(sizes: ParallelSizes) -> Place:
    """The mesh of a run and this rank's place in it. Collective."""
    device = local_device()
    if sizes.ranks == 1:
        return Place(0, sizes, None, device)
    shape = (sizes.pipeline, sizes.replicate, sizes.shard, sizes.tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=AXES)
    expert_mesh = None
    if sizes.expert > 1:
        shape = (sizes.pipeline, sizes.expert_replicate, sizes.expert_shard, sizes.expert, sizes.tensor)
        expert_mesh = init_device_mesh(device.type, shape, mesh_dim_names=EXPERT_AXES)
    return Place(dist.get_rank(), sizes, mesh, device, expert_mesh)


def local_device() -> torch.device:
    """The accelerator of this rank where there is one, else the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
