"""Read a plan: bytes go from files into the memory of shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from reshard.format.safetensors import TensorEntry
from reshard.geometry import Region
from reshard.planning.byte_runs import plan_blocks, strides_of
from reshard.planning.read_plan import ReadPlan, Transfer
from reshard.sources.native import Headers
from reshard.state import Memory, State
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

# What a staged read takes at a time. Small enough that what was read is still in a core's own cache when it is copied on, large enough
# that a call costs little.
BLOCK_BYTES = 1 << 20

# What a strided box is copied out of at a time: a mapped window of which only the box is touched. Large enough that mapping costs little,
# small enough that the check of the file's size right before it holds for the whole copy.
WINDOW_BYTES = 4 << 20

# Reading over a gap of this size costs what another call costs: some 10 µs, in which a page cache or a fast disk gives 64 KiB.
GAP_BYTES = 64 << 10

# A contiguous run from this size on is read straight into its destination; below, a call per run costs more than staging many of them
# in one and copying them on.
DIRECT_BYTES = 128 << 10

# A direct read is cut in parts of this size, so that several are in flight.
PART_BYTES = 16 << 20

# Reads in flight per rank. A local disk or a parallel file system wants several; more than the cores that copy is no use on any.
READERS = min(4, os.cpu_count() or 1)


class _Run(NamedTuple):
    """A transfer's box as one run of bytes of a file."""

    begin: int
    nbytes: int
    transfer: Transfer


def locate(plan: ReadPlan, headers: Headers) -> list[TensorEntry]:
    """The entry of every transfer of a plan in its file's header, held against what metadata promises, before anything is written.

    Raises:
        DataFileError: a file is missing, damaged, or doesn't hold what metadata promises.
    """
    entries: list[TensorEntry] = []
    for file, transfers in groupby(plan.transfers, key=lambda transfer: transfer.movement.site.file):
        held = headers.get(file).entries
        for transfer in transfers:
            entry = held.get(transfer.name)
            movement = transfer.movement
            if entry is None or entry.shape != movement.chunk_shape or entry.dtype != movement.dtype:
                raise headers.broken_promise(file, transfer.name, movement.dtype, movement.chunk_shape)
            entries.append(entry)
    return entries


def read_plan(
    plan: ReadPlan, entries: list[TensorEntry], state: State, storage: Storage, directory: str, *, gap_bytes: int = GAP_BYTES
) -> int:
    """Fill a state's memory as the plan says.

    Args:
        plan: what to read.
        entries: what `locate` found for it.
        state: the state whose description was planned.
        storage: where the files lie.
        directory: the checkpoint.
        gap_bytes: the widest gap between small runs that is read over.

    Returns:
        The bytes that were read, gaps included.

    Raises:
        DamagedCheckpointError: a file is not what it promises.
        StorageError: reading failed.
    """
    total = 0
    located = zip(plan.transfers, entries, strict=True)
    with ThreadPoolExecutor(READERS, "reshard-read") as pool:
        for file, group in groupby(located, key=lambda pair: pair[0].movement.site.file):
            with storage.open_read(join(directory, file)) as source:
                reader = _FileReader(source, state, gap_bytes)
                pending: list[Future[int]] = []
                try:
                    pending.extend(pool.submit(work) for work in reader.plan(list(group)))
                finally:
                    # The file stays open until nobody reads it.
                    for future in pending:
                        future.exception()
                total += sum(future.result() for future in pending)
    return total


class _FileReader:
    """The reads of one file."""

    def __init__(self, source: ReadableFile, state: State, gap_bytes: int) -> None:
        self._source = source
        self._gap_bytes = gap_bytes
        self._tensors = state.tensors
        self._stages: SimpleQueue[np.ndarray] = SimpleQueue()
        for _ in range(READERS):
            self._stages.put(np.empty(0, np.uint8))

    def plan(self, located: list[tuple[Transfer, TensorEntry]]) -> Iterator[Callable[[], int]]:
        """Independent pieces of work, each giving the bytes that it read."""
        small: list[_Run] = []
        for transfer, entry in located:
            movement = transfer.movement
            if not movement.is_run:
                yield from self._strided(transfer, entry.begin)
            elif movement.nbytes < DIRECT_BYTES:
                small.append(_Run(entry.begin + movement.offset, movement.nbytes, transfer))
            else:
                yield from self._direct(_Run(entry.begin + movement.offset, movement.nbytes, transfer))
        small.sort()
        yield from self._batches(small)

    def _memory(self, transfer: Transfer) -> Memory:
        return self._tensors[transfer.key].shards[transfer.movement.shard].memory

    def _direct(self, run: _Run) -> Iterator[Callable[[], int]]:
        target = _contiguous_box(self._memory(run.transfer), run.transfer.movement.target)
        if target is None:
            yield from self._strided(run.transfer, run.begin - run.transfer.movement.offset)
            return
        for first in range(0, run.nbytes, PART_BYTES):
            yield _reading(self._source, run.begin + first, target[first : first + PART_BYTES])

    def _batches(self, runs: list[_Run]) -> Iterator[Callable[[], int]]:
        """Runs that lie close to each other are read together."""
        batch: list[_Run] = []
        begin = end = 0
        for run in runs:
            if batch and (run.begin - end > self._gap_bytes or run.begin + run.nbytes - begin > BLOCK_BYTES):
                yield self._scattering(batch, begin, end)
                batch = []
            if not batch:
                begin = end = run.begin
            batch.append(run)
            end = max(end, run.begin + run.nbytes)
        if batch:
            yield self._scattering(batch, begin, end)

    def _scattering(self, batch: list[_Run], begin: int, end: int) -> Callable[[], int]:
        def work() -> int:
            stage = self._take_stage(end - begin)
            try:
                self._source.read_into(begin, memoryview(stage)[: end - begin])
                tensors = self._tensors
                for at, nbytes, (key, _, movement) in batch:
                    memory = tensors[key].shards[movement.shard].memory
                    data = stage[at - begin : at - begin + nbytes]
                    host = memory.host
                    if host is not None and movement.target.shape == host.shape and host.flags.c_contiguous:
                        host.reshape(-1).view(np.uint8)[:] = data
                    else:
                        # The staged bytes may not be aligned for the element type: numpy copes.
                        memory.write(movement.target, data.view(movement.dtype.numpy).reshape(movement.target.shape))
            finally:
                self._stages.put(stage)
            return end - begin

        return work

    def _strided(self, transfer: Transfer, begin: int) -> Iterator[Callable[[], int]]:
        movement = transfer.movement
        itemsize = movement.dtype.itemsize
        strides = strides_of(movement.chunk_shape, itemsize)
        memory = self._memory(transfer)
        for block in plan_blocks(movement.chunk_shape, movement.source, itemsize, block_bytes=WINDOW_BYTES, gap_bytes=GAP_BYTES):

            def work(region: Region = block.region, offset: int = block.offset, nbytes: int = block.nbytes) -> int:
                needed = region.size * itemsize
                if needed == nbytes and (target := _contiguous_box(memory, _target_of(region, transfer))) is not None:
                    self._source.read_into(begin + offset, target)
                    return nbytes
                window = None if needed == nbytes else self._source.map(begin + offset, nbytes)
                if window is not None:
                    # Not by `as_strided`, which knows no float8.
                    box = np.ndarray(region.shape, movement.dtype.numpy, window, strides=strides)
                    memory.write(_target_of(region, transfer), box)
                    return needed
                stage = self._take_stage(nbytes)
                try:
                    self._source.read_into(begin + offset, memoryview(stage)[:nbytes])
                    box = np.ndarray(region.shape, movement.dtype.numpy, stage.data, strides=strides)
                    memory.write(_target_of(region, transfer), box)
                finally:
                    self._stages.put(stage)
                return nbytes

            yield work

    def _take_stage(self, nbytes: int) -> np.ndarray:
        stage = self._stages.get()
        return stage if stage.nbytes >= nbytes else np.empty(max(nbytes, BLOCK_BYTES), np.uint8)


def _reading(source: ReadableFile, begin: int, target: memoryview) -> Callable[[], int]:
    def work() -> int:
        source.read_into(begin, target)
        return target.nbytes

    return work


def _contiguous_box(memory: Memory, box: Region) -> memoryview | None:
    """The bytes of a box of a shard's memory, where they are contiguous and the host's."""
    host = memory.host
    if host is None:
        return None
    view = host[box.slices] if host.ndim else host
    return memoryview(view.reshape(-1).view(np.uint8)) if view.flags.c_contiguous else None


def _target_of(block: Region, transfer: Transfer) -> Region:
    """Where a box of the chunk belongs, in the shard's own coordinates."""
    movement = transfer.movement
    offset = tuple(b - s + t for b, s, t in zip(block.offset, movement.source.offset, movement.target.offset, strict=True))
    return Region(offset, block.shape)
