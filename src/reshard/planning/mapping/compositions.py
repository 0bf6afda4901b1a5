"""Compositions: a tensor as the lattices that it has in common with the tensors of which it is made, and what rules do with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from reshard.geometry import Region
from reshard.planning.mapping.lattice import Face, Lattice, cut_left, tidied

Shape: TypeAlias = tuple[int, ...]

LeafKey: TypeAlias = tuple[str, tuple[tuple[str, int], ...]]
"""A leaf: the pattern of its name, and its number in each stack that it is in."""


@dataclass(frozen=True)
class Fill:
    """A value that a rule declares for elements of which no tensor has any."""

    value: float


@dataclass(frozen=True)
class Composition:
    """How a tensor is made of others.

    Attributes:
        shape: of the tensor.
        parts: what it has of each leaf, or of a value: the tensor on the left, the leaf on the right.
    """

    shape: Shape
    parts: tuple[tuple[LeafKey | Fill, Lattice], ...]

    def placed(self, shape: Shape, lattices: Sequence[Lattice]) -> Composition:
        """The same parts at other places of a tensor of another shape."""
        return Composition(shape, tuple((leaf, lattice) for (leaf, _), lattice in zip(self.parts, lattices, strict=True)))


def replaced(shape: Shape, axis: int, extent: int) -> Shape:
    """A shape with another extent along one axis."""
    return (*shape[:axis], extent, *shape[axis + 1 :])


def with_range(shape: Shape, axis: int, begin: int, extent: int) -> Region:
    """A range along one axis of a tensor, whole along all others."""
    return Region(tuple(begin if d == axis else 0 for d in range(len(shape))), replaced(shape, axis, extent))


def concatenate(made: Sequence[Composition], axis: int) -> Composition:
    """One after the other along an axis."""
    total = replaced(made[0].shape, axis, sum(one.shape[axis] for one in made))
    parts = []
    at = 0
    for one in made:
        for leaf, lattice in one.parts:
            face = lattice.left
            offset = face.offset if not at else (*face.offset[:axis], face.offset[axis] + at, *face.offset[axis + 1 :])
            parts.append((leaf, replace(lattice, left=Face(total, offset, face.dims, face.steps))))
        at += one.shape[axis]
    return Composition(total, tuple(parts))


def with_axis(one: Composition, axis: int) -> Composition:
    """With a dimension of one place more."""
    shape = (*one.shape[:axis], 1, *one.shape[axis:])

    def faced(face: Face) -> Face:
        return Face(shape, (*face.offset[:axis], 0, *face.offset[axis:]), tuple(d + (d >= axis) for d in face.dims), face.steps)

    return one.placed(shape, [replace(lattice, left=faced(lattice.left)) for _, lattice in one.parts])


def merge(one: Composition, axis: int) -> Composition:
    """A dimension and the one after it as one."""
    inner = one.shape[axis + 1]
    shape = (*one.shape[:axis], one.shape[axis] * inner, *one.shape[axis + 2 :])

    def faced(face: Face) -> Face:
        offset = (*face.offset[:axis], face.offset[axis] * inner + face.offset[axis + 1], *face.offset[axis + 2 :])
        steps = tuple(step * inner if d == axis else step for d, step in zip(face.dims, face.steps, strict=True))
        return Face(shape, offset, tuple(d - (d > axis) for d in face.dims), steps)

    return one.placed(shape, [tidied(replace(lattice, left=faced(lattice.left))) for _, lattice in one.parts])


def split(one: Composition, axis: int, inner: int) -> Composition:
    """A dimension as two, the second one of so many places."""
    shape = (*one.shape[:axis], one.shape[axis] // inner, inner, *one.shape[axis + 1 :])

    def faced(face: Face) -> Face:
        outer, rest = divmod(face.offset[axis], inner)
        offset = (*face.offset[:axis], outer, rest, *face.offset[axis + 1 :])
        dims = tuple(d + (d > axis or (d == axis and step < inner)) for d, step in zip(face.dims, face.steps, strict=True))
        steps = tuple(step // inner if d == axis and step >= inner else step for d, step in zip(face.dims, face.steps, strict=True))
        return Face(shape, offset, dims, steps)

    parts = []
    for leaf, lattice in one.parts:
        parts += [(leaf, replace(cut, left=faced(cut.left))) for cut in cut_left(lattice, axis, inner)]
    return Composition(shape, tuple(parts))
