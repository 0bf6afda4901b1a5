"""Values of one floating type become values of another, on their way from a file into memory."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from reshard.geometry import DType, Region
from reshard.state import Memory

# The types between which a cast is a rounding of numbers. A cast of integers, truth values or complex numbers changes what they mean.
_FLOATING = frozenset({"float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64"})

# A cast makes an array of so many elements at a time, at most: few enough for a core's own cache, whatever the size of the tensor.
_BLOCK_ELEMENTS = 256 << 10

_E4M3_MAX = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


def can_cast(stored: str, wanted: str) -> bool:
    """Whether a load can convert one type into the other, by their names: both are floating types."""
    return stored in _FLOATING and wanted in _FLOATING


def cast_values(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Values in another floating type, as torch's `.to()` makes them.

    Rounding is to the nearest, ties to even. What is beyond the range of the new type becomes infinite, but in float8_e4m3fn, which has
    no infinity, the largest number. A NaN stays one; its payload may not.

    Args:
        values: of any shape and strides.
        dtype: the new type.
    """
    target = dtype.numpy
    with np.errstate(all="ignore"):
        if values.dtype != np.float32 and target not in (np.float32, np.float64):
            # As torch does. It matters for float64, which is rounded twice on its way to two bytes.
            values = values.astype(np.float32)
        if target == ml_dtypes.float8_e4m3fn:
            values = np.clip(values, -_E4M3_MAX, _E4M3_MAX)
        return values.astype(target)


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
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    def read(self) -> np.ndarray:
        return cast_values(self.memory.read(), self.stored)

    def write(self, region: Region, values: np.ndarray) -> None:
        if values.size <= _BLOCK_ELEMENTS:
            self.memory.write(region, cast_values(values, self.dtype))
            return
        axis = next(axis for axis, extent in enumerate(values.shape) if extent > 1)
        rows = max(1, _BLOCK_ELEMENTS * values.shape[axis] // values.size)
        for first in range(0, values.shape[axis], rows):
            part = values[(slice(None),) * axis + (slice(first, first + rows),)]
            offset = tuple(o + (first if d == axis else 0) for d, o in enumerate(region.offset))
            self.write(Region(offset, part.shape), part)

    def hold(self) -> Memory:
        return CastMemory(self.memory.hold(), self.stored, self.dtype)

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.read()
