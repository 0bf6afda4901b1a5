"""What a rank has read for the ranks of its machine goes from a buffer into their memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from reshard.comm.neighbours import Pieces
from reshard.format.safetensors import BlockCheck, TensorEntry
from reshard.loading.handed_blocks import PACKED, BlockCutter, Delivery, HandedBlock, Landing, LandingCall
from reshard.loading.handing import Handing
from reshard.loading.lanes import Traffic
from reshard.loading.reader import read_plan
from reshard.loading.workers import count_readers, run_all
from reshard.planning.exchange_plan import Share
from reshard.planning.read_plan import ReadPlan
from reshard.state import State, TensorKey
from reshard.storage import ReadableFile, Storage
from reshard.storage.storage import join

# What is read at a time: most of it is still in a core's own cache when it is handed over, and a call costs little beside it.
_BLOCK_BYTES = 2 << 20

# Tensors that are read by one thread, one after the other: to open a file costs what the copy of 100 KiB costs.
_WORK_BYTES = 16 << 20


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
    rest, left = handing.part_of(plan, entries, together=False)
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
    return sum_up(run_all(hands.works(block_bytes), readers, "reshard-hand"))


class _Buffer:
    """Memory of one piece of work: what was read, or short runs of that side by side."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.empty(nbytes, np.uint8)
        self.address = self.data.ctypes.data
        # Those that were asked for before, by their identity, with what keeps that theirs.
        self._known: dict[tuple[int, int], tuple[np.ndarray, Pieces]] = {}
        self._placed: dict[int, _Placed] = {}

    def pieces(self, listed: np.ndarray, begin: int, *, again: bool) -> Pieces:
        """Pieces of the buffer, counted from a place in it, where they lie in memory; `again`: they will be asked for once more."""
        known = self._known.get((id(listed), begin))
        if known is None:
            known = listed, Pieces.of(listed, self.address + begin)
            if again:
                self._known[id(listed), begin] = known
        return known[1]

    def placed(self, call: LandingCall, bases: Sequence[int]) -> np.ndarray:
        """The pieces of a call in memory, where the buffer and the boxes begin there. They are so until it is asked again."""
        known = self._placed.get(id(call))
        if known is None:
            known = self._placed[id(call)] = _Placed(call)
        return known.at(bases)


class _Placed:
    """The pieces of a call, moved from one tensor's places to the next one's."""

    def __init__(self, call: LandingCall) -> None:
        self._call = call
        self._pieces = call.pieces.copy()
        self._before = [0] * len(call.which)
        # Those that are a slice, which numpy moves where they are.
        places = self._pieces[:, 0]
        self._views = [places[which] if isinstance(which, slice) else None for which in call.which]

    def at(self, bases: Sequence[int]) -> np.ndarray:
        before = self._before
        for number, base in enumerate(bases):
            if base != before[number]:
                view = self._views[number]
                if view is not None:
                    view += base - before[number]
                else:
                    self._pieces[self._call.which[number], 0] += base - before[number]
                before[number] = base
        return self._pieces


class _Buffers(NamedTuple):
    """Memory of one piece of work."""

    read: _Buffer
    packed: _Buffer


class _Hands:
    """The work of one rank."""

    def __init__(
        self, handing: Handing, state: State, storage: Storage, directory: str, buffers: SimpleQueue[_Buffers], verify: bool
    ) -> None:
        self._handing = handing
        self._addresses = handing.addresses
        self._own = handing.addresses[handing.rank]
        self._tensors = state.tensors
        self._storage = storage
        self._directory = directory
        self._buffers = buffers
        self._verify = verify

    def works(self, block_bytes: int) -> Iterator[Callable[[], Traffic]]:
        """Independent pieces of work: a tensor's part of a share each."""
        # What is verified has to lie as in the file.
        cutter = BlockCutter(self._handing.rank, block_bytes, is_straight=not self._verify)
        for share, entries in zip(self._handing.shares, self._handing.entries, strict=True):
            blocks = cutter.blocks(share)
            step = max(1, _WORK_BYTES * len(entries) // share.nbytes)
            for first in range(0, len(entries), step):
                keys = [tensor.key for tensor in share.tensors[first : first + step]]
                yield partial(self._read, share, keys, entries[first : first + step], blocks)

    def _read(self, share: Share, keys: Sequence[TensorKey], entries: Sequence[TensorEntry], blocks: Sequence[HandedBlock]) -> Traffic:
        path, buffers = join(self._directory, share.site.file), self._buffers.get()
        try:
            with self._storage.open_read(path) as source:
                return sum_up(
                    [self._read_tensor(source, share, key, entry, blocks, buffers) for key, entry in zip(keys, entries, strict=True)]
                )
        finally:
            self._buffers.put(buffers)

    def _read_tensor(
        self, source: ReadableFile, share: Share, key: TensorKey, entry: TensorEntry, blocks: Sequence[HandedBlock], buffers: _Buffers
    ) -> Traffic:
        check = BlockCheck(entry, source.path) if self._verify else None
        dtype = share.arrangement.dtype
        strides = share.piece.strides(dtype.itemsize)
        read = sent = 0
        for shape, offset, nbytes, landing, own, deliveries in blocks:
            begin = entry.begin + offset
            if landing is not None:
                self._land(source, begin, key, landing, buffers.read)
                box = None
            else:
                data = memoryview(buffers.read.data)[:nbytes]
                source.read_into(begin, data)
                if check is not None:
                    check.update(offset, data)
                    check.raise_if_wrong()
                box = np.ndarray(shape, dtype.numpy, data, strides=strides)
                for part in own:
                    # The host's, since its address was told to others, too.
                    host = self._tensors[key].shards[part.shard].memory.host
                    assert host is not None
                    host[part.target.slices] = box[part.source.slices]
            read += nbytes
            for delivery in deliveries:
                if delivery.origin == PACKED and box is not None:
                    packed = np.ndarray(delivery.source.shape, box.dtype, buffers.packed.data.data)
                    packed[...] = box[delivery.source.slices]
                self._deliver(key, delivery, buffers)
                sent += delivery.nbytes
        return Traffic(read, 0 if check is None else check.verified, sent=sent)

    def _land(self, source: ReadableFile, begin: int, key: TensorKey, landing: Landing, buffer: _Buffer) -> None:
        """Read a block, all of it to where it belongs."""
        # A rank may read a tensor of which it has nothing.
        bases = [buffer.address, *[self._own[key][shard] + place for shard, place in landing.boxes]]
        for call in landing.calls:
            source.scatter(begin + call.offset, buffer.placed(call, bases), call.nbytes)

    def _deliver(self, key: TensorKey, delivery: Delivery, buffers: _Buffers) -> None:
        rank, shard, _, nbytes, origin, own, target, calls = delivery
        target += self._addresses[rank][key][shard]
        neighbour = self._handing.neighbours[rank]
        buffer = buffers.packed if origin == PACKED else buffers.read
        if calls is None:
            neighbour.write_run(own + (self._own[key][origin] if origin >= 0 else buffer.address), target, nbytes)
            return
        for pieces, places, size in calls:
            is_own = origin >= 0
            here = Pieces.of(pieces, own + self._own[key][origin]) if is_own else buffer.pieces(pieces, own, again=len(calls) == 1)
            neighbour.write(here, Pieces.of(places, target), size)


def sum_up(traffics: Sequence[Traffic]) -> Traffic:
    """All together."""
    rows = [(one.read, one.verified, one.pages, one.sent, one.received) for one in traffics]
    return Traffic(*map(sum, zip(*rows, strict=True))) if rows else Traffic()
