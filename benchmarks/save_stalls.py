"""What the ranks of the saving benchmark do for asynchronous saves: how long training waits, and what saves without end leave behind."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import states
from benchmarks.load_ranks import check, memory_of, spoil
from benchmarks.plain_write import PlainCopy
from benchmarks.save_cases import COPY, DCP_ASYNC, DEFERRED, IDLE, IDLE_COPIES, MEMCPY
from benchmarks.save_ranks import SaveSample
from benchmarks.states import FSDP, TENSOR_PARALLEL, Strategy, TensorSpec

# Of what a process holds, at least and, where it is more than before, at most; and the seconds between two of them.
_READINGS = 3
_MOST_READINGS = 600
_BETWEEN = 0.003

_SLOTS = (("exp_avg", "adam_m"), ("exp_avg_sq", "adam_v"))


@dataclass(frozen=True)
class Residue:
    """What a rank's process held after a save.

    Attributes:
        save: the number of the save.
        anonymous: bytes of resident memory that no file backs.
        files: open file descriptors.
        threads: threads.
    """

    save: int
    anonymous: int
    files: int
    threads: int


def _training(tensors: Sequence[TensorSpec], strategy: Strategy, rank: int) -> tuple[Any, Any, list[TensorSpec], list[np.ndarray]]:
    """A module and an AdamW that has stepped; and what both hold, the moments as tensors of names of their own."""
    import torch

    model, memory = states.build(tensors, strategy)
    for local in memory:
        local[...] = 0  # a step reads it
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    specs = list(tensors)
    parameters = dict(model.named_parameters())
    for slot, name in _SLOTS:
        for tensor in tensors:
            specs.append(replace(tensor, name=f"{name}.{tensor.name}"))
            memory.append(optimizer.state[parameters[tensor.name]][slot].to_local().numpy().view(np.uint32))
    states.fill(specs, strategy, memory, rank)
    return model, optimizer, specs, memory


def stall(directory: Path, contenders: Sequence[str], tensors: Sequence[TensorSpec]) -> list[SaveSample]:
    """Save as often as there are contenders in the list, in that order, nothing else being under way.

    After each save the memory is overwritten as soon as it may be; then the checkpoint is loaded and compared, not timed.

    Args:
        directory: where checkpoints lie.
        contenders: who saves, or copies.
        tensors: the weights; with AdamW's moments they are the state.

    Raises:
        ValueError: a checkpoint has a wrong byte.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import reshard

    rank = dist.get_rank()
    model, optimizer, specs, memory = _training(tensors, FSDP, rank)
    expected = states.digests(specs, FSDP, rank)
    memcpy = PlainCopy(memory)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    slowest = 0.0
    samples = []
    with ExitStack() as stack:
        managers = {
            name: stack.enter_context(reshard.CheckpointManager(directory / name, keep_checkpoint_max=None, async_save=mode))
            for name, mode in ((COPY, "copy"), (DEFERRED, "deferred"))
        }
        for number, contender in enumerate(contenders, 1):
            manager = managers.get(DEFERRED if contender == IDLE else contender)
            target = directory / f"{contender}-{number}"
            gc.collect()
            dist.barrier()
            under_way: Any = None
            used, begin = time.process_time(), time.perf_counter()
            if contender == MEMCPY:
                memcpy()
            elif contender == DCP_ASYNC:
                under_way = dcp.async_save(state, checkpoint_id=target)
            else:
                assert manager is not None
                manager.save(number, model=model, optimizer=optimizer)
            held = time.perf_counter() - begin
            if contender == IDLE:
                time.sleep(IDLE_COPIES * slowest)
            if contender in (DEFERRED, IDLE):
                # What torch's hook calls before a step of the optimizer.
                again = time.perf_counter()
                manager.before_update()
                held += time.perf_counter() - again
            end, cpu = time.perf_counter(), time.process_time() - used
            samples.append(SaveSample(contender, begin, end, held, cpu))
            if contender == MEMCPY:
                times: list[float] = [0.0] * dist.get_world_size()
                dist.all_gather_object(times, held)
                slowest = max(times)
                continue
            # Who is done leaves its core to those who still wait, as after a plain copy.
            dist.barrier()
            spoil(memory)
            if under_way is not None:
                under_way.result()
                dcp.load(state, checkpoint_id=target)
            else:
                manager.wait()
                manager.load(model=model, optimizer=optimizer)
                target = directory / (DEFERRED if contender == IDLE else contender) / f"iteration_{number:08d}"
            check(contender, specs, memory, expected, rank)
            dist.barrier()
            if rank == 0:
                shutil.rmtree(target)
            dist.barrier()
    return samples


def endless(directory: Path, saves: int, tensors: Sequence[TensorSpec]) -> list[Residue]:
    """Save asynchronously again and again, redundancy removed; what the process holds after each save. The last one is compared.

    Args:
        directory: where checkpoints lie.
        saves: how many.
        tensors: the weights; with AdamW's moments they are the state.

    Raises:
        ValueError: the last checkpoint has a wrong byte.
    """
    import torch.distributed as dist

    import reshard

    rank = dist.get_rank()
    model, optimizer, specs, memory = _training(tensors, TENSOR_PARALLEL, rank)
    expected = states.digests(specs, TENSOR_PARALLEL, rank)
    found = []
    modes: dict[str, Any] = {"async_save": "deferred", "remove_redundancy": True}
    with reshard.CheckpointManager(directory / "endless", keep_checkpoint_max=2, **modes) as manager:
        for number in range(1, saves + 1):
            manager.save(number, model=model, optimizer=optimizer)
            manager.wait()
            gc.collect()
            files = lasting("/proc/self/fd", found[-1].files if found else 0)
            threads = lasting("/proc/self/task", found[-1].threads if found else 0)
            found.append(Residue(number, memory_of("RssAnon"), files, threads))
        # A rank that loads connects to the store once more, which rank 0 may serve: everybody counts before anybody loads.
        dist.barrier()
        spoil(memory)
        manager.load(model=model, optimizer=optimizer)
        check("reshard", specs, memory, expected, rank)
    return found


def lasting(directory: str, before: int = 0) -> int:
    """How many entries a directory of the process has: the least of some readings. What is just ending (a thread that has done its work, a
    connection that somebody else closes) is no residue; what is left behind is in every reading.

    Args:
        directory: of `/proc/self`.
        before: how many there were after the last save: of more than that some may still be ending.
    """
    least, readings = len(os.listdir(directory)), 1
    while readings < _READINGS or (before and least > before and readings < _MOST_READINGS):
        time.sleep(_BETWEEN)
        least = min(least, len(os.listdir(directory)))
        readings += 1
    return least
