"""For your own tests: a simulated cluster, faulty storage, and a numpy oracle that says what each rank must hold."""

from reshard.testing.cluster import run_ranks, run_ranks_settled
from reshard.testing.faulty import FaultyStorage, SimulatedDeath
from reshard.testing.oracle import (
    differences,
    every_placement,
    mesh_of,
    part_by_array_split,
    slice_of,
    split,
    state_on_rank,
    tensor_on_rank,
)
from reshard.testing.power_loss import PowerLossStorage

__all__ = [
    "FaultyStorage",
    "PowerLossStorage",
    "SimulatedDeath",
    "differences",
    "every_placement",
    "mesh_of",
    "part_by_array_split",
    "run_ranks",
    "run_ranks_settled",
    "slice_of",
    "split",
    "state_on_rank",
    "tensor_on_rank",
]
