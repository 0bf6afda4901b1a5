"""Many regions of one tensor at once, as arrays: what a loop over regions is too slow for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reshard.geometry.region import Region


@dataclass(frozen=True, eq=False, slots=True)
class Boxes:
    """Regions of one tensor.

    Attributes:
        offsets: int64, of shape (dimensions, regions): where each begins.
        shapes: int64, of the same shape: how far each extends.
    """

    offsets: np.ndarray
    shapes: np.ndarray

    @classmethod
    def of(cls, regions: Sequence[Region], dimensions: int) -> Boxes:
        """These regions, in their order."""
        numbers = np.array([(region.offset, region.shape) for region in regions], np.int64).reshape(len(regions), 2, dimensions)
        return cls(np.ascontiguousarray(numbers[:, 0].T), np.ascontiguousarray(numbers[:, 1].T))

    def __len__(self) -> int:
        return self.offsets.shape[1]

    def __getitem__(self, index: int) -> Region:
        return Region(tuple(self.offsets[:, index].tolist()), tuple(self.shapes[:, index].tolist()))

    def take(self, indices: np.ndarray | slice) -> Boxes:
        """Some of them."""
        return Boxes(self.offsets[:, indices], self.shapes[:, indices])

    def regions(self) -> list[Region]:
        """All of them."""
        return [Region(tuple(offset), tuple(shape)) for offset, shape in zip(self.offsets.T.tolist(), self.shapes.T.tolist(), strict=True)]

    def touching(self, region: Region) -> np.ndarray:
        """The indices, ascending, of those that share an element with a region of as many dimensions."""
        if region.is_empty:
            return np.empty(0, np.intp)
        found = np.ones(len(self), bool)
        for offsets, shapes, begin, end in zip(self.offsets, self.shapes, region.offset, region.end, strict=True):
            # An extent of nothing touches nothing, also where it lies inside the region.
            found &= (offsets < end) & (offsets + shapes > begin) & (shapes > 0)
        return np.flatnonzero(found)
