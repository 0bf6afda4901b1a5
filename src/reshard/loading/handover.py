"""What a rank has read for the ranks of its machine goes from a buffer into their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from reshard.comm.neighbours import MOST_PIECES, Pieces
from reshard.format.safetensors import BlockCheck, TensorEntry
from reshard.geometry import Region
from reshard.geometry.region import strides_of
from reshard.loading.handing import Handing
from reshard.loading.lanes import Traffic
from reshard.loading.reader import read_plan
from reshard.loading.workers import count_readers, run_all
from reshard.planning.byte_runs import run_places
from reshard.planning.exchange_plan import BlockPlan, Part, Share
from reshard.planning.read_plan import ReadPlan
from reshard.state import State, TensorKey
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

# What is read at a time: most of it is still in a core's own cache when it is handed over, and a call costs little beside it.
_BLOCK_BYTES = 2 << 20

# Tensors that are read by one thread, one after the other: to open a file costs what the copy of 100 KiB costs.
_WORK_BYTES = 16 << 20

# Gaps inside a box that nobody needs are read over up to a page, as in a balanced load.
_GAP_BYTES = 4096

# Shorter runs are put side by side before they are handed over: for the kernel a piece costs what the copy of some hundred bytes costs.
_SHORT_RUN_BYTES = 512


def read_direct(
    plan: ReadPlan,
    entries: Sequence[Sequence[TensorEntry]],
    handing: Handing | None,
    state: State,
    storage: Storage,
    directory: str,
    *,
    memory_budget: int,
    verify: bool,
) -> Traffic:
    """Fill a state's memory as its plan says; what the ranks of the machine read for each other each for all.

    Args:
        plan: what the rank needs.
        entries: where that lies.
        handing: its part of what is read together; None when it reads for itself alone.
        state: what it fills.
        storage: where the files lie.
        directory: the checkpoint.
        memory_budget: bytes for buffers and mapped windows.
        verify: whether row blocks are held against their digests.

    Raises:
        ReshardError: as `read_plan` and `hand_over`.
    """
    if handing is None:
        return Traffic(*read_plan(plan, entries, state, storage, directory, memory_budget=memory_budget, verify=verify))
    # First what others wait for.
    together = hand_over(handing, state, storage, directory, memory_budget=memory_budget, verify=verify)
    rest, left = handing.rest(plan, entries)
    alone = Traffic(*read_plan(rest, left, state, storage, directory, memory_budget=memory_budget, verify=verify))
    return sum_up([together, alone])


def hand_over(handing: Handing, state: State, storage: Storage, directory: str, *, memory_budget: int, verify: bool) -> Traffic:
    """Read a rank's part, into its own memory and into that of its neighbours.

    Args:
        handing: the part.
        state: what the rank fills.
        storage: where the files lie.
        directory: the checkpoint.
        memory_budget: bytes for buffers.
        verify: whether row blocks are held against their digests.

    Raises:
        DamagedCheckpointError: a file is not what it promises, or its bytes are not as they were saved.
        StorageError: reading failed.
        ReshardError: a neighbour's memory can't be written.
        CommunicationError: a neighbour is gone.
    """
    readers = count_readers()
    block_bytes = min(_BLOCK_BYTES, memory_budget // (2 * readers))
    buffers: SimpleQueue[_Buffers] = SimpleQueue()
    for _ in range(readers):
        buffers.put(_Buffers(_Buffer(block_bytes), _Buffer(block_bytes)))
    hands = _Hands(handing, state, storage, directory, buffers, verify)
    return sum_up([Traffic(received=handing.received), *run_all(hands.works(block_bytes), readers, "reshard-hand")])


class _Buffer:
    """Memory of one piece of work: what was read, or short runs of that side by side."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.empty(nbytes, np.uint8)
        self._begin = np.array((self.data.ctypes.data, 0), np.int64)
        # Those that were asked for before, by their identity, with what keeps that theirs.
        self._known: dict[int, tuple[np.ndarray, Pieces]] = {}

    def pieces(self, listed: np.ndarray, *, again: bool) -> Pieces:
        """Pieces of the buffer, counted from its begin, where they lie in memory; `again`: they will be asked for once more."""
        known = self._known.get(id(listed))
        if known is None:
            known = listed, Pieces.of(listed + self._begin)
            if again:
                self._known[id(listed)] = known
        return known[1]


class _Buffers(NamedTuple):
    """Memory of one piece of work."""

    read: _Buffer
    packed: _Buffer


class _Delivery(NamedTuple):
    """What a neighbour gets of a block; the same for all tensors of a share.

    Attributes:
        part: the part of the block.
        is_packed: whether its runs are put side by side first.
        calls: what is copied at a time: pieces in the buffer, pieces in the neighbour's shard, each counted from its begin; and the bytes.
    """

    part: Part
    is_packed: bool
    calls: list[tuple[np.ndarray, np.ndarray, int]]


class _Runs(NamedTuple):
    """A box as runs of bytes.

    Attributes:
        nbytes: of each run.
        places: int64: where each begins.
        pieces: the same as pieces: where each begins, and its bytes.
    """

    nbytes: int
    places: np.ndarray
    pieces: np.ndarray


class _Block(NamedTuple):
    """What is read at a time, and who gets what of it."""

    plan: BlockPlan
    own: list[Part]
    deliveries: list[_Delivery]


class _Hands:
    """The work of one rank."""

    def __init__(
        self, handing: Handing, state: State, storage: Storage, directory: str, buffers: SimpleQueue[_Buffers], verify: bool
    ) -> None:
        self._handing = handing
        self._tensors = state.tensors
        self._storage = storage
        self._directory = directory
        self._buffers = buffers
        self._verify = verify
        # Of boxes in blocks, by what they are made of: many are cut alike.
        self._runs: dict[tuple[Region, tuple[int, ...], int], _Runs] = {}
        # The same of runs that are put side by side, by how many bytes they are together.
        self._packed: dict[int, _Runs] = {}

    def works(self, block_bytes: int) -> Iterator[Callable[[], Traffic]]:
        """Independent pieces of work: a tensor's part of a share each."""
        for share, entries in zip(self._handing.shares, self._handing.entries, strict=True):
            shapes = {(taker.rank, taker.shard): want.region.shape for want in share.wants for taker in want.takers}
            blocks: list[_Block] = []
            for plan in share.blocks(block_bytes, _GAP_BYTES):
                block = _Block(plan, [], [])
                for part in plan.parts:
                    if part.rank == self._handing.rank:
                        block.own.append(part)
                    else:
                        block.deliveries.append(self._delivery(share, part, shapes[part.rank, part.shard]))
                blocks.append(block)
            step = max(1, _WORK_BYTES * len(entries) // share.nbytes)
            for first in range(0, len(entries), step):
                keys = [tensor.key for tensor in share.tensors[first : first + step]]
                yield partial(self._read, share, keys, entries[first : first + step], blocks)

    def _delivery(self, share: Share, part: Part, shape: tuple[int, ...]) -> _Delivery:
        itemsize = share.arrangement.dtype.itemsize
        strides = share.piece.strides(itemsize)
        alike = part.source, strides, itemsize
        runs = self._runs.get(alike)
        if runs is None:
            run, places = run_places(part.source, strides, itemsize)
            runs = self._runs[alike] = _Runs(run, places, _between(places, run, 0, part.nbytes))
        run, places, pieces = runs
        is_packed = run < _SHORT_RUN_BYTES and len(places) > 1
        if is_packed:
            run, places, pieces = self._packed.setdefault(part.nbytes, _one_run(part.nbytes))
        other, targets = run_places(part.target, strides_of(shape, itemsize), itemsize)
        assert run * len(places) == other * len(targets) == part.nbytes  # else the system would write beside the shard
        if max(len(pieces), len(targets)) <= MOST_PIECES:
            return _Delivery(part, is_packed, [(pieces, _between(targets, other, 0, part.nbytes), part.nbytes)])
        # At either end of a call a run may be cut.
        step = (MOST_PIECES - 2) * min(run, other)
        ends = [*range(step, part.nbytes, step), part.nbytes]
        calls = [
            (_between(places, run, begin, end), _between(targets, other, begin, end), end - begin)
            for begin, end in zip([0, *ends], ends, strict=False)
        ]
        return _Delivery(part, is_packed, calls)

    def _read(self, share: Share, keys: Sequence[TensorKey], entries: Sequence[TensorEntry], blocks: Sequence[_Block]) -> Traffic:
        path, buffers = join(self._directory, share.site.file), self._buffers.get()
        try:
            with self._storage.open_read(path) as source:
                return sum_up(
                    [self._read_tensor(source, share, key, entry, blocks, buffers) for key, entry in zip(keys, entries, strict=True)]
                )
        finally:
            self._buffers.put(buffers)

    def _read_tensor(
        self, source: ReadableFile, share: Share, key: TensorKey, entry: TensorEntry, blocks: Sequence[_Block], buffers: _Buffers
    ) -> Traffic:
        check = BlockCheck(entry, source.path) if self._verify else None
        dtype = share.arrangement.dtype
        strides = share.piece.strides(dtype.itemsize)
        # The host's, since their addresses were told to others, too. A rank may read a tensor of which it has nothing itself.
        own = {index: self._tensors[key].shards[index].memory.host for index in {part.shard for block in blocks for part in block.own}}
        read = sent = 0
        for plan, mine, deliveries in blocks:
            data = memoryview(buffers.read.data)[: plan.nbytes]
            source.read_into(entry.begin + plan.offset, data)
            read += plan.nbytes
            if check is not None:
                check.update(plan.offset, data)
                check.raise_if_wrong()
            box = np.ndarray(plan.shape, dtype.numpy, data, strides=strides)
            for part in mine:
                host = own[part.shard]
                assert host is not None
                host[part.target.slices] = box[part.source.slices]
            for delivery in deliveries:
                self._deliver(key, delivery, box, buffers)
                sent += delivery.part.nbytes
        return Traffic(read, 0 if check is None else check.verified, sent=sent)

    def _deliver(self, key: TensorKey, delivery: _Delivery, box: np.ndarray, buffers: _Buffers) -> None:
        part, is_packed, calls = delivery
        buffer = buffers.packed if is_packed else buffers.read
        if is_packed:
            np.ndarray(part.source.shape, box.dtype, buffer.data.data)[...] = box[part.source.slices]
        address = self._handing.addresses[part.rank][key][part.shard]
        neighbour = self._handing.neighbours[part.rank]
        for pieces, places, nbytes in calls:
            there = places.copy()
            there[:, 0] += address
            neighbour.write(buffer.pieces(pieces, again=len(calls) == 1), Pieces.of(there), nbytes)


def sum_up(traffics: Sequence[Traffic]) -> Traffic:
    """All together."""
    rows = [(one.read, one.verified, one.pages, one.sent, one.received) for one in traffics]
    return Traffic(*map(sum, zip(*rows, strict=True)))


def _one_run(nbytes: int) -> _Runs:
    places = np.zeros(1, np.int64)
    return _Runs(nbytes, places, _between(places, nbytes, 0, nbytes))


def _between(places: np.ndarray, run: int, begin: int, end: int) -> np.ndarray:
    """Of equally long runs, one after the other, the pieces that are the bytes from one number to another: each one's begin and size."""
    first, last = begin // run, -(-end // run)
    pieces = np.empty((last - first, 2), np.int64)
    pieces[:, 0], pieces[:, 1] = places[first:last], run
    skipped = begin - first * run
    pieces[0] += (skipped, -skipped)
    pieces[-1, 1] -= last * run - end
    return pieces
