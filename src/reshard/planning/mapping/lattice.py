"""Lattices: boxes of elements that two tensors have in common, each at its own places.

A dimension that is seen as several (rows as groups of heads, experts inside a stacked matrix) is split into factors, so that every rule
is a box of factors. What two tensors have in common is then a box of plain coordinates and, for either tensor, where the element at each
coordinate lies. Nothing here knows names, files or memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import prod

from reshard.errors import UsageError
from reshard.geometry import Region

# Factors that don't fit into each other are taken element by element, up to so many lattices: more would be no plan but a list.
_MOST_PARTS = 1 << 14


@dataclass(frozen=True, slots=True)
class Face:
    """Where the elements of a lattice lie in a tensor: index d of the element at x is offset[d] + the sum of steps[i] * x[i] over the axes
    i with dims[i] == d.

    Attributes:
        shape: of the whole tensor.
        offset: of the lattice's first element, one integer per dimension of the tensor.
        dims: of each axis the tensor's dimension along which it goes.
        steps: of each axis how far it goes there, in elements of that dimension.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    dims: tuple[int, ...]
    steps: tuple[int, ...]

    def on(self, dimension: int) -> list[int]:
        """The axes along a dimension, the widest step first."""
        return sorted((i for i, d in enumerate(self.dims) if d == dimension), key=lambda i: -self.steps[i])


@dataclass(frozen=True, slots=True)
class Lattice:
    """A box of elements of two tensors.

    Attributes:
        extents: of the box.
        left: where it lies in one tensor.
        right: where it lies in the other.
    """

    extents: tuple[int, ...]
    left: Face
    right: Face

    @property
    def size(self) -> int:
        """The number of elements."""
        return prod(self.extents)

    @property
    def is_identity(self) -> bool:
        """Whether it is all of both tensors, every element at the same place."""
        return self.left == self.right and self.size == prod(self.left.shape)

    def turned(self) -> Lattice:
        """The same one with its sides exchanged."""
        return Lattice(self.extents, self.right, self.left)


def identity(shape: tuple[int, ...]) -> Lattice:
    """All of a tensor, as a lattice between it and itself."""
    axes = [d for d, extent in enumerate(shape) if extent != 1]
    face = Face(shape, (0,) * len(shape), tuple(axes), (1,) * len(axes))
    return Lattice(tuple(shape[d] for d in axes), face, face)


def clip(extents: tuple[int, ...], face: Face, region: Region) -> list[Region]:
    """The coordinates whose elements lie in a region of a face's tensor, as disjoint boxes.

    A range of a dimension that is split into k factors is at most 2k - 1 boxes of them.
    """
    choices: list[list[dict[int, tuple[int, int]]]] = []
    for d, (begin, extent) in enumerate(zip(region.offset, region.shape, strict=True)):
        axes = [(i, extents[i], face.steps[i]) for i in face.on(d)]
        found = list(_within(axes, face.offset[d], begin, begin + extent))
        if not found:
            return []
        choices.append(found)
    boxes = []
    for chosen in product(*choices):
        ranges = {i: span for part in chosen for i, span in part.items()}
        boxes.append(
            Region(tuple(ranges[i][0] for i in range(len(extents))), tuple(ranges[i][1] - ranges[i][0] for i in range(len(extents))))
        )
    return boxes


def _within(axes: Sequence[tuple[int, int, int]], at: int, begin: int, end: int) -> Iterator[dict[int, tuple[int, int]]]:
    """The ranges of axes, the widest first, whose places are in [begin, end)."""
    if not axes:
        if begin <= at < end:
            yield {}
        return
    (axis, extent, step), inner = axes[0], axes[1:]
    reach = sum((n - 1) * s for _, n, s in inner)
    first = max(0, -(-(begin - at) // step))  # the first whose inner places all are at or after the begin
    last = min(extent, (end - 1 - reach - at) // step + 1)  # the end of those whose inner places all are before the end
    if first >= last:
        # None has all of them inside.
        touching = range(max(0, -(-(begin - at - reach) // step)), min(extent, (end - 1 - at) // step + 1))
        for x in touching:
            yield from ({axis: (x, x + 1), **ranges} for ranges in _within(inner, at + x * step, begin, end))
        return
    if first > 0:
        yield from ({axis: (first - 1, first), **ranges} for ranges in _within(inner, at + (first - 1) * step, begin, end))
    yield {axis: (first, last), **{i: (0, n) for i, n, _ in inner}}
    if last < extent:
        yield from ({axis: (last, last + 1), **ranges} for ranges in _within(inner, at + last * step, begin, end))


def moved(face: Face, by: Sequence[int]) -> Face:
    """A face whose lattice begins at another coordinate."""
    offset = list(face.offset)
    for d, step, begin in zip(face.dims, face.steps, by, strict=True):
        offset[d] += step * begin
    return replace(face, offset=tuple(offset))


def part_of(lattice: Lattice, box: Region) -> Lattice:
    """The part of a lattice that a box of its coordinates is."""
    return tidied(Lattice(box.shape, moved(lattice.left, box.offset), moved(lattice.right, box.offset)))


def tidied(lattice: Lattice) -> Lattice:
    """The same elements with as few axes as can be, in the order of the right side."""
    left, right = lattice.left, lattice.right
    axes = [(n, left.dims[i], left.steps[i], right.dims[i], right.steps[i]) for i, n in enumerate(lattice.extents) if n != 1]
    axes.sort(key=lambda axis: (axis[3], -axis[4]))
    kept: list[tuple[int, int, int, int, int]] = []
    for axis in axes:
        n, ld, ls, rd, rs = axis
        if kept:
            m, ld0, ls0, rd0, rs0 = kept[-1]
            if (ld0, rd0) == (ld, rd) and ls0 == n * ls and rs0 == n * rs:
                kept[-1] = (m * n, ld, ls, rd, rs)
                continue
        kept.append(axis)
    return Lattice(
        tuple(axis[0] for axis in kept),
        Face(left.shape, left.offset, tuple(axis[1] for axis in kept), tuple(axis[2] for axis in kept)),
        Face(right.shape, right.offset, tuple(axis[3] for axis in kept), tuple(axis[4] for axis in kept)),
    )


def cut_left(lattice: Lattice, dimension: int, modulus: int) -> list[Lattice]:
    """Lattices that are together the same, of whose axes along a dimension of the left tensor none goes over a multiple of the modulus
    that isn't itself in steps of it.
    """
    face = lattice.left
    wide = next((i for i in face.on(dimension) if face.steps[i] > modulus and face.steps[i] % modulus), None)
    if wide is not None:
        return [cut for part in _unrolled(lattice, wide) for cut in cut_left(part, dimension, modulus)]
    narrow = [i for i in face.on(dimension) if face.steps[i] < modulus]
    if face.offset[dimension] % modulus + sum((lattice.extents[i] - 1) * face.steps[i] for i in narrow) < modulus:
        return [lattice]
    axis = narrow[0]
    step, extent = face.steps[axis], lattice.extents[axis]
    inner = sum((lattice.extents[i] - 1) * face.steps[i] for i in narrow[1:])
    if modulus % step:
        return [cut for part in _unrolled(lattice, axis) for cut in cut_left(part, dimension, modulus)]
    if face.offset[dimension] % step + inner >= step:
        return [cut for part in cut_left(lattice, dimension, step) for cut in cut_left(part, dimension, modulus)]
    period = modulus // step
    head = min(extent, -(face.offset[dimension] // step) % period)
    whole = (extent - head) // period * period
    parts = []
    if head:
        parts.append(_range(lattice, axis, 0, head))
    if whole:
        parts.append(_split(_range(lattice, axis, head, whole), axis, period))
    if head + whole < extent:
        parts.append(_range(lattice, axis, head + whole, extent - head - whole))
    return parts


def _range(lattice: Lattice, axis: int, begin: int, extent: int) -> Lattice:
    offset = tuple(begin if i == axis else 0 for i in range(len(lattice.extents)))
    extents = tuple(extent if i == axis else n for i, n in enumerate(lattice.extents))
    return Lattice(extents, moved(lattice.left, offset), moved(lattice.right, offset))


def _split(lattice: Lattice, axis: int, period: int) -> Lattice:
    """One axis as two: `extent / period` steps of a period, and a period."""

    def faced(face: Face) -> Face:
        dims = (*face.dims[: axis + 1], *face.dims[axis:])
        steps = (*face.steps[:axis], face.steps[axis] * period, *face.steps[axis:])
        return replace(face, dims=dims, steps=steps)

    extents = (*lattice.extents[:axis], lattice.extents[axis] // period, period, *lattice.extents[axis + 1 :])
    return Lattice(extents, faced(lattice.left), faced(lattice.right))


def _unrolled(lattice: Lattice, axis: int) -> list[Lattice]:
    """One lattice for each place of an axis."""
    if lattice.extents[axis] > _MOST_PARTS:
        raise UsageError(
            "rules cut a dimension in ways that don't fit into each other",
            found=f"a tensor of shape {list(lattice.left.shape)}, {lattice.extents[axis]} places apart",
            fix="use group sizes of which one divides the other",
        )

    def without(face: Face) -> Face:
        return replace(face, dims=face.dims[:axis] + face.dims[axis + 1 :], steps=face.steps[:axis] + face.steps[axis + 1 :])

    extents = lattice.extents[:axis] + lattice.extents[axis + 1 :]
    parts = [_range(lattice, axis, x, 1) for x in range(lattice.extents[axis])]
    return [Lattice(extents, without(part.left), without(part.right)) for part in parts]


def join(one: Lattice, other: Lattice) -> list[Lattice]:
    """What the left tensors of two lattices have in common through their right ones, which are the same tensor.

    Returns:
        Lattices between the left tensor of the first and the left tensor of the other.
    """
    ones, others = [one.turned()], [other.turned()]
    chains: list[list[int]] = []
    for d in range(len(one.right.shape)):
        moduli = _moduli(ones, d) | _moduli(others, d)
        if not _is_chain(moduli):
            ones = [part for lattice in ones for part in _fully_unrolled(lattice, d)]
            moduli = _moduli(others, d)
        chain = sorted(moduli | {1})
        for modulus in chain[1:]:
            ones = [cut for lattice in ones for cut in cut_left(lattice, d, modulus)]
            others = [cut for lattice in others for cut in cut_left(lattice, d, modulus)]
        chains.append(chain)
    return [common for a in ones for b in others if (common := _common(a, b, chains)) is not None]


def _moduli(lattices: Sequence[Lattice], dimension: int) -> set[int]:
    return {face.steps[i] for face in (lattice.left for lattice in lattices) for i in face.on(dimension)}


def _is_chain(moduli: set[int]) -> bool:
    ordered = sorted(moduli)
    return all(b % a == 0 for a, b in pairwise(ordered))


def _fully_unrolled(lattice: Lattice, dimension: int) -> list[Lattice]:
    axes = lattice.left.on(dimension)
    if not axes:
        return [lattice]
    return [part for some in _unrolled(lattice, axes[0]) for part in _fully_unrolled(some, dimension)]


def _common(one: Lattice, other: Lattice, chains: Sequence[Sequence[int]]) -> Lattice | None:
    """The common part of two lattices whose left tensor is the same and cut at the same moduli, between their right tensors."""
    extents: list[int] = []
    axes: list[tuple[int | None, int | None]] = []  # of either
    starts: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for d, chain in enumerate(chains):
        for level, step in enumerate(chain):
            period = chain[level + 1] // step if level + 1 < len(chain) else None
            spans = []
            for lattice in (one, other):
                face = lattice.left
                digit = face.offset[d] // step
                axis = next((i for i in face.on(d) if face.steps[i] == step), None)
                digit = digit if period is None else digit % period
                spans.append((digit, digit + (1 if axis is None else lattice.extents[axis]), axis))
            begin, end = max(spans[0][0], spans[1][0]), min(spans[0][1], spans[1][1])
            if end <= begin:
                return None
            for start, span in zip(starts, spans, strict=True):
                if span[2] is not None:
                    start[span[2]] = begin - span[0]
            if end - begin > 1:
                extents.append(end - begin)
                axes.append((spans[0][2], spans[1][2]))

    def faced(lattice: Lattice, which: int) -> Face:
        start = [starts[which].get(i, 0) for i in range(len(lattice.extents))]
        face = moved(lattice.right, start)
        chosen = [pair[which] for pair in axes]
        dims, steps = zip(*((face.dims[i], face.steps[i]) for i in chosen if i is not None), strict=True) if chosen else ((), ())
        return Face(face.shape, face.offset, tuple(dims), tuple(steps))

    return tidied(Lattice(tuple(extents), faced(one, 0), faced(other, 1)))
