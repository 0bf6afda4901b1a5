"""A region: a box inside a global tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from reshard.errors import LayoutError


@dataclass(frozen=True, slots=True)
class Region:
    """A box inside a global tensor.

    Attributes:
        offset: where it begins, one integer per dimension, in elements.
        shape: how far it extends, one integer per dimension, in elements. A zero makes the region empty.

    A 0-d tensor has one region, `Region((), ())`, of size 1.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.shape):
            raise LayoutError(
                "a region needs one offset and one extent per dimension",
                found=f"offset {self.offset}, shape {self.shape}",
            )
        if min(0, 0, *self.offset, *self.shape) < 0:
            raise LayoutError("a region has no negative numbers", found=f"offset {self.offset}, shape {self.shape}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Region:
        """The region that covers a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether it holds no element."""
        return 0 in self.shape

    @property
    def end(self) -> tuple[int, ...]:
        """Where it ends, exclusive, one integer per dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index into an array of the global tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def fits(self, global_shape: tuple[int, ...]) -> bool:
        """Whether it lies inside a tensor of this shape."""
        return len(self.shape) == len(global_shape) and all(e <= g for e, g in zip(self.end, global_shape, strict=True))

    def contains(self, other: Region) -> bool:
        """Whether every element of `other` is in this region."""
        return other.is_empty or self.intersect(other) == other

    def intersect(self, other: Region) -> Region | None:
        """What both have, or None when they share no element.

        Raises:
            LayoutError: they don't have the same number of dimensions.
        """
        if len(self.shape) != len(other.shape):
            raise LayoutError(
                "regions of different numbers of dimensions don't intersect",
                found=f"{len(self.shape)} and {len(other.shape)}",
            )
        offset, shape = [], []
        for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True):
            begin = max(a, b)
            end = min(a + n, b + m)
            if end <= begin:
                return None
            offset.append(begin)
            shape.append(end - begin)
        return Region(tuple(offset), tuple(shape))

    def relative_to(self, outer: Region) -> Region:
        """The same box in the coordinates of `outer`, which contains it."""
        return Region(tuple(a - b for a, b in zip(self.offset, outer.offset, strict=True)), self.shape)


def strides_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The strides in bytes of a C-ordered array."""
    strides, step = [], itemsize
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))
