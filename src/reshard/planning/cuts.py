"""Where chunks are cut, so that each part of them has one reader: at wants' edges, but through no row block of which all is wanted."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from reshard.format.row_blocks import RowBlocks, row_blocks_of
from reshard.geometry import Region
from reshard.geometry.boxes import Boxes
from reshard.geometry.cover import find_overlap


class Cut(NamedTuple):
    """A box of a chunk.

    Attributes:
        piece: the index of the chunk.
        box: in the chunk's own coordinates.
        size: its elements.
        dimension: along which it can be cut further; None when it can't.
        rows: it can be cut at multiples of so many, counted from the chunk's first row along this dimension.
        wants: the indices of the regions that want any of it.
        nearest: those of them that want most of it.
    """

    piece: int
    box: Region
    size: int
    dimension: int | None
    rows: int
    wants: tuple[int, ...]
    nearest: tuple[int, ...]


def cut_chunks(pieces: Boxes, regions: Boxes, itemsize: int, blocks: Sequence[RowBlocks] | None = None) -> Iterator[Cut]:
    """What is wanted of each chunk, in disjoint boxes, chunk after chunk.

    Args:
        pieces: the chunks of a tensor.
        regions: the regions that are wanted of it.
        itemsize: bytes of an element.
        blocks: of each chunk the row blocks; None when they are those of its own shape.
    """
    touched, touching = pieces.touching_pairs(regions)
    begins = np.flatnonzero(np.diff(touched, prepend=-1)).tolist()
    wanted = regions.regions()
    for begin, end in pairwise([*begins, len(touched)]):
        number = int(touched[begin])
        piece = pieces[number]
        own = row_blocks_of(piece.shape, itemsize) if blocks is None else blocks[number]
        for part in _parts(piece, own, [(wanted[index], index) for index in touching[begin:end].tolist()]):
            yield Cut(number, part.box.relative_to(piece), part.box.size, part.dimension, part.rows, part.wants, part.nearest)


class _Part(NamedTuple):
    """What a cut is, in the tensor's coordinates; `Cut` says what it has."""

    box: Region
    dimension: int | None
    rows: int
    wants: tuple[int, ...]
    nearest: tuple[int, ...]


def _parts(piece: Region, blocks: RowBlocks, wants: Sequence[tuple[Region, int]]) -> Iterator[_Part]:
    """Disjoint boxes of a chunk that are together what is wanted of it, each with the numbers of those regions that want any of it.

    They are cut along their outermost dimension wherever another region begins or ends, or rather at the border of a row block that is
    nearest to that.
    """
    if len(wants) == 1 and wants[0][0].contains(piece):
        yield _Part(piece, blocks.dimension, blocks.rows, (wants[0][1],), (wants[0][1],))
        return
    commons = [(common, number) for region, number in wants if (common := region.intersect(piece)) is not None]
    for whole in _union(piece, [common for common, _ in commons]):
        d, rows = _cuttable(whole, piece, blocks)
        inside = [(part, number) for common, number in commons if (part := common.intersect(whole)) is not None]
        if d is None:
            numbers = tuple(number for _, number in inside)
            yield _Part(whole, None, 1, numbers, numbers)
            continue
        edges = {edge for part, _ in inside for edge in (part.offset[d], part.end[d])}
        borders = _borders(edges, rows, piece.offset[d])
        touching: list[list[tuple[int, int]]] = [[] for _ in borders[1:]]  # how much of it a region wants, and its number
        for part, number in inside:
            begin, end = part.offset[d], part.end[d]
            for index in range(bisect_right(borders, begin) - 1, bisect_left(borders, end)):
                touching[index].append((min(end, borders[index + 1]) - max(begin, borders[index]), number))
        for (begin, end), wanting in zip(pairwise(borders), touching, strict=True):
            most = max(extent for extent, _ in wanting)
            box = Region((*whole.offset[:d], begin, *whole.offset[d + 1 :]), (*whole.shape[:d], end - begin, *whole.shape[d + 1 :]))
            nearest = tuple(number for extent, number in wanting if 2 * extent >= most)
            yield _Part(box, d, rows, tuple(number for _, number in wanting), nearest)


def _cuttable(box: Region, piece: Region, blocks: RowBlocks) -> tuple[int | None, int]:
    """Along which dimension a box of a chunk is cut, and at multiples of how many rows from the chunk's begin."""
    rows_along = blocks.dimension
    if rows_along is not None and box.shape[rows_along + 1 :] == piece.shape[rows_along + 1 :]:
        return (rows_along, blocks.rows) if box.shape[rows_along] > 1 else (None, 1)
    # No block is in it whole. Parts along the outermost dimension are further apart in the file than along any other.
    return next((d for d, extent in enumerate(box.shape) if extent > 1), None), 1


def _borders(edges: set[int], rows: int, origin: int) -> list[int]:
    """The first and the last of some edges, and between them the borders of row blocks that are nearest to the others."""
    if rows == 1:
        return sorted(edges)
    first, last = min(edges), max(edges)
    rounded = {origin + (edge - origin + rows // 2) // rows * rows for edge in edges}
    return [first, *sorted(border for border in rounded if first < border < last), last]


def _union(piece: Region, commons: list[Region]) -> list[Region]:
    """Disjoint boxes that are together the union of some boxes of a piece; the piece itself when all of it is wanted."""
    if any(common == piece for common in commons):
        return [piece]
    if find_overlap(commons) is None and sum(common.size for common in commons) == piece.size:
        return [piece]
    found = _sections([tuple(zip(common.offset, common.end, strict=True)) for common in commons])
    return [Region(tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box)) for box in found]


_Box = tuple[tuple[int, int], ...]  # begin and end of each dimension


def _sections(boxes: list[_Box]) -> tuple[_Box, ...]:
    """The union of boxes, as few disjoint ones: neighbours of the same cross-section are one."""
    if not boxes[0]:
        return ((),)
    runs: list[tuple[int, int, tuple[_Box, ...]]] = []
    for begin, end in pairwise(sorted({edge for box in boxes for edge in box[0]})):
        inner = sorted({box[1:] for box in boxes if box[0][0] <= begin and end <= box[0][1]})
        if not inner:
            continue
        section = _sections(inner)
        if runs and runs[-1][1] == begin and runs[-1][2] == section:
            runs[-1] = (runs[-1][0], end, section)
        else:
            runs.append((begin, end, section))
    return tuple(((begin, end), *inner) for begin, end, section in runs for inner in section)
