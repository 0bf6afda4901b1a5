"""Whether regions make up a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

from reshard.geometry.boxes import Boxes
from reshard.geometry.region import Region

# From so many regions on arrays are faster than a loop.
_MANY = 32

# A box has 2**dimensions corners; tensors of more dimensions are looked at one by one.
_MOST_DIMENSIONS = 6

# Corners of all tensors are numbered in one int64, whose last bit is a sign.
_MOST_CORNERS = 2.0**61


def cover_fault(regions: Sequence[Region], global_shape: tuple[int, ...]) -> str | None:
    """What keeps regions from covering a tensor exactly once; None when nothing does.

    Args:
        regions: of a tensor of this shape; empty ones hold nothing and don't matter.
        global_shape: the shape of the tensor.
    """
    for region in regions:
        if not region.fits(global_shape):
            return f"the region at {list(region.offset)} of shape {list(region.shape)} lies outside the tensor"
    if len(regions) >= _MANY:
        boxes = Boxes.of(regions, len(global_shape))
        if find_covered(boxes, np.zeros(len(regions), np.intp), np.array([global_shape], np.int64).T).all():
            return None
    overlap = find_overlap(regions)
    if overlap is not None:
        a, b = overlap
        return f"the regions at {list(a.offset)} and {list(b.offset)}, of shapes {list(a.shape)} and {list(b.shape)}, overlap"
    covered, size = sum(region.size for region in regions), math.prod(global_shape)
    if covered != size:
        return f"the regions hold {covered} of {size} elements"
    return None


def find_covered(boxes: Boxes, owners: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Which of many tensors their regions cover exactly once.

    A function that is constant on a box and zero elsewhere is the sum over the box's corners of ± the function that is one from that corner
    on in every dimension, and such sums are the same function only if they are the same corner by corner. So regions cover a tensor exactly
    once just when their corners, with their signs, add up to the corners of the whole.

    Args:
        boxes: the regions of all the tensors.
        owners: the tensor of each region, as an index.
        wholes: int64, of shape (dimensions, tensors): the tensors' shapes.

    Returns:
        A bool per tensor.
    """
    dimensions, tensors = wholes.shape
    if dimensions > _MOST_DIMENSIONS or np.prod(wholes + 1.0, axis=0).sum() > _MOST_CORNERS:
        regions = boxes.regions()
        by_tensor: list[list[Region]] = [[] for _ in range(tensors)]
        for region, owner in zip(regions, owners.tolist(), strict=True):
            by_tensor[owner].append(region)
        return np.array([_is_covered(found, tuple(whole)) for found, whole in zip(by_tensor, wholes.T.tolist(), strict=True)], bool)
    offsets, shapes, outer = boxes.offsets, boxes.shapes, wholes[:, owners]
    fits = ((offsets >= 0) & (shapes >= 0) & (offsets <= outer) & (shapes <= outer - offsets)).all(axis=0)
    covered = np.ones(tensors, bool)
    covered[owners[~fits]] = False
    # The whole is one more box, with the signs turned round: where all is well everything cancels out.
    places = np.prod(wholes + 1, axis=0)
    first = np.cumsum(places) - places
    own = np.concatenate([owners[fits], np.arange(tensors)])
    begins = np.concatenate([offsets[:, fits], np.zeros_like(wholes)], axis=1)
    ends = np.concatenate([(offsets + shapes)[:, fits], wholes], axis=1)
    turned = np.arange(len(own)) >= np.count_nonzero(fits)
    corners = []
    for corner in product((False, True), repeat=dimensions):
        number = np.zeros(len(own), np.int64)
        for d, at_end in enumerate(corner):
            number = number * (wholes[d, own] + 1) + (ends if at_end else begins)[d]
        corners.append((number + first[own]) * 2 + (turned ^ bool(sum(corner) % 2)))
    found = np.sort(np.concatenate(corners))
    groups = np.flatnonzero(np.diff(found >> 1, prepend=-1))
    totals = np.add.reduceat(1 - 2 * (found & 1), groups)
    wrong = found[groups[totals != 0]] >> 1
    covered[np.searchsorted(first, wrong, side="right") - 1] = False
    return covered


def _is_covered(regions: Sequence[Region], global_shape: tuple[int, ...]) -> bool:
    return cover_fault(regions, global_shape) is None


def find_overlap(regions: Sequence[Region]) -> tuple[Region, Region] | None:
    """Two regions of one tensor that share an element, or None."""
    left = [region for region in regions if not region.is_empty]
    if len(left) < 2 or not left[0].shape:
        return (left[0], left[1]) if len(left) > 1 else None
    # A sweep along the dimension with the most beginnings: only what still lies under it can overlap. Real splits leave few there.
    dimension = max(range(len(left[0].shape)), key=lambda d: len({region.offset[d] for region in left}))
    left.sort(key=lambda region: region.offset[dimension])
    active: list[Region] = []
    for region in left:
        begin = region.offset[dimension]
        active = [other for other in active if other.end[dimension] > begin]
        for other in active:
            if region.intersect(other) is not None:
                return other, region
        active.append(region)
    return None
