"""What the ranks of the loading benchmark do: save a state with both libraries, load it by turns, check every byte."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmarks import states
from benchmarks.plain_copy import BufferedCopy, MappedCopy, ReadCopy, pieces_of
from benchmarks.states import Strategy, TensorSpec

DCP, RESHARD, VERIFIED = "dcp", "reshard", "reshard_verified"
"""The libraries. What a plain copy and DCP don't do is told apart: the judged loads of reshard verify nothing, those of `VERIFIED` do."""

COPIES = {"copy_read": ReadCopy, "copy_mapped": MappedCopy, "copy_buffered": BufferedCopy}
"""The plain copies by name: straight into the destination, out of the mapped file, through a small buffer."""

# What memory holds before a load, in every word.
_SPOILED = 0xA5A5A5A5


@dataclass(frozen=True)
class Sample:
    """One load, as one rank saw it.

    Attributes:
        contender: who loaded.
        begin: when, on a clock that all ranks share, in seconds.
        end: likewise.
        peak: bytes of resident memory (anonymous, and mapped files) at the highest above what was there before; None where the system
            doesn't tell.
        report: what reshard's restore report says: bytes needed and read, over all ranks, and seconds by phase.
    """

    contender: str
    begin: float
    end: float
    peak: int | None
    report: Mapping[str, Any] = field(default_factory=dict)


def save(directory: Path, contender: str, tensors: Sequence[TensorSpec], strategy: Strategy) -> float:
    """Save a state with one of the libraries; the seconds that it took."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    import reshard

    model, memory = states.build(tensors, strategy)
    states.fill(tensors, strategy, memory, dist.get_rank())
    dist.barrier()
    begin = time.perf_counter()
    if contender == RESHARD:
        reshard.save(directory / RESHARD, 1, model=model)
    else:
        dcp.save(model.state_dict(), checkpoint_id=directory / DCP)
    return time.perf_counter() - begin


def digests(tensors: Sequence[TensorSpec], strategy: Strategy) -> list[bytes]:
    """What this rank's shards must hash to."""
    import torch.distributed as dist

    return states.digests(tensors, strategy, dist.get_rank())


def load(
    directory: Path, contenders: Sequence[str], tensors: Sequence[TensorSpec], strategy: Strategy, expected: Sequence[Sequence[bytes]]
) -> list[Sample]:
    """Load as often as there are contenders in the list, in that order, all into the same module.

    Args:
        directory: where `save` saved.
        contenders: who loads.
        tensors: the state.
        strategy: the one to load under.
        expected: for each rank the digests of its shards.

    Raises:
        ValueError: a byte is wrong.
    """
    import torch.distributed as dist

    import reshard

    rank = dist.get_rank()
    model, memory = states.build(tensors, strategy)
    spoil(memory)
    # As in a training loop, which holds one; like the process group that DCP uses it is there before anything is loaded.
    manager = reshard.CheckpointManager(directory / RESHARD, read_only=True)
    loads = _loads(directory, frozenset(contenders), manager, model, tensors, strategy, memory, rank)
    samples = []
    gc.collect()
    for contender in contenders:
        spoil(memory)
        dist.barrier()
        before = _reset_peak()
        begin = time.perf_counter()
        report = loads[contender]()
        end = time.perf_counter()
        peak = None if before is None else memory_of("VmHWM") - before
        # Also keeps a rank that is done from taking a core from those that are not.
        dist.barrier()
        check(contender, tensors, memory, expected[rank], rank)
        samples.append(Sample(contender, begin, end, peak, _facts(report)))
        if contender not in COPIES:
            # What a library leaves behind is not for the next one to clear away.
            del report
            gc.collect()
    manager.close()
    return samples


def _loads(
    directory: Path,
    contenders: frozenset[str],
    manager: Any,
    model: Any,
    tensors: Sequence[TensorSpec],
    strategy: Strategy,
    memory: Sequence[np.ndarray],
    rank: int,
) -> dict[str, Callable[[], Any]]:
    """A function for each contender that loads everything anew. Imports, and the list of what to copy, come before."""
    import torch.distributed.checkpoint as dcp

    loads: dict[str, Callable[[], Any]] = {
        DCP: lambda: dcp.load(model.state_dict(), checkpoint_id=directory / DCP),
        RESHARD: lambda: manager.load(model=model, verify=False),
        VERIFIED: lambda: manager.load(model=model),
    }
    if contenders & set(COPIES):
        pieces = pieces_of(directory / RESHARD, tensors, strategy, memory, rank)
        loads |= {name: copy(pieces) for name, copy in COPIES.items() if name in contenders}
    return loads


def spoil(memory: Sequence[np.ndarray]) -> None:
    """Overwrite every word, so that a load that leaves one out is found."""
    for local in memory:
        local[...] = _SPOILED


def check(contender: str, tensors: Sequence[TensorSpec], memory: Sequence[np.ndarray], expected: Sequence[bytes], rank: int) -> None:
    """See that every byte of this rank's shards is what it must be.

    Raises:
        ValueError: one isn't.
    """
    for tensor, local, digest in zip(tensors, memory, expected, strict=True):
        if xxhash.xxh3_128_digest(local.data) != digest:
            raise ValueError(f"{contender} loaded wrong bytes into {tensor.name} on rank {rank}")


def _facts(report: Any) -> dict[str, Any]:
    if report is None:
        return {}
    return {
        "bytes_needed": report.bytes_needed,
        "bytes_read": report.bytes_read,
        "bytes_verified": report.bytes_verified,
        "bytes_of_pages": report.bytes_of_pages,
        "phases": [dict(rank.seconds) for rank in report.ranks],
    }


def memory_of(field_name: str) -> int:
    """A field of this process's status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field_name + ":"):
                return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field_name}")


def _reset_peak() -> int | None:
    """Let the peak of resident memory begin anew; what is resident now, or None where the system can't."""
    if not os.path.exists("/proc/self/clear_refs"):
        return None
    with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
        control.write("5")
    return memory_of("VmRSS")
