"""Memory seen through a lattice: a strided view of a shard's memory, and a shard's memory made of several such views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from reshard.geometry import DType, Region
from reshard.planning.byte_runs import strides_of
from reshard.planning.mapping.lattice import Face, clip, moved
from reshard.state import HostMemory, Memory


def view_of(array: np.ndarray, extents: tuple[int, ...], face: Face) -> np.ndarray:
    """The elements of a face of an array, with its strides; writing to the view writes to the array."""
    # `as_strided` knows no float8: integers of the same size carry the bytes.
    carrier = array if array.dtype.kind in "biufc" else array.view(f"u{array.itemsize}")
    start = carrier[tuple(slice(o, None) for o in face.offset)] if array.ndim else carrier
    strides = tuple(array.strides[d] * step for d, step in zip(face.dims, face.steps, strict=True))
    view = np.lib.stride_tricks.as_strided(start, extents, strides)
    return view if carrier is array else view.view(array.dtype)


class ViewMemory(NamedTuple):
    """The memory of a part of a shard, in the coordinates of a lattice.

    Attributes:
        memory: of the shard.
        dtype: the element type.
        extents: of the part.
        face: where it lies in the shard; its shape is the shard's.
    """

    memory: Memory
    dtype: DType
    extents: tuple[int, ...]
    face: Face

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.extents)

    @property
    def host(self) -> np.ndarray | None:
        host = self.memory.host
        return None if host is None else view_of(host, self.extents, self.face)

    @property
    def address(self) -> int | None:
        face = self.face
        strides = strides_of(face.shape, self.dtype.itemsize)
        own = tuple(strides[d] * step for d, step in zip(face.dims, face.steps, strict=True))
        if any(n > 1 and a != b for n, a, b in zip(self.extents, own, strides_of(self.extents, self.dtype.itemsize), strict=True)):
            return None
        # A run may have given the shard other memory since it was described.
        address = self.memory.address if self.memory.nbytes == self.dtype.itemsize * prod(face.shape) else None
        return None if address is None else address + sum(o * stride for o, stride in zip(face.offset, strides, strict=True))

    def read(self) -> np.ndarray:
        host = self.memory.host
        return view_of(self.memory.read() if host is None else host, self.extents, self.face)

    def write(self, region: Region, values: np.ndarray) -> None:
        host = self.host
        if host is not None:
            host[region.slices if region.shape else ()] = values
            return
        # Through boxes of the shard, one for each place along the axes that aren't one in it.
        face = moved(self.face, region.offset)
        inner: dict[int, int] = {}
        for axis, (d, step) in enumerate(zip(face.dims, face.steps, strict=True)):
            if step == 1:
                inner[d] = axis
        outer = [axis for axis in range(len(region.shape)) if axis not in inner.values()]
        order = [inner[d] for d in sorted(inner)]
        shape = tuple(region.shape[inner[d]] if d in inner else 1 for d in range(len(face.shape)))
        for place in product(*(range(region.shape[axis]) for axis in outer)):
            offset = list(face.offset)
            for axis, x in zip(outer, place, strict=True):
                offset[face.dims[axis]] += x * face.steps[axis]
            at = dict(zip(outer, place, strict=True))
            box = values[tuple(at.get(axis, slice(None)) for axis in range(len(region.shape)))]
            ranks = sorted(order)
            box = np.asarray(box).transpose([ranks.index(axis) for axis in order]).reshape(shape)
            self.memory.write(Region(tuple(offset), shape), box)

    def hold(self) -> Memory:
        return self._replace(memory=self.memory.hold())

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.read()


class Piece(NamedTuple):
    """A part of a composed shard.

    Attributes:
        memory: that has its values.
        face: where they lie in the shard; its shape is the shard's.
    """

    memory: ViewMemory
    face: Face


@dataclass(frozen=True, slots=True)
class ComposedMemory:
    """The memory of a shard whose elements lie in several tensors. It is gathered when it is read, a block at a time if the reader wants.

    Attributes:
        dtype: the element type.
        shape: of the shard.
        pieces: disjoint; what none of them has is filled.
        fills: values that rules declare: the value, the extents of what has it, and where that lies in the shard.
    """

    dtype: DType
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    fills: tuple[tuple[float, tuple[int, ...], Face], ...] = ()

    @property
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    @property
    def nbytes(self) -> int:
        """The bytes of the shard."""
        return self.dtype.itemsize * prod(self.shape)

    def read(self) -> np.ndarray:
        return self.read_box(Region.whole(self.shape))

    def read_box(self, box: Region) -> np.ndarray:
        """The present values of a box of the shard, as an array of their own."""
        out = np.empty(box.shape, self.dtype.numpy)
        for value, extents, face in self.fills:
            for own in clip(extents, face, box):
                view_of(out, own.shape, _inside(face, own, box))[...] = np.full((), value, self.dtype.numpy)
        for own, face, memory in self._inside(box):
            view_of(out, own.shape, face)[...] = memory.read()[own.slices]
        return out

    def blocks(self) -> Iterator[np.ndarray]:
        """The present values in the order of their bytes, some MiB at a time: what is gathered never is a second copy of the shard."""
        held = self._on_host()
        return (held.read_box(box) for box in row_boxes(self.shape, self.dtype.itemsize))

    def _on_host(self) -> ComposedMemory:
        """The same with what the host can't address copied there once, and not again for each block."""
        copies: dict[int, HostMemory] = {}
        pieces = []
        for piece in self.pieces:
            memory = piece.memory.memory
            if memory.host is None:
                if id(memory) not in copies:
                    copies[id(memory)] = HostMemory(memory.read())
                memory = copies[id(memory)]
            pieces.append(piece._replace(memory=piece.memory._replace(memory=memory)))
        return ComposedMemory(self.dtype, self.shape, tuple(pieces), self.fills)

    def write(self, region: Region, values: np.ndarray) -> None:
        for own, face, memory in self._inside(region):
            memory.write(own, view_of(np.asarray(values), own.shape, face))

    def _inside(self, box: Region) -> Iterator[tuple[Region, Face, ViewMemory]]:
        """What pieces have of a box: in the piece's coordinates, and where that lies in the box."""
        for memory, face in self.pieces:
            for own in clip(memory.extents, face, box):
                yield own, _inside(face, own, box), memory

    def hold(self) -> Memory:
        pieces = tuple(piece._replace(memory=piece.memory._replace(memory=piece.memory.memory.hold())) for piece in self.pieces)
        return ComposedMemory(self.dtype, self.shape, pieces, self.fills)

    def begin_copy(self, target: np.ndarray) -> Callable[[], object] | None:
        for box, values in zip(row_boxes(self.shape, self.dtype.itemsize), self.blocks(), strict=True):
            target[box.slices if box.shape else ()] = values
        return None


def _inside(face: Face, own: Region, box: Region) -> Face:
    """Where a box of a lattice lies in a box of its tensor."""
    begun = moved(face, own.offset)
    return Face(box.shape, tuple(a - b for a, b in zip(begun.offset, box.offset, strict=True)), begun.dims, begun.steps)


# What is gathered of a composed shard at a time.
_BLOCK_BYTES = 4 << 20


def row_boxes(shape: tuple[int, ...], itemsize: int, most: int = _BLOCK_BYTES) -> Iterator[Region]:
    """A shard in boxes of rows, in the order of its elements, each of at most so many bytes (or one element)."""
    if prod(shape) * itemsize <= most or not shape:
        yield Region.whole(shape)
        return
    row = prod(shape[1:]) * itemsize
    rows = most // row
    if rows:
        for begin in range(0, shape[0], rows):
            yield Region((begin, *(0 for _ in shape[1:])), (min(rows, shape[0] - begin), *shape[1:]))
        return
    for index in range(shape[0]):
        for box in row_boxes(shape[1:], itemsize, most):
            yield Region((index, *box.offset), (1, *box.shape))
