"""Read a plan: bytes go from files into the memory of shards."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors import BlockCheck, TensorEntry, check_bytes, count_whole
from reshard.geometry import Region
from reshard.loading.budget import MEMORY_BUDGET
from reshard.loading.scattered import PART_BYTES, Amount, RowCall, RowRun, Runs, cut_rows, cut_runs, scatter, scatter_rows
from reshard.loading.used_file import UsedFile
from reshard.loading.verified_reads import PIECE_BYTES, Part, Reading, check_after, parts_of, read_straight, rows_of
from reshard.loading.workers import count_readers, run_all
from reshard.planning.byte_runs import Block, bytes_of_pages, cut_box, is_one_run, row_places
from reshard.planning.read_plan import Batch, Movement, ReadPlan, Transfer
from reshard.sources.stored import Headers
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

# The shortest rows of a shard that are read each into its own place. For the kernel a place costs what the copy of about a KiB costs:
# shorter rows are read together and copied on.
ROW_BYTES = 2048


def locate(plan: ReadPlan, headers: Headers) -> list[list[TensorEntry]]:
    """Of each batch of a plan the entries of its tensors in the file's header, held against what metadata promises, before anything is
    written.

    Raises:
        DataFileError: a file is missing, damaged, or doesn't hold what metadata promises.
    """
    located: list[list[TensorEntry]] = []
    for movement, _, names in plan.batches:
        file, dtype, shape = movement.site.file, movement.dtype, movement.stored_shape
        held = headers.get(file).entries
        entries: list[TensorEntry] = []
        for name in names:
            entry = held.get(name)
            if entry is None or entry.shape != shape or (entry.dtype is not dtype and entry.dtype != dtype):
                raise headers.broken_promise(file, name, dtype, shape)
            entries.append(entry)
        located.append(entries)
    return located


def read_plan(
    plan: ReadPlan,
    entries: Sequence[Sequence[TensorEntry]],
    state: State,
    storage: Storage,
    directory: str,
    *,
    gap_bytes: int = GAP_BYTES,
    memory_budget: int = MEMORY_BUDGET,
    verify: bool = True,
) -> Amount:
    """Fill a state's memory as the plan says.

    What is verified is what is read anyway: the row blocks that lie whole in a run of the file. Runs that strided boxes consist of are not.

    Args:
        plan: what to read.
        entries: what `locate` found for it.
        state: the state whose description was planned.
        storage: where the files lie.
        directory: the checkpoint.
        gap_bytes: the widest gap between small runs that is read over.
        memory_budget: bytes for staging buffers and mapped windows together.
        verify: whether row blocks that are read whole are held against their digests.

    Returns:
        How much was read, and verified.

    Raises:
        DamagedCheckpointError: a file is not what it promises, or its bytes are not as they were saved.
        StorageError: reading failed.
    """
    located = zip(plan.batches, entries, strict=True)
    readers = count_readers()
    sizes = _Sizes.within(memory_budget, gap_bytes, readers)
    stages: SimpleQueue[np.ndarray] = SimpleQueue()
    for _ in range(readers):
        stages.put(np.empty(0, np.uint8))

    def works(files: ExitStack) -> Iterator[Callable[[], Amount]]:
        for file, group in groupby(located, key=lambda pair: pair[0].movement.site.file):
            source = files.enter_context(storage.open_read(join(directory, file)))
            used = UsedFile(source)
            for work in _FileReader(source, state, sizes, stages).plan(group, verify=verify):
                yield used.during(work)
            used.let_go()

    with ExitStack() as files:
        amounts = run_all(works(files), readers, "reshard-read")
    return Amount(*map(sum, zip(*amounts, strict=True))) if amounts else Amount(0, 0)


class _Run(NamedTuple):
    """A transfer's box as one run of bytes of a file; `entry` where any of it can be verified."""

    begin: int
    nbytes: int
    transfer: Transfer
    entry: TensorEntry | None


class _PlacedBlock(NamedTuple):
    """A part of a box that is copied at a time.

    Attributes:
        block: what it is in the file.
        place: where it belongs in the shard.
        needed: its bytes, without what lies between them in the file.
        is_run: whether it is one run there and in the shard.
    """

    block: Block
    place: Region
    needed: int
    is_run: bool


_FIRST_BYTE_OF: Callable[[TensorEntry], int] = attrgetter("begin")


def _begin_of(run: _Run | Part | RowRun) -> int:
    return run.begin


@dataclass(frozen=True)
class _Sizes:
    """How much is read at a time.

    Attributes:
        block: of a staging buffer.
        window: of a mapped window.
        gap: the widest gap that is read over.
    """

    block: int
    window: int
    gap: int

    @classmethod
    def within(cls, memory_budget: int, gap_bytes: int, readers: int) -> _Sizes:
        """Sizes with which all readers together stay within a budget: each has one buffer and one window, and the last window may still be
        there.
        """
        each = memory_budget // (4 * readers)
        return cls(min(BLOCK_BYTES, each), min(WINDOW_BYTES, each), gap_bytes)


class _FileReader:
    """The reads of one file."""

    def __init__(self, source: ReadableFile, state: State, sizes: _Sizes, stages: SimpleQueue[np.ndarray]) -> None:
        self._source = source
        self._sizes = sizes
        self._tensors = state.tensors
        self._stages = stages

    def plan(self, located: Iterable[tuple[Batch, Sequence[TensorEntry]]], *, verify: bool) -> Iterator[Callable[[], Amount]]:
        """Independent pieces of work, each giving what it read."""
        # Runs that are runs in memory, too, and what they are verified by.
        runs = [Runs.of([], [], [])]
        checks: list[TensorEntry | None] = []
        # Long ones of these that are verified.
        parts: list[Part] = []
        # Runs that are rows there.
        in_rows: list[RowRun] = []
        # Small ones, or such as the host can't address.
        staged: list[_Run] = []
        # All others, by where the tensor begins.
        apart: list[tuple[int, Iterator[Callable[[], Amount]]]] = []
        for batch, entries in located:
            movement, nbytes = batch.movement, batch.movement.nbytes
            if not movement.is_run:
                blocks = self._blocks(movement)
                apart += [
                    (entry.begin, self._strided(one, entry.begin, blocks)) for one, entry in zip(batch.transfers(), entries, strict=True)
                ]
                continue
            begins = np.fromiter(map(_FIRST_BYTE_OF, entries), np.int64, len(entries)) + movement.offset
            addresses = self._addresses(batch)
            # A file has digests of all its tensors, or of none.
            is_checked = verify and count_whole(entries[0], movement.offset, nbytes) > 0
            if None not in addresses and not (is_checked and nbytes > PIECE_BYTES):
                runs.append(Runs(begins, np.full(len(begins), nbytes), np.array(addresses, np.int64)))
                checks += entries if is_checked else [None] * len(entries)
                continue
            rows = None if is_checked or movement.target_offset is not None else _rows(movement)
            for transfer, entry, begin, address in zip(batch.transfers(), entries, begins.tolist(), addresses, strict=True):
                check = entry if is_checked else None
                if address is not None and check is not None and nbytes > PIECE_BYTES:
                    parts += parts_of(Part(begin, nbytes, address, entry))
                elif address is not None:
                    runs.append(Runs.of([begin], [nbytes], [address]))
                    checks.append(check)
                elif rows is not None and (shard := self._memory(transfer).address) is not None:
                    in_rows.append(RowRun(begin, shard, rows))
                elif nbytes <= self._sizes.block // 2:
                    staged.append(_Run(begin, nbytes, transfer, check))
                elif check is not None:
                    apart.append((entry.begin, self._verified(transfer, entry)))
                else:
                    apart.append((entry.begin, self._strided(transfer, entry.begin, self._blocks(movement))))
        for _, works in sorted(apart, key=itemgetter(0)):
            yield from works
        yield from scatter_rows(self._source, sorted(in_rows, key=_begin_of))
        yield from self._batched(sorted(staged, key=_begin_of))
        yield from self._direct(sorted(parts, key=_begin_of))
        ordered, which = cut_runs(runs)
        if any(check is not None for check in checks):
            verifying = [checks[index] for index in which.tolist()]
            listed = list(zip(*(array.tolist() for array in ordered), verifying, strict=True))
            scattered = scatter(self._source, ordered, PIECE_BYTES, self._sizes.gap)
            readings = (Reading(work, listed[first:end]) for first, end, work in scattered)
            yield from check_after(readings, self._source.path)
        else:
            yield from (one.work for one in scatter(self._source, ordered, PART_BYTES, self._sizes.gap))

    def _addresses(self, batch: Batch) -> list[int | None]:
        """Where in memory the box of each tensor of a batch begins, if it is one run there."""
        offset, shard = batch.movement.target_offset, batch.movement.shard
        if offset is None:
            return [None] * len(batch.keys)
        tensors = self._tensors
        begins = [tensors[key].shards[shard].memory.address for key in batch.keys]
        return [None if begin is None else begin + offset for begin in begins] if offset else begins

    def _direct(self, parts: Sequence[Part]) -> Iterator[Callable[[], Amount]]:
        """Long runs go straight to their places; in one piece of work as much as one part may have."""
        first = nbytes = 0
        for index, part in enumerate(parts):
            if first < index and nbytes + part.nbytes > PART_BYTES:
                yield read_straight(self._source, parts[first:index])
                first, nbytes = index, 0
            nbytes += part.nbytes
        if parts:
            yield read_straight(self._source, parts[first:])

    def _batched(self, runs: Sequence[_Run]) -> Iterator[Callable[[], Amount]]:
        """Runs that lie close to each other in the file are read together, and each is copied on."""
        batch: list[_Run] = []
        begin = end = 0
        for run in runs:
            if batch and (run.begin - end > self._sizes.gap or run.begin + run.nbytes - begin > self._sizes.block):
                yield self._copying(batch, begin, end)
                batch = []
            if not batch:
                begin = end = run.begin
            batch.append(run)
            end = max(end, run.begin + run.nbytes)
        if batch:
            yield self._copying(batch, begin, end)

    def _copying(self, batch: list[_Run], begin: int, end: int) -> Callable[[], Amount]:
        def work() -> Amount:
            verified = 0
            stage = self._take_stage(end - begin)
            try:
                self._source.read_into(begin, memoryview(stage)[: end - begin])
                for at, nbytes, transfer, entry in batch:
                    movement = transfer.movement
                    data = stage[at - begin : at - begin + nbytes]
                    if entry is not None:
                        verified += check_bytes(entry, memoryview(data), self._source.path, at - entry.begin)
                    # The staged bytes may not be aligned for the element type: numpy copes.
                    values = data.view(movement.dtype.numpy).reshape(movement.target.shape)
                    self._memory(transfer).write(movement.target, values)
            finally:
                self._stages.put(stage)
            return Amount(end - begin, verified)

        return work

    def _verified(self, transfer: Transfer, entry: TensorEntry) -> Iterator[Callable[[], Amount]]:
        """Rows of a stored tensor that are no run in memory, in parts that begin and end at row blocks."""
        movement = transfer.movement
        block_bytes = row_blocks_of(movement.stored_shape, movement.dtype.itemsize).nbytes
        for box in rows_of(movement.source, movement.strides, movement.begin, block_bytes):

            def work(box: Region = box) -> Amount:
                memory, check = self._memory(transfer), BlockCheck(entry, self._source.path)
                itemsize = movement.dtype.itemsize
                for block in cut_box(box, movement.strides, itemsize, block_bytes=self._sizes.block, gap_bytes=0):
                    offset = movement.begin + block.offset
                    stage = self._take_stage(block.nbytes)
                    try:
                        data = stage[: block.nbytes]
                        self._source.read_into(entry.begin + offset, memoryview(data))
                        check.update(offset, memoryview(data))
                        check.raise_if_wrong()
                        memory.write(movement.place_of(block.region), data.view(movement.dtype.numpy).reshape(block.region.shape))
                    finally:
                        self._stages.put(stage)
                return Amount(box.size * itemsize, check.verified)

            yield work

    def _memory(self, transfer: Transfer) -> Memory:
        return self._tensors[transfer.key].shards[transfer.movement.shard].memory

    def _blocks(self, movement: Movement) -> Sequence[_PlacedBlock]:
        """A box of a stored tensor in parts that are copied at a time, and where each belongs: the same for all tensors that move alike."""
        longest = self._sizes.block if movement.is_run else self._sizes.window
        itemsize = movement.dtype.itemsize
        cut = cut_box(movement.source, movement.strides, itemsize, block_bytes=longest, gap_bytes=GAP_BYTES)
        blocks: list[_PlacedBlock] = []
        for block in cut:
            place, needed = movement.place_of(block.region), block.region.size * itemsize
            blocks.append(_PlacedBlock(block, place, needed, needed == block.nbytes and is_one_run(place.shape, movement.shard_shape)))
        return blocks

    def _strided(self, transfer: Transfer, begin: int, blocks: Sequence[_PlacedBlock]) -> Iterator[Callable[[], Amount]]:
        movement = transfer.movement
        itemsize = movement.dtype.itemsize
        strides = movement.strides
        begin += movement.begin
        memory = self._memory(transfer)
        for one in blocks:

            def work(one: _PlacedBlock = one) -> Amount:
                block, place, needed, is_run = one
                region, offset, nbytes = block.region, block.offset, block.nbytes
                if is_run and (target := _contiguous_box(memory, place)) is not None:
                    self._source.read_into(begin + offset, target)
                    return Amount(nbytes, 0)
                window = None if needed == nbytes else self._source.map(begin + offset, nbytes)
                if window is not None:
                    # Not by `as_strided`, which knows no float8.
                    box = np.ndarray(region.shape, movement.dtype.numpy, window, strides=strides)
                    memory.write(place, box)
                    return Amount(needed, 0, bytes_of_pages(begin + offset, region.shape, strides, itemsize, mmap.PAGESIZE))
                stage = self._take_stage(nbytes)
                try:
                    self._source.read_into(begin + offset, memoryview(stage)[:nbytes])
                    box = np.ndarray(region.shape, movement.dtype.numpy, stage.data, strides=strides)
                    memory.write(place, box)
                finally:
                    self._stages.put(stage)
                return Amount(nbytes, 0)

            yield work

    def _take_stage(self, nbytes: int) -> np.ndarray:
        stage = self._stages.get()
        return stage if stage.nbytes >= nbytes else np.empty(max(nbytes, self._sizes.block), np.uint8)


def _rows(movement: Movement) -> Sequence[RowCall] | None:
    """A run of the file as the rows of a box of a shard; None when they are short."""
    nbytes, places = row_places(movement.target, movement.shard_shape, movement.dtype.itemsize)
    return None if nbytes < ROW_BYTES else cut_rows(nbytes, places, PART_BYTES)


def _contiguous_box(memory: Memory, box: Region) -> memoryview | None:
    """The bytes of a box of a shard's memory, where they are contiguous and the host's."""
    host = memory.host
    if host is None:
        return None
    view = host[box.slices] if host.ndim else host
    return memoryview(view.reshape(-1).view(np.uint8)) if view.flags.c_contiguous else None
