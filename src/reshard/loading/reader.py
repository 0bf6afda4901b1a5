"""Read a plan: bytes go from files into the memory of shards."""

from __future__ import annotations

from itertools import groupby

import numpy as np

from reshard.geometry import Region
from reshard.planning.byte_runs import plan_blocks, strides_of
from reshard.planning.read_plan import ReadPlan, Transfer
from reshard.sources.native import Headers
from reshard.state import Memory, State
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

# What a strided read stages at a time. Some MiB amortise the call, and stay inside a core's share of the last-level cache.
BLOCK_BYTES = 4 << 20

# Reading over a gap of this size costs what another call costs: some 10 µs, in which a page cache or a fast disk gives 64 KiB.
GAP_BYTES = 64 << 10


def check_plan(plan: ReadPlan, headers: Headers) -> None:
    """Hold every place that a plan reads against its file's header, before anything is written to memory.

    Raises:
        DataFileError: a file is missing, damaged, or doesn't hold what metadata promises.
    """
    for transfer in plan.transfers:
        headers.entry(transfer.place, transfer.dtype, transfer.chunk_shape)


def read_plan(plan: ReadPlan, state: State, headers: Headers, storage: Storage, directory: str) -> int:
    """Fill a state's memory as the plan says.

    Args:
        plan: what to read.
        state: the state whose description was planned.
        headers: the headers of the checkpoint's files.
        storage: where they lie.
        directory: the checkpoint.

    Returns:
        The bytes that were read.

    Raises:
        DamagedCheckpointError: a file is not what it promises.
        StorageError: reading failed.
    """
    staging = np.empty(0, np.uint8)
    total = 0
    for file, transfers in groupby(plan.transfers, key=lambda transfer: transfer.place.file):
        with storage.open_read(join(directory, file)) as source:
            for transfer in transfers:
                begin = headers.entry(transfer.place, transfer.dtype, transfer.chunk_shape).begin
                memory = state.tensors[transfer.key].shards[transfer.shard].memory
                direct = _contiguous_target(transfer, memory)
                if direct is not None and _is_one_run(transfer):
                    offset = sum(
                        o * s
                        for o, s in zip(transfer.source.offset, strides_of(transfer.chunk_shape, transfer.dtype.itemsize), strict=True)
                    )
                    source.read_into(begin + offset, direct)
                    total += direct.nbytes
                    continue
                if staging.nbytes < BLOCK_BYTES:
                    staging = np.empty(BLOCK_BYTES, np.uint8)
                total += _read_staged(transfer, memory, source, begin, staging)
    return total


def _is_one_run(transfer: Transfer) -> bool:
    """Whether the box is contiguous in the file: whole from some dimension on, and a single index before that dimension's range."""
    inner_is_whole = True
    for extent, whole in zip(reversed(transfer.source.shape), reversed(transfer.chunk_shape), strict=True):
        if not inner_is_whole and extent != 1:
            return False
        inner_is_whole = inner_is_whole and extent == whole
    return True


def _bytes_of(view: np.ndarray) -> memoryview:
    return memoryview(view.reshape(-1).view(np.uint8))


def _contiguous_target(transfer: Transfer, memory: Memory) -> memoryview | None:
    host = memory.host
    if host is None:
        return None
    view = host[transfer.target.slices] if host.ndim else host
    return _bytes_of(view) if view.flags.c_contiguous else None


def _read_staged(transfer: Transfer, memory: Memory, source: ReadableFile, begin: int, staging: np.ndarray) -> int:
    dtype = transfer.dtype.numpy
    strides = strides_of(transfer.chunk_shape, dtype.itemsize)
    total = 0
    for block in plan_blocks(transfer.chunk_shape, transfer.source, dtype.itemsize, block_bytes=staging.nbytes, gap_bytes=GAP_BYTES):
        run = staging[: block.nbytes]
        source.read_into(begin + block.offset, memoryview(run))
        total += block.nbytes
        first = run[: dtype.itemsize].view(dtype)
        box = np.lib.stride_tricks.as_strided(first, block.region.shape, strides, writeable=False)
        memory.write(_target_of(block.region, transfer), box)
    return total


def _target_of(block: Region, transfer: Transfer) -> Region:
    """Where a box of the chunk belongs, in the shard's own coordinates."""
    offset = tuple(b - s + t for b, s, t in zip(block.offset, transfer.source.offset, transfer.target.offset, strict=True))
    return Region(offset, block.shape)
