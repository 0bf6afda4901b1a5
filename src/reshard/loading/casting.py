"""Memory of one floating type that takes values of another, or quantised ones: they are converted on their way from a file into it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from reshard.errors import UsageError
from reshard.geometry import DType, Region
from reshard.geometry.casts import cast_values
from reshard.planning.block_scales import BlockScale
from reshard.planning.mapping.lattice import Face, moved
from reshard.state import Memory

# A cast makes an array of so many elements at a time, at most: few enough for a core's own cache, whatever the size of the tensor.
_BLOCK_ELEMENTS = 256 << 10


@dataclass(frozen=True, slots=True)
class CastMemory:
    """Memory of one type that takes values of another: what is written is converted, block by block.

    Nothing can be read straight into it, hence `host` is None: whoever fills it stages what he reads and writes it.

    Attributes:
        memory: where the converted values go.
        stored: the type of the values that are written.
        dtype: the type of the memory.
    """

    memory: Memory
    stored: DType
    dtype: DType

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes // self.dtype.itemsize * self.stored.itemsize

    @property
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    def read(self) -> np.ndarray:
        return cast_values(self.memory.read(), self.stored)

    def write(self, region: Region, values: np.ndarray) -> None:
        for box, part in _in_blocks(region, values):
            self.memory.write(box, cast_values(part, self.dtype))

    def hold(self) -> Memory:
        return CastMemory(self.memory.hold(), self.stored, self.dtype)

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.read()


@dataclass(frozen=True, slots=True)
class ScaledMemory:
    """Memory that takes quantised values: each is multiplied by the number of its block in float32, then rounded, block by block.

    As of `CastMemory`, `host` is None. It is there to be written to only: what has been dequantised isn't quantised again.

    Attributes:
        memory: where the values go.
        dtype: its type.
        scale: of the quantised tensor.
        numbers: the part of the scale that this memory needs; to be read before anything is written here.
        part: which part that is.
        face: where the elements lie in the quantised tensor.
    """

    memory: Memory
    dtype: DType
    scale: BlockScale
    numbers: np.ndarray
    part: Region
    face: Face

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes // self.dtype.itemsize  # what is quantised by block has a byte for each

    @property
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    def read(self) -> np.ndarray:
        raise UsageError("a dequantised tensor is not read as a quantised one")

    def write(self, region: Region, values: np.ndarray) -> None:
        for box, part in _in_blocks(region, values):
            face = moved(self.face, box.offset)
            self.memory.write(box, self.scale.dequantise(part, self.numbers, self.part, face, self.dtype))

    def hold(self) -> Memory:
        return ScaledMemory(self.memory.hold(), self.dtype, self.scale, self.numbers, self.part, self.face)

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.read()


def _in_blocks(region: Region, values: np.ndarray) -> Iterator[tuple[Region, np.ndarray]]:
    """The values of a region in parts of few elements, each with its own region."""
    if values.size <= _BLOCK_ELEMENTS:
        yield region, values
        return
    axis = next(axis for axis, extent in enumerate(values.shape) if extent > 1)
    rows = max(1, _BLOCK_ELEMENTS * values.shape[axis] // values.size)
    for first in range(0, values.shape[axis], rows):
        part = values[(slice(None),) * axis + (slice(first, first + rows),)]
        offset = tuple(o + (first if d == axis else 0) for d, o in enumerate(region.offset))
        yield from _in_blocks(Region(offset, part.shape), part)
