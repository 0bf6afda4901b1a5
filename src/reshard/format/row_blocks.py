"""The row blocks of a stored tensor: the rows that have one digest together.

A digest of a whole tensor says something only to whoever reads the whole. So a stored tensor has one for each of its row blocks, which
are runs of its bytes: rows along its outermost dimension with an extent above 1, as many as

    max(1, limit // bytes of a row),  limit = bytes of the tensor / 64, at least 16 KiB and at most 4 MiB;

the last block has the rows that are left. A tensor without such a dimension, or without elements, is one block. What a block is depends on
nothing but the shape and the size of an element, so that plans know the blocks of files that they have not seen.
"""

from __future__ import annotations

from typing import NamedTuple

# At least so many blocks, as far as there are rows: so that even a single stored tensor can be shared out to some ranks evenly, one block
# more or less to each.
LEAST_NUMBER = 64

# A digest has 32 digits in the header: 0.2 % of so many bytes. What is smaller is one block.
LEAST_BYTES = 16 << 10

# More is no use: beside a tensor of 64 times as much another block is nothing, and the smaller a block is, the sooner a rank that reads a
# part of a tensor has read one whole, and the better a fault's place is known.
MOST_BYTES = 4 << 20


class RowBlocks(NamedTuple):
    """The row blocks of a tensor.

    Attributes:
        dimension: along which they follow each other; None for a tensor that has no dimension with an extent above 1, or no elements.
        rows: the rows of each, the last one may have fewer.
        nbytes: the bytes of each, likewise.
        number: of the blocks, at least 1.
    """

    dimension: int | None
    rows: int
    nbytes: int
    number: int


def row_blocks_of(shape: tuple[int, ...], itemsize: int) -> RowBlocks:
    """The row blocks of a tensor.

    Args:
        shape: its shape as it is stored, in C order.
        itemsize: bytes of an element.
    """
    nbytes, dimension = itemsize, None
    for d, extent in enumerate(shape):
        nbytes *= extent
        if dimension is None and extent > 1:
            dimension = d
    if dimension is None or not nbytes:
        return RowBlocks(None, 1, nbytes, 1)
    extent = shape[dimension]
    row_bytes = nbytes // extent
    limit = min(max(nbytes // LEAST_NUMBER, LEAST_BYTES), MOST_BYTES)
    rows = min(extent, max(1, limit // row_bytes))
    return RowBlocks(dimension, rows, rows * row_bytes, -(-extent // rows))
