"""What a rank has read for the ranks of its machine goes from a buffer into their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from reshard.comm.neighbours import MOST_PIECES
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
from reshard.storage import Storage
from reshard.storage.storage import join

# What is read at a time: still in a core's own cache when it is handed over, and large enough that a call costs little.
_BLOCK_BYTES = 1 << 20

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
        CommunicationError: a neighbour is gone.
    """
    readers = count_readers()
    block_bytes = min(_BLOCK_BYTES, memory_budget // (2 * readers))
    buffers: SimpleQueue[_Buffers] = SimpleQueue()
    for _ in range(readers):
        buffers.put(_Buffers.of(block_bytes))
    hands = _Hands(handing, state, storage, directory, buffers, verify)
    return sum_up([Traffic(received=handing.received), *run_all(hands.works(block_bytes), readers, "reshard-hand")])


class _Buffers(NamedTuple):
    """Memory of one piece of work.

    Attributes:
        read: what was read.
        packed: short runs of that side by side.
        addresses: where either lies.
    """

    read: np.ndarray
    packed: np.ndarray
    addresses: tuple[int, int]

    @classmethod
    def of(cls, nbytes: int) -> _Buffers:
        read, packed = np.empty(nbytes, np.uint8), np.empty(nbytes, np.uint8)
        return cls(read, packed, (read.ctypes.data, packed.ctypes.data))


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
        # Of boxes in blocks: many blocks are cut alike.
        self._runs: dict[tuple[Region, tuple[int, ...]], tuple[int, np.ndarray]] = {}

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
            for tensor, entry in zip(share.tensors, entries, strict=True):
                yield partial(self._read, share, tensor.key, entry, blocks)

    def _delivery(self, share: Share, part: Part, shape: tuple[int, ...]) -> _Delivery:
        itemsize = share.arrangement.dtype.itemsize
        strides = share.piece.strides(itemsize)
        found = self._runs.get((part.source, strides))
        if found is None:
            found = self._runs[part.source, strides] = run_places(part.source, strides, itemsize)
        run, places = found
        is_packed = run < _SHORT_RUN_BYTES and len(places) > 1
        if is_packed:
            run, places = part.nbytes, np.zeros(1, np.int64)
        other, targets = run_places(part.target, strides_of(shape, itemsize), itemsize)
        # At either end of a call a run may be cut.
        step = (MOST_PIECES - 2) * min(run, other)
        ends = [*range(step, part.nbytes, step), part.nbytes]
        calls = [
            (_between(places, run, begin, end), _between(targets, other, begin, end), end - begin)
            for begin, end in zip([0, *ends], ends, strict=False)
        ]
        return _Delivery(part, is_packed, calls)

    def _read(self, share: Share, key: TensorKey, entry: TensorEntry, blocks: Sequence[_Block]) -> Traffic:
        path, buffers = join(self._directory, share.site.file), self._buffers.get()
        check = BlockCheck(entry, path) if self._verify else None
        dtype, shards = share.arrangement.dtype, self._tensors[key].shards
        strides = share.piece.strides(dtype.itemsize)
        # The host's, since their addresses were told to others, too.
        own = {index: shards[index].memory.host for index in {part.shard for block in blocks for part in block.own}}
        read = sent = 0
        try:
            with self._storage.open_read(path) as source:
                for plan, mine, deliveries in blocks:
                    data = memoryview(buffers.read)[: plan.nbytes]
                    source.read_into(entry.begin + plan.offset, data)
                    read += plan.nbytes
                    if check is not None:
                        check.update(plan.offset, data)
                        check.raise_if_wrong()
                    box = np.ndarray(plan.shape, dtype.numpy, buffers.read.data, strides=strides)
                    for part in mine:
                        host = own[part.shard]
                        assert host is not None
                        host[part.target.slices] = box[part.source.slices]
                    for delivery in deliveries:
                        self._deliver(key, delivery, box, buffers)
                        sent += delivery.part.nbytes
        finally:
            self._buffers.put(buffers)
        return Traffic(read, 0 if check is None else check.verified, sent=sent)

    def _deliver(self, key: TensorKey, delivery: _Delivery, box: np.ndarray, buffers: _Buffers) -> None:
        part, is_packed, calls = delivery
        if is_packed:
            np.ndarray(part.source.shape, box.dtype, buffers.packed.data)[...] = box[part.source.slices]
        here = buffers.addresses[is_packed]
        there = self._handing.addresses[part.rank][key][part.shard]
        neighbour = self._handing.neighbours[part.rank]
        for pieces, places, nbytes in calls:
            neighbour.write(_from(here, pieces), _from(there, places), nbytes)


def sum_up(traffics: Sequence[Traffic]) -> Traffic:
    """All together."""
    rows = [(one.read, one.verified, one.pages, one.sent, one.received) for one in traffics]
    return Traffic(*map(sum, zip(*rows, strict=True)))


def _between(places: np.ndarray, run: int, begin: int, end: int) -> np.ndarray:
    """Of equally long runs, one after the other, the pieces that are the bytes from one number to another: each one's begin and size."""
    first, last = begin // run, -(-end // run)
    pieces = np.empty((last - first, 2), np.int64)
    pieces[:, 0], pieces[:, 1] = places[first:last], run
    skipped = begin - first * run
    pieces[0] += (skipped, -skipped)
    pieces[-1, 1] -= last * run - end
    return pieces


def _from(address: int, pieces: np.ndarray) -> np.ndarray:
    """Pieces whose begins are counted from an address, as they lie in memory."""
    placed = pieces.copy()
    placed[:, 0] += address
    return placed
