"""Whether regions make up a whole."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reshard.geometry.region import Region


def cover_fault(regions: Sequence[Region], global_shape: tuple[int, ...]) -> str | None:
    """What keeps regions from covering a tensor exactly once; None when nothing does.

    Args:
        regions: of a tensor of this shape; empty ones hold nothing and don't matter.
        global_shape: the shape of the tensor.
    """
    for region in regions:
        if not region.fits(global_shape):
            return f"the region at {list(region.offset)} of shape {list(region.shape)} lies outside the tensor"
    overlap = find_overlap(regions)
    if overlap is not None:
        a, b = overlap
        return f"the regions at {list(a.offset)} and {list(b.offset)}, of shapes {list(a.shape)} and {list(b.shape)}, overlap"
    covered, size = sum(region.size for region in regions), math.prod(global_shape)
    if covered != size:
        return f"the regions hold {covered} of {size} elements"
    return None


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
