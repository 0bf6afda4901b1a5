"""One file of Checkpoint 1.0: which tensors it holds, and where their bytes lie in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from reshard.geometry import DType, Region


class Part(NamedTuple):
    """Elements of a tensor that lie one after the other in a file.

    Attributes:
        region: which of the tensor's elements, a box of whole C order.
        begin: where the first byte lies in the file.
    """

    region: Region
    begin: int


class FileTensor(NamedTuple):
    """A tensor in a file: whole, or what one rank held of it.

    Attributes:
        dtype: its element type.
        shape: its shape in this file.
        parts: its bytes, in order; together they are the whole of the shape.
    """

    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return self.dtype.itemsize * prod(self.shape)


@dataclass(frozen=True)
class SavedFile:
    """What a file holds.

    Attributes:
        file: its name, relative to the checkpoint's directory.
        rank: the global rank that wrote it.
        tensors: by name, in the file's order.
        texts: values that are text, by name.
        left_out: tensors that can't be taken, each with why.
        notes: what else the reader should know.
    """

    file: str
    rank: int
    tensors: Mapping[str, FileTensor]
    texts: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def boxes_in_order(shape: tuple[int, ...], first: int, count: int) -> list[Region]:
    """The boxes that a run of elements in C order consists of, in that order.

    Args:
        shape: of the tensor, without a zero.
        first: the first element of the run.
        count: how many they are, at least one.
    """
    if len(shape) < 2:
        # Of a 0-d tensor there is one element, and no dimension that says where.
        return [Region((first,) * len(shape), (count,) * len(shape))]
    row = prod(shape[1:])
    boxes: list[Region] = []
    end = first + count
    while first < end:
        index, begin = divmod(first, row)
        if begin == 0 and end - first >= row:
            rows = (end - first) // row
            boxes.append(Region((index, *(0 for _ in shape[1:])), (rows, *shape[1:])))
            first += rows * row
        else:
            # The rest of a row, or the beginning of one.
            part = min(end - first, row - begin)
            boxes += [Region((index, *box.offset), (1, *box.shape)) for box in boxes_in_order(shape[1:], begin, part)]
            first += part
    return boxes
