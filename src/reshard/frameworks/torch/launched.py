"""The ranks of a job that torchrun started, for work that is no training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def launched_ranks() -> Iterator[int]:
    """A process group of the processors, as the environment says (`RANK`, `WORLD_SIZE`); gives this process's rank. Collective."""
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()
