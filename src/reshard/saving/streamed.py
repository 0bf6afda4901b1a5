"""Values that are not in memory when a save begins: read part by part while they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from reshard.errors import UsageError
from reshard.format.safetensors import StreamedArray
from reshard.geometry import DType, Region


@dataclass(frozen=True)
class StreamedMemory:
    """A whole tensor as the memory of a shard, that a save reads once.

    Attributes:
        dtype: its element type.
        shape: its shape.
        source: gives the values of a region of it.
        part_bytes: how much is read at a time; a tensor up to this size is read whole.
    """

    dtype: DType
    shape: tuple[int, ...]
    source: Callable[[Region], np.ndarray]
    part_bytes: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)

    @property
    def host(self) -> np.ndarray | None:
        return None

    @property
    def address(self) -> int | None:
        return None

    def read(self) -> np.ndarray:
        return self.source(Region.whole(self.shape))

    def write(self, region: Region, values: np.ndarray) -> None:
        raise UsageError("a stored tensor is not written to")

    def hold(self) -> StreamedMemory:
        return self

    def begin_copy(self, target: np.ndarray) -> None:
        target[...] = self.read()

    def stream(self) -> np.ndarray | StreamedArray:
        """The values for a file: an array where they are small, else part by part."""
        whole = Region.whole(self.shape)
        if self.dtype.itemsize * whole.size <= self.part_bytes:
            return self.read()
        return StreamedArray(self.dtype.numpy, self.shape, lambda: map(self.source, self._parts(whole)))

    def _parts(self, region: Region) -> Iterator[Region]:
        """Regions in the order of the bytes, each of about `part_bytes` at most, or of one element."""
        dimension = next((d for d, extent in enumerate(region.shape) if extent > 1), None)
        if dimension is None:
            yield region
            return
        row = self.dtype.itemsize * region.size // region.shape[dimension]
        rows = self.part_bytes // row
        begin, end = region.offset[dimension], region.end[dimension]
        for first in range(begin, end, max(rows, 1)):
            count = min(max(rows, 1), end - first)
            offset = (*region.offset[:dimension], first, *region.offset[dimension + 1 :])
            part = Region(offset, (*region.shape[:dimension], count, *region.shape[dimension + 1 :]))
            if rows:
                yield part
            else:
                yield from self._parts(part)
