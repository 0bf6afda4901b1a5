"""Elements of a tensor that lie in lattices, as few plain boxes of it: what a rank holds whole can be stored as one chunk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

from reshard.geometry import Region
from reshard.planning.mapping.lattice import Face, Lattice, cut_left

# Of each factor of each dimension, the widest first: begin and end.
_Digits = tuple[tuple[int, int], ...]


def boxes_of(parts: Sequence[tuple[tuple[int, ...], Face]], shape: tuple[int, ...]) -> list[Region]:
    """The boxes that disjoint parts of a tensor make, in the order of their first elements.

    Args:
        parts: extents and faces, each in this tensor.
        shape: of the tensor.
    """
    chains = [sorted({1} | {face.steps[i] for _, face in parts for i in face.on(d)}) for d in range(len(shape))]
    found: list[_Digits] = []
    for extents, face in parts:
        cuts = [Lattice(extents, face, face)]
        for d, chain in enumerate(chains):
            for modulus in chain[1:]:
                cuts = [cut for lattice in cuts for cut in cut_left(lattice, d, modulus)]
        found += [_digits(cut, chains) for cut in cuts]
    merged = _merged(found)
    boxes = [box for digits in merged for box in _plain(digits, chains, shape)]
    return sorted(boxes, key=lambda box: box.offset)


def _digits(lattice: Lattice, chains: Sequence[Sequence[int]]) -> _Digits:
    digits = []
    for d, chain in enumerate(chains):
        for level in reversed(range(len(chain))):
            step = chain[level]
            begin = lattice.left.offset[d] // step
            if level + 1 < len(chain):
                begin %= chain[level + 1] // step
            axis = next((i for i in lattice.left.on(d) if lattice.left.steps[i] == step), None)
            digits.append((begin, begin + (1 if axis is None else lattice.extents[axis])))
    return tuple(digits)


def _merged(boxes: Sequence[_Digits]) -> list[_Digits]:
    """Neighbours of the same cross-section as one, along every dimension, until none are left."""
    current = list(boxes)
    while True:
        before = len(current)
        for d in reversed(range(len(current[0]) if current else 0)):
            current.sort(key=lambda box: (box[:d], box[d + 1 :], box[d]))
            merged: list[_Digits] = []
            for box in current:
                last = merged[-1] if merged else None
                if last is not None and last[:d] == box[:d] and last[d + 1 :] == box[d + 1 :] and last[d][1] == box[d][0]:
                    merged[-1] = (*box[:d], (last[d][0], box[d][1]), *box[d + 1 :])
                else:
                    merged.append(box)
            current = merged
        if len(current) == before:
            return current


def _plain(digits: _Digits, chains: Sequence[Sequence[int]], shape: tuple[int, ...]) -> list[Region]:
    """A box of factors as boxes of the tensor: one, if of each dimension the factors inside a range are whole."""
    ranges: list[list[tuple[int, int]]] = []
    at = 0
    for chain, extent in zip(chains, shape, strict=True):
        own = digits[at : at + len(chain)]
        at += len(chain)
        steps = list(reversed(chain))
        wholes = [extent, *(wide // step for wide, step in pairwise(steps))]
        # From the innermost on, as long as a factor is whole, the one around it is a range.
        level = len(own) - 1
        while level > 0 and own[level] == (0, wholes[level]):
            level -= 1
        begin, end = own[level]
        outer = [range(first, last) for first, last in own[:level]]
        ranges.append(
            [
                (base + begin * steps[level], base + end * steps[level])
                for place in product(*outer)
                for base in [sum(x * step for x, step in zip(place, steps[:level], strict=True))]
            ]
        )
    return [_region(box) for box in product(*ranges)]


def _region(box: Sequence[tuple[int, int]]) -> Region:
    return Region(tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
