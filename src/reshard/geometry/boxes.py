"""Many regions of one tensor at once, as arrays: what a loop over regions is too slow for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reshard.geometry.region import Region

# Pairs that are looked at together: a few arrays of so many numbers.
_PAIRS = 1 << 18

# So few are compared each with each: it takes less time than to find the candidates.
_FEW_PAIRS = 1 << 10


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

    def touching_pairs(self, others: Boxes) -> tuple[np.ndarray, np.ndarray]:
        """Which of these share an element with which of the others: two arrays of indices, ascending by the first, then by the second."""
        dimensions = len(self.offsets)
        if dimensions == 0 or not len(others):
            every = np.indices((len(self), len(others))).reshape(2, -1)
            return every[0], every[1]
        if len(self) * len(others) <= _FEW_PAIRS:
            begins = np.maximum(self.offsets[:, :, None], others.offsets[:, None, :])
            ends = np.minimum((self.offsets + self.shapes)[:, :, None], (others.offsets + others.shapes)[:, None, :])
            mine, theirs = np.nonzero((begins < ends).all(axis=0))
            return mine, theirs
        # Along the dimension with the most beginnings few of the others are candidates for each of these.
        d = max(range(dimensions), key=lambda d: len(np.unique(others.offsets[d])))
        order = np.argsort(others.offsets[d], kind="stable")
        begins = others.offsets[d][order]
        first = np.searchsorted(begins, self.offsets[d] - others.shapes[d].max(), side="right")
        last = np.maximum(first, np.searchsorted(begins, self.offsets[d] + self.shapes[d], side="left"))
        ends = np.cumsum(last - first)
        found: list[tuple[np.ndarray, np.ndarray]] = []
        begin = done = 0
        while begin < len(self):
            end = max(begin + 1, int(np.searchsorted(ends, done + _PAIRS, side="right")))
            own = np.repeat(np.arange(begin, end), (last - first)[begin:end])
            theirs = order[
                np.arange(len(own)) + np.repeat(first[begin:end] - (ends - last + first)[begin:end] + done, (last - first)[begin:end])
            ]
            lower = np.maximum(self.offsets[:, own], others.offsets[:, theirs])
            upper = np.minimum((self.offsets + self.shapes)[:, own], (others.offsets + others.shapes)[:, theirs])
            kept = (lower < upper).all(axis=0)
            found.append((own[kept], theirs[kept]))
            begin, done = end, int(ends[end - 1])
        mine, theirs = (np.concatenate(arrays) for arrays in zip(*found, strict=True)) if found else (np.empty(0, np.intp),) * 2
        by_pair = np.lexsort((theirs, mine))
        return mine[by_pair], theirs[by_pair]
