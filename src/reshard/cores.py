"""The cores that a rank has, of a machine that it may share with other ranks."""

from __future__ import annotations

import os

# How launchers tell each process how many they have started on its machine: torchrun and `reshard train`, Open MPI, Intel MPI.
_LOCAL_RANKS = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def cores_per_rank() -> float:
    """Cores of this machine for each rank on it: less than 1 where ranks share them.

    Where no launcher says that there are other ranks, this one has all that its process may run on.
    """
    all_cores = os.cpu_count() or 1
    # A launcher may have bound each rank to cores of its own: then they needn't be divided. A container with few of a machine's cores that
    # its ranks share looks the same; of that this says too much.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else all_cores
    return min(float(allowed), all_cores / _local_ranks())


def _local_ranks() -> int:
    for name in _LOCAL_RANKS:
        told = os.environ.get(name, "")
        if told.isdecimal() and int(told) > 0:
            return int(told)
    return 1
