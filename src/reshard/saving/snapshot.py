"""A snapshot: a copy of a state that training may no longer change, in host buffers that are used again."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable, Iterable
from dataclasses import replace
from math import prod
from threading import Event
from typing import NamedTuple

import numpy as np

from reshard.geometry import DType, Region
from reshard.state import Memory, Shard, ShardedTensor, State, TensorKey

# Where each shard begins in the buffer: any element type may begin there, and no two share a line of the cache.
_ALIGNMENT = 64

# A buffer is replaced by a larger one with so much to spare (a part of it), so that a state that grows a little doesn't replace it again.
_SPARE = 16


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


# Where it is, where it goes, and where the buffer begins.
_Left = tuple[Memory, BufferMemory, int]


class Snapshot:
    """A state, some of which may still have to be copied.

    Attributes:
        state: what is saved. Its tensors have the values of the call once `finish` has returned.
        nbytes: of its tensors.
    """

    def __init__(self, state: State, nbytes: int, left: list[_Left], waits: list[Callable[[], object]]) -> None:
        self.state = state
        self.nbytes = nbytes
        self._left = left
        self._waits = waits
        self._copied = Event()
        if not left and not waits:
            self._copied.set()

    def finish(self) -> None:
        """Copy what is left, and wait for what a device still copies. Called once, from any thread."""
        try:
            for source, target, base in self._left:
                wait = _copy(source, target, base)
                if wait is not None:
                    self._waits.append(wait)
            for wait in self._waits:
                wait()
        finally:
            # Also when it failed: then the snapshot is lost, but training must not wait for ever.
            self._left = []
            self._waits = []
            self._copied.set()

    def wait(self) -> None:
        """Return when the original may be changed."""
        self._copied.wait()

    @property
    def is_copied(self) -> bool:
        """Whether the original may be changed."""
        return self._copied.is_set()


class SnapshotBuffers:
    """Makes snapshots, one after the other in the same memory.

    The memory stays: that of a snapshot is warm from the second one on, where copying into it is several times as fast.

    Args:
        allocate: gives host memory of so many bytes, such as devices can copy to.
    """

    def __init__(self, allocate: Callable[[int], np.ndarray]) -> None:
        self._allocate = allocate
        self._buffer = np.empty(0, np.uint8)

    def take(self, state: State, *, deferred: bool = False, takes: Callable[[TensorKey], bool] | None = None) -> Snapshot:
        """Copy a state. The snapshot before it must be of no use any more.

        Args:
            state: what training goes on to change.
            deferred: leave the tensors that only an optimizer's step changes to `Snapshot.finish`; all else is copied here.
            takes: which tensors are needed; the others are left out. All by default.
        """
        tensors = [tensor for key, tensor in state.tensors.items() if takes is None or takes(key)]
        held: dict[TensorKey, ShardedTensor] = {}
        sources: list[tuple[TensorKey, Memory, BufferMemory]] = []
        buffer, total = self._place(tensors)
        base, end = buffer.ctypes.data, 0
        for tensor in tensors:
            key, dtype, shape, layout, shards = tensor
            placed = []
            for region, memory in shards:
                target = BufferMemory(buffer, end, dtype, region.shape)
                end += _room(dtype, region)
                placed.append(Shard(region, target))
                sources.append((key, memory, target))
            held[key] = ShardedTensor(key, dtype, shape, layout, tuple(placed))
        left: list[_Left] = []
        waits: list[Callable[[], object]] = []
        updated = state.updated if deferred else frozenset[TensorKey]()
        for key, memory, target in sources:
            # Small ones cost less to copy than to keep for later; of one number (a step count) nobody knows who changes it.
            if key in updated and target.shape and (memory.address is not None or memory.host is not None):
                left.append((memory.hold(), target, base))
                continue
            wait = _copy(memory, target, base)
            if wait is not None:
                waits.append(wait)
        groups = tuple(replace(group, options=copy.deepcopy(dict(group.options))) for group in state.groups)
        values, rank_values = copy.deepcopy((dict(state.values), dict(state.rank_values)))
        return Snapshot(State(held, groups, values, rank_values), total, left, waits)

    def _place(self, tensors: Iterable[ShardedTensor]) -> tuple[np.ndarray, int]:
        total = sum(_room(tensor.dtype, region) for tensor in tensors for region, _ in tensor.shards)
        if self._buffer.nbytes < total:
            self._buffer = np.empty(0, np.uint8)  # before the new one is there
            self._buffer = self._allocate(total + total // _SPARE)
        return self._buffer, total


def _room(dtype: DType, region: Region) -> int:
    return -(-dtype.itemsize * prod(region.shape) // _ALIGNMENT) * _ALIGNMENT


def _copy(source: Memory, target: BufferMemory, base: int) -> Callable[[], object] | None:
    address = source.address
    if address is not None:
        # Of all ways the one that costs least per tensor; other threads run on.
        ctypes.memmove(base + target.begin, address, target.dtype.itemsize * prod(target.shape))
        return None
    return source.begin_copy(target.read())
