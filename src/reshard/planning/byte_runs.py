"""From a region of a stored tensor to byte ranges of its file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from reshard.geometry import Region
from reshard.geometry.region import strides_of


@dataclass(frozen=True, slots=True)
class Block:
    """A box of a stored tensor together with the byte run that covers it.

    Attributes:
        region: the box, in the stored tensor's own coordinates.
        offset: where the run begins, in bytes from the first byte of the stored tensor.
        nbytes: the length of the run; more than the box's own bytes when the box isn't contiguous.
    """

    region: Region
    offset: int
    nbytes: int


def is_one_run(extents: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether a box of these extents is contiguous in a C-ordered array: whole from some dimension on, a single index before it."""
    inner_is_whole = True
    for extent, size in zip(reversed(extents), reversed(whole), strict=True):
        if not inner_is_whole and extent != 1:
            return False
        inner_is_whole = inner_is_whole and extent == size
    return True


def run_offset(box: Region, shape: tuple[int, ...], itemsize: int) -> int | None:
    """Where a box begins in a C-ordered array, in bytes from its first one; None when it isn't one run of bytes there."""
    if not is_one_run(box.shape, shape):
        return None
    return sum(offset * stride for offset, stride in zip(box.offset, strides_of(shape, itemsize), strict=True))


def row_places(box: Region, shape: tuple[int, ...], itemsize: int) -> tuple[int, np.ndarray]:
    """A box of a C-ordered array as runs of bytes: how long each is, and where each begins, from the array's first byte.

    They are in the box's own order, and all of one length: the dimensions that the box has whole, and the one before them, are one run.
    """
    return run_places(box, strides_of(shape, itemsize), itemsize)


def run_places(box: Region, strides: tuple[int, ...], itemsize: int) -> tuple[int, np.ndarray]:
    """The same as `row_places` for a box of other strides, in bytes. Where a run begins is counted from where the coordinate 0 lies."""
    run, outer = _innermost(box.shape, strides, itemsize)
    places = np.zeros(1, np.int64)
    for offset, extent, stride in zip(box.offset[:outer], box.shape[:outer], strides[:outer], strict=True):
        places = (places[:, None] + (offset + np.arange(extent)) * stride).reshape(-1)
    return run, places + sum(offset * stride for offset, stride in zip(box.offset[outer:], strides[outer:], strict=True))


def run_bytes(extents: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """How long the runs of bytes are of which a box of these strides consists."""
    return _innermost(extents, strides, itemsize)[0]


def _innermost(extents: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The bytes of a run, and how many dimensions lie outside of it."""
    run, outer = itemsize, len(extents)
    while outer and (extents[outer - 1] == 1 or strides[outer - 1] == run):
        outer -= 1
        run *= extents[outer]
    return run, outer


def plan_blocks(shape: tuple[int, ...], region: Region, itemsize: int, *, block_bytes: int, gap_bytes: int) -> Iterator[Block]:
    """Cut a region into boxes, each covered by one byte run.

    The boxes are disjoint, in file order, and together are the region. A run crosses no gap of more than `gap_bytes` between needed bytes,
    and is at most `block_bytes` long (or one element).

    Args:
        shape: the shape of the stored tensor, in C order.
        region: the box that is needed, in the stored tensor's own coordinates.
        itemsize: bytes per element.
        block_bytes: the longest run.
        gap_bytes: the widest gap that is read over.
    """
    yield from cut_box(region, strides_of(shape, itemsize), itemsize, block_bytes=block_bytes, gap_bytes=gap_bytes)


def cut_box(region: Region, strides: tuple[int, ...], itemsize: int, *, block_bytes: int, gap_bytes: int) -> Iterator[Block]:
    """The same as `plan_blocks` for a box of other strides, in bytes: descending, as the file is read.

    Offsets count from where the coordinate 0 of the box lies.
    """
    if not region.is_empty:
        yield from _cut(region, strides, itemsize, block_bytes, gap_bytes)


def bytes_of_pages(begin: int, extents: tuple[int, ...], strides: tuple[int, ...], itemsize: int, page_bytes: int) -> int:
    """The bytes of the whole pages of a file on which a box lies.

    Args:
        begin: where its first element begins in the file.
        extents: of the box; not empty.
        strides: in bytes, descending.
        itemsize: bytes per element.
        page_bytes: of a page.
    """
    if _widest_gap(extents, strides, itemsize) < page_bytes:  # no page lies in a gap
        begins = np.array([begin])
        run = _cover(extents, strides, itemsize)
    else:
        is_row = bool(extents) and strides[-1] == itemsize
        run = itemsize * extents[-1] if is_row else itemsize
        begins = np.array([begin])
        outer = len(extents) - is_row
        for extent, stride in zip(extents[:outer], strides[:outer], strict=True):
            begins = (begins[:, None] + stride * np.arange(extent)).reshape(-1)
    first, last = begins // page_bytes, (begins + run - 1) // page_bytes
    return page_bytes * int((last - first + 1).sum() - (first[1:] == last[:-1]).sum())


def is_dense(extents: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether a box of these strides, descending ones, is one run of bytes."""
    return _cover(extents, strides, itemsize) == itemsize * prod(extents)


def _cover(extents: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    return sum((n - 1) * stride for n, stride in zip(extents, strides, strict=True)) + itemsize


def _widest_gap(extents: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    widest = 0
    for d, n in enumerate(extents):
        if n > 1:
            widest = max(widest, strides[d] - _cover(extents[d + 1 :], strides[d + 1 :], itemsize))
    return widest


def _cut(region: Region, strides: tuple[int, ...], itemsize: int, block_bytes: int, gap_bytes: int) -> Iterator[Block]:
    extents = region.shape
    cover = _cover(extents, strides, itemsize)
    if (cover <= block_bytes and _widest_gap(extents, strides, itemsize) <= gap_bytes) or region.size == 1:
        offset = sum(o * stride for o, stride in zip(region.offset, strides, strict=True))
        yield Block(region, offset, cover)
        return
    d = next(i for i, n in enumerate(extents) if n > 1)
    inner = _cover(extents[d + 1 :], strides[d + 1 :], itemsize)
    crossable = strides[d] - inner <= gap_bytes and _widest_gap(extents[d + 1 :], strides[d + 1 :], itemsize) <= gap_bytes
    step = max(1, (block_bytes - inner) // strides[d] + 1) if crossable else 1
    for first in range(0, extents[d], step):
        count = min(step, extents[d] - first)
        offset = (*region.offset[:d], region.offset[d] + first, *region.offset[d + 1 :])
        piece = Region(offset, (*extents[:d], count, *extents[d + 1 :]))
        yield from _cut(piece, strides, itemsize, block_bytes, gap_bytes)
