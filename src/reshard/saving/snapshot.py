"""A snapshot: a copy of a state that training may no longer change, in host buffers that are used again."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import numpy as np

from reshard.errors import CaptureError, naming
from reshard.format.names import tensor_name
from reshard.geometry import DType, Region
from reshard.saving.latch import Latch
from reshard.state import Memory, Shard, ShardedTensor, State, TensorKey

# Where each shard begins in the buffer: any element type may begin there, and no two share a line of the cache.
_ALIGNMENT = 64

# A buffer is replaced by a larger one with so much to spare (a part of it), so that a state that grows a little doesn't replace it again.
_SPARE = 16

# What is copied at a time of what is left for later: whoever helps waits for no more than this of what another thread has begun, which on
# busy cores has a tenth of one.
_PART_BYTES = 4 << 20


class BufferMemory(NamedTuple):
    """A part of a snapshot's buffer as the memory of a shard. The array over it is made when it is asked for: states have 100,000 tensors.

    Attributes:
        buffer: bytes.
        begin: where the shard begins in it.
        dtype: the element type.
        shape: the shape of the shard.
    """

    buffer: np.ndarray
    begin: int
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of the shard."""
        return self.dtype.itemsize * prod(self.shape)

    @property
    def host(self) -> np.ndarray | None:
        return self.read()

    @property
    def address(self) -> int | None:
        return self.buffer.ctypes.data + self.begin

    def read(self) -> np.ndarray:
        return np.ndarray(self.shape, self.dtype.numpy, self.buffer.data, self.begin)

    def write(self, region: Region, values: np.ndarray) -> None:
        self.read()[region.slices] = values

    def hold(self) -> Memory:
        return self

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.read()


class _Place(NamedTuple):
    """Where a shard goes: states have 100,000 tensors, and their bytes are counted once.

    Attributes:
        target: a part of the buffer.
        nbytes: its bytes.
    """

    target: BufferMemory
    nbytes: int


class _Left(NamedTuple):
    """A part of a shard that is still to be copied.

    Attributes:
        source: where it is.
        target: where it goes.
        base: where the buffer begins.
        begin: the part's first byte in the shard.
        end: its last, exclusive.
    """

    source: Memory
    target: BufferMemory
    base: int
    begin: int
    end: int


class Snapshot:
    """A state, some of which may still have to be copied.

    Args:
        state: as the attribute.
        nbytes: as the attribute.
        left: what is to be copied.
        later: as the attribute.
        waits: of the copies that a device has begun.

    Attributes:
        state: what is saved. Its tensors have the values of the call once `finish` has returned.
        nbytes: of its tensors.
        later: of these what was left to `finish`.
        wanted: set when somebody waits for what only `finish`, or who called for the save, can do.
    """

    def __init__(self, state: State, nbytes: int, left: Iterable[_Left], later: int, waits: list[Callable[[], object]]) -> None:
        self.state = state
        self.nbytes = nbytes
        self.later = later
        self._left = deque(left)
        self._begun: dict[int, _Left] = {}  # by thread
        self._waiting: set[int] = set()  # threads that copy since they wait
        self._is_over = False
        self._is_lost = False
        self._waits = waits
        # Taken by itself, never through the condition: that does it in Python code, in which an interrupt leaves it taken.
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._copied = Latch()
        self.wanted = Latch()
        if not self._left and not waits:
            self._copied.set()

    def finish(self) -> None:
        """Copy what is left, and wait for what others and devices still copy. Called once, from any thread.

        While somebody waits, and so copies, it begins nothing: who waits would wait for it.

        Raises:
            CaptureError: memory that is no longer there.
        """
        try:
            while True:
                self._copy_left(unless=self._waiting)
                with self._lock:
                    self._turn.wait_for(lambda: not (self._waiting if self._left else self._begun))
                    if not self._left and not self._begun:
                        break
            for wait in self._waits:
                wait()
        except BaseException:
            self._is_lost = True
            raise
        finally:
            # Also when it failed: training must not wait for ever.
            self.abandon()

    def abandon(self) -> None:
        """Copy nothing more, and let all go who wait: nobody will finish it, or it is finished."""
        with self._lock:
            self._is_over = True
            self._left.clear()
            self._waits.clear()
        self._copied.set()

    def wait(self) -> None:
        """Return when the original may be changed. Until then the caller copies, too: it may have more of the machine than who finishes.

        What fails here who finishes does again. If it fails there it is told there.

        Raises:
            Exception: it didn't fail there: it came from a signal's handler.
        """
        if self.is_copied:
            return
        failed: Exception | None = None
        try:
            self.give_back()
            with self._lock:
                self._waiting.add(threading.get_ident())
            self._copy_left()
        except Exception as error:  # noqa: BLE001 - a save that fails is no reason for training to do so
            failed = error
        finally:
            self.give_back()
        try:
            self._wait_for_devices()
        except Exception as error:  # noqa: BLE001 - as above
            failed = error
        if not self.is_copied:
            self.wanted.set()
            self._copied.wait()
        if failed is not None and not self._is_lost:
            raise failed

    def _wait_for_devices(self) -> None:
        """Wait for what devices copy, if no thread has anything to do with it any more. Who finishes may not have had its turn yet."""
        with self._lock:
            if self._left or self._begun:
                return
            waits = list(self._waits)
        for wait in waits:
            wait()
        self._copied.set()

    def _copy_left(self, unless: Collection[int] = ()) -> None:
        """Copy part after part until none is left, or there are others who do. An interrupt may come between any two steps: their order
        loses no part.
        """
        me = threading.get_ident()
        while True:
            with self._lock:
                if not self._left or unless:
                    return
                part = self._begun[me] = self._left[0]
                del self._left[0]
            try:
                wait = _copy(*part)
            except CaptureError as error:
                raise naming(error, self._name_of(part.target)) from error
            with self._lock:
                if wait is not None:
                    self._waits.append(wait)
                del self._begun[me]
                if not self._left:  # not for each part: who is woken takes turns with who copies
                    self._turn.notify_all()

    def give_back(self) -> None:
        """End this thread's waiting. The part that it has begun, if any, is the next one's who comes: it is copied again, from its begin.

        A second interrupt may keep it from being called where a wait was broken off: then whoever comes back with that thread calls it.
        """
        me = threading.get_ident()
        with self._lock:
            self._waiting.discard(me)
            part = self._begun.get(me)
            if part is not None:
                if not self._is_over:
                    self._left.appendleft(part)
                del self._begun[me]  # last: as long as it is there nobody takes all for copied
            self._turn.notify_all()

    @property
    def is_copied(self) -> bool:
        """Whether the original may be changed."""
        return self._copied.is_set

    def _name_of(self, memory: BufferMemory) -> str:
        return next(tensor_name(key) for key, tensor in self.state.tensors.items() for shard in tensor.shards if shard.memory is memory)


class SnapshotBuffers:
    """Makes snapshots, one after the other in the same memory.

    The memory stays: that of a snapshot is warm from the second one on, where copying into it is several times as fast.

    Args:
        allocate: gives host memory of so many bytes, such as devices can copy to.
    """

    def __init__(self, allocate: Callable[[int], np.ndarray]) -> None:
        self._allocate = allocate
        self._buffer = np.empty(0, np.uint8)
        self._total = 0
        self._held: dict[TensorKey, ShardedTensor] = {}
        self._places: list[tuple[_Place, ...]] = []

    def take(self, state: State, *, deferred: bool = False, takes: Callable[[TensorKey], bool] | None = None) -> Snapshot:
        """Copy a state. The snapshot before it must be of no use any more.

        Args:
            state: what training goes on to change.
            deferred: leave the tensors that only an optimizer's step changes to `Snapshot.finish`; all else is copied here.
            takes: which tensors are needed; the others are left out. All by default.

        Raises:
            CaptureError: memory that is no longer there.
        """
        tensors = [tensor for key, tensor in state.tensors.items() if takes is None or takes(key)]
        held, places = self._place(tensors)
        base = self._buffer.ctypes.data
        left: list[_Left] = []
        later = 0
        waits: list[Callable[[], object]] = []
        begun: list[Callable[[], object]] = []  # copies of what may change before any optimizer's step
        updated = state.updated if deferred else frozenset[TensorKey]()
        for tensor, placed in zip(tensors, places, strict=True):
            may_wait = tensor.key in updated
            try:
                for (region, memory), (target, nbytes) in zip(tensor.shards, placed, strict=True):
                    # Small ones cost less to copy than to keep for later; of one number (a step count) nobody knows who changes it.
                    if may_wait and region.shape and ((address := memory.address) is not None or memory.host is not None):
                        later += nbytes
                        if address is not None and 0 < nbytes <= _PART_BYTES:
                            left.append(_Left(memory.hold(), target, base, 0, nbytes))
                        else:
                            left += _parts(memory.hold(), target, base, nbytes, in_a_row=address is not None)
                        continue
                    wait = _copy(memory, target, base, 0, nbytes)
                    if wait is not None:
                        (waits if may_wait and region.shape else begun).append(wait)
            except CaptureError as error:
                raise naming(error, tensor_name(tensor.key)) from error
        groups = tuple(replace(group, options=copy.deepcopy(dict(group.options))) for group in state.groups)
        values, rank_values = copy.deepcopy((dict(state.values), dict(state.rank_values)))
        # A device's copies run beside what it is given after the call. They were all begun first, so that they run one beside the other.
        for wait in begun:
            wait()
        return Snapshot(State(held, groups, values, rank_values), self._total, left, later, waits)

    def _place(self, tensors: Sequence[ShardedTensor]) -> tuple[dict[TensorKey, ShardedTensor], list[tuple[_Place, ...]]]:
        """The tensors with places in the buffer for memory, and of each its places.

        Where nothing lies otherwise than before they are the same objects.
        """
        if len(tensors) != len(self._held) or not all(map(_is_as_before, tensors, self._held.values())):
            self._total = sum(_room(tensor.dtype, region) for tensor in tensors for region, _ in tensor.shards)
            if self._buffer.nbytes < self._total:
                self._held, self._places = {}, []
                self._buffer = np.empty(0, np.uint8)  # before the new one is there
                self._buffer = self._allocate(self._total + self._total // _SPARE)
            held: dict[TensorKey, ShardedTensor] = {}
            places: list[tuple[_Place, ...]] = []
            end = 0
            for key, dtype, shape, layout, shards in tensors:
                placed = []
                for region, _ in shards:
                    target = BufferMemory(self._buffer, end, dtype, region.shape)
                    placed.append(_Place(target, target.nbytes))
                    end += _room(dtype, region)
                held[key] = ShardedTensor(
                    key, dtype, shape, layout, tuple(Shard(shard.region, place.target) for shard, place in zip(shards, placed, strict=True))
                )
                places.append(tuple(placed))
            self._held, self._places = held, places
        return dict(self._held), self._places


def _is_as_before(tensor: ShardedTensor, before: ShardedTensor) -> bool:
    """Whether a tensor lies as one that has a place in the buffer. Layouts by identity: adapters that know it give the same again."""
    key, dtype, shape, layout, shards = tensor
    other_key, other_dtype, other_shape, other_layout, others = before
    if layout is not other_layout or dtype is not other_dtype or key != other_key or shape != other_shape or len(shards) != len(others):
        return False
    return all(region is other or region == other for (region, _), (other, _) in zip(shards, others, strict=True))


def _room(dtype: DType, region: Region) -> int:
    return -(-dtype.itemsize * prod(region.shape) // _ALIGNMENT) * _ALIGNMENT


def _parts(source: Memory, target: BufferMemory, base: int, nbytes: int, *, in_a_row: bool) -> Iterator[_Left]:
    """What is left of a shard: in parts where its bytes lie one after the other."""
    step = _PART_BYTES if in_a_row else max(nbytes, 1)
    for begin in range(0, nbytes, step):
        yield _Left(source, target, base, begin, min(begin + step, nbytes))


def _copy(source: Memory, target: BufferMemory, base: int, begin: int, end: int) -> Callable[[], object] | None:
    address = source.address
    if address is not None:
        # Of all ways the one that costs least per tensor; other threads run on.
        ctypes.memmove(base + target.begin + begin, address + begin, end - begin)
        return None
    # All of it, should a part's memory be no longer where it was.
    return source.begin_copy(target.read())
