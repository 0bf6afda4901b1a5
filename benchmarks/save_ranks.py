"""What the ranks of the saving benchmark do: whole saves by turns, and a check of what each one wrote."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import states
from benchmarks.load_ranks import check, spoil
from benchmarks.plain_write import PlainWrite, files_of
from benchmarks.save_cases import DCP, RESHARD, WRITE
from benchmarks.states import FSDP, TensorSpec

# An iteration that is written before anything is measured: what the plain write takes for its example.
_EXAMPLE = 1


@dataclass(frozen=True)
class SaveSample:
    """One save, as one rank saw it.

    Attributes:
        contender: who saved.
        begin: when, on a clock that all ranks share, in seconds.
        end: likewise.
        held: the seconds for which this rank could not go on.
        cpu: the seconds of a core that the rank's process took, all threads.
    """

    contender: str
    begin: float
    end: float
    held: float
    cpu: float


def save(directory: Path, contenders: Sequence[str], tensors: Sequence[TensorSpec], is_fresh: bool) -> list[SaveSample]:
    """Save as often as there are contenders in the list, in that order, each time to a new checkpoint that is removed afterwards.

    Every checkpoint of ours is loaded and compared, and the first one of DCP; what is removed, loaded or compared is not timed.

    Args:
        directory: where checkpoints lie.
        contenders: who saves.
        tensors: the state; sharded over all ranks.
        is_fresh: whether each save of ours is the first one of its manager.

    Raises:
        ValueError: a checkpoint has a wrong byte.
    """
    import torch.distributed as dist

    import reshard

    rank = dist.get_rank()
    model, memory = states.build(tensors, FSDP)
    states.fill(tensors, FSDP, memory, rank)
    expected = states.digests(tensors, FSDP, rank)

    def manager_of(name: str) -> Any:
        return reshard.CheckpointManager(directory / name, keep_checkpoint_max=None)

    # As in a training loop, which holds one; the group that DCP uses is there before anything is saved, too.
    manager = manager_of(RESHARD)
    write: PlainWrite | None = None
    samples: list[SaveSample] = []
    unchecked = {DCP}
    for number, contender in enumerate(contenders, _EXAMPLE + 1):
        if contender == WRITE and write is None:
            with manager_of("example") as example:
                report = example.save(_EXAMPLE, model=model)
            write = PlainWrite(files_of(Path(report.directory), memory, rank), rank == 0)
            dist.barrier()
            _remove(directory / "example", rank)
        if contender == RESHARD and is_fresh:
            manager.close()
            manager = manager_of(RESHARD)
        target = directory / (RESHARD if contender == RESHARD else f"{contender}-{number}")
        samples.append(_timed(contender, partial(_save, contender, manager, model, number, target, write)))
        if contender == RESHARD:
            spoil(memory)
            manager.load(model=model)
            check(contender, tensors, memory, expected, rank)
            target /= f"iteration_{number:08d}"
        elif contender in unchecked:
            unchecked.remove(contender)
            spoil(memory)
            _load_dcp(model, target)
            check(contender, tensors, memory, expected, rank)
        dist.barrier()
        _remove(target, rank)
    manager.close()
    return samples


def _save(contender: str, manager: Any, model: Any, number: int, target: Path, write: Callable[[Path], None] | None) -> None:
    import torch.distributed.checkpoint as dcp

    if contender == RESHARD:
        manager.save(number, model=model)
    elif contender == DCP:
        dcp.save(model.state_dict(), checkpoint_id=target)
    else:
        assert write is not None
        write(target)


def _load_dcp(model: Any, target: Path) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.load(model.state_dict(), checkpoint_id=target)


def _timed(contender: str, call: Callable[[], None]) -> SaveSample:
    import torch.distributed as dist

    # What others left behind is not for this one to clear away.
    gc.collect()
    dist.barrier()
    used, begin = time.process_time(), time.perf_counter()
    call()
    end = time.perf_counter()
    cpu = time.process_time() - used
    # Also keeps a rank that is done from taking a core from those that are not.
    dist.barrier()
    return SaveSample(contender, begin, end, end - begin, cpu)


def _remove(directory: Path, rank: int) -> None:
    import torch.distributed as dist

    if rank == 0:
        shutil.rmtree(directory)
    dist.barrier()
