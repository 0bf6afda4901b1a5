"""The pieces of all arrangements of an index, column by column: a million are read at once, each becomes an object when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import msgspec
import numpy as np

from reshard.catalog import Arrangement, Piece, Pieces, Site
from reshard.geometry import Region
from reshard.geometry.boxes import Boxes
from reshard.geometry.cover import find_covered

# The widths of a column's numbers in bytes; a column takes the narrowest that holds all of them.
_WIDTHS = (1, 2, 4, 8)

# Boxes that are looked at together: the corners of so many, and what is worked out from them, take some 50 MiB.
_BATCH = 1 << 17

# Numbers above are nobody's offsets: sums of two stay inside 64 bits.
_MOST = 2**62


class Columns(msgspec.Struct, array_like=True):
    """A table as it is written. A column is one byte, the width of its numbers, and the numbers: unsigned, little-endian.

    Attributes:
        counts: the number of pieces of each arrangement.
        boxes: by number of dimensions, for the pieces of all arrangements of so many: offsets, a column per dimension, then extents.
        holders: of each piece, an index into `groups`.
        sites: of each piece, the number of its sites.
        files: of each site, an index into `file_names`.
        ranks: of each site.
        suffixes: of each site, an index into `suffix_names`.
        groups: ranks that hold a piece together.
        file_names: data files.
        suffix_names: what follows the tensors' own names.
    """

    counts: bytes
    boxes: dict[int, list[bytes]]
    holders: bytes
    sites: bytes
    files: bytes
    ranks: bytes
    suffixes: bytes
    groups: list[tuple[int, ...]]
    file_names: list[str]
    suffix_names: list[str]


def encode_pieces(arrangements: Sequence[Arrangement]) -> Columns:
    """The pieces of arrangements as columns."""
    boxes: dict[int, list[int]] = {}
    holders: list[int] = []
    sites: list[int] = []
    files: list[int] = []
    ranks: list[int] = []
    suffixes: list[int] = []
    groups: dict[tuple[int, ...], int] = {}
    file_names: dict[str, int] = {}
    suffix_names: dict[str, int] = {}
    for arrangement in arrangements:
        numbers = boxes.setdefault(len(arrangement.global_shape), [])
        for piece in arrangement.pieces:
            region = piece.region
            numbers += region.offset
            numbers += region.shape
            holders.append(groups.setdefault(piece.holders, len(groups)))
            sites.append(len(piece.sites))
            for site in piece.sites:
                files.append(file_names.setdefault(site.file, len(file_names)))
                ranks.append(site.rank)
                suffixes.append(suffix_names.setdefault(site.suffix, len(suffix_names)))
    return Columns(
        pack([len(arrangement.pieces) for arrangement in arrangements]),
        {d: [pack(column) for column in np.array(numbers, np.int64).reshape(-1, 2 * d).T] for d, numbers in boxes.items() if d},
        pack(holders),
        pack(sites),
        pack(files),
        pack(ranks),
        pack(suffixes),
        list(groups),
        list(file_names),
        list(suffix_names),
    )


def decode_pieces(columns: Columns, shapes: Sequence[tuple[int, ...]]) -> list[Pieces]:
    """The pieces of each arrangement.

    Args:
        columns: the table.
        shapes: of the arrangements' tensors.

    Raises:
        ValueError: the columns contradict each other, or pieces don't cover their tensor exactly once or are stored nowhere.
    """
    counts = unpack(columns.counts)
    if len(counts) != len(shapes):
        raise ValueError("arrangements without a count of pieces")
    table = _Table(columns, int(counts.sum()))
    begins = np.cumsum(counts) - counts
    made: dict[int, Pieces] = {}
    by_dimensions: dict[int, list[int]] = {}
    for index, shape in enumerate(shapes):
        by_dimensions.setdefault(len(shape), []).append(index)
    for dimensions, indices in by_dimensions.items():
        own, wholes = counts[indices], np.array([shapes[index] for index in indices], np.int64).reshape(len(indices), dimensions).T
        boxes = _decode_boxes(columns.boxes.get(dimensions, []), dimensions, int(own.sum()))
        first = np.cumsum(own) - own
        _check_cover(boxes, own, wholes)
        # Where each box's piece is among all pieces.
        numbers = np.arange(len(boxes)) + np.repeat(begins[indices] - first, own)
        if ((table.sites[numbers] == 0) & (boxes.shapes > 0).all(axis=0)).any():
            raise ValueError("a piece that is stored nowhere")
        for index, begin, box, count in zip(indices, begins[indices].tolist(), first.tolist(), own.tolist(), strict=True):
            made[index] = _TablePieces(table, begin, boxes, box, count)
    return [made[index] for index in range(len(shapes))]


def _check_cover(boxes: Boxes, counts: np.ndarray, wholes: np.ndarray) -> None:
    """See that each tensor's boxes, one tensor's after the other's, cover it exactly once; so many at a time."""
    ends = np.cumsum(counts)
    tensor = box = 0
    while tensor < len(counts):
        last = max(tensor + 1, int(np.searchsorted(ends, box + _BATCH, side="right")))
        end = int(ends[last - 1])
        owners = np.repeat(np.arange(last - tensor), counts[tensor:last])
        if not find_covered(boxes.take(slice(box, end)), owners, wholes[:, tensor:last]).all():
            raise ValueError("pieces that don't cover their tensor")
        tensor, box = last, end


def pack(numbers: Sequence[int] | np.ndarray) -> bytes:
    """A column of numbers that are not negative."""
    column = np.asarray(numbers, np.uint64)
    most = int(column.max(initial=0))
    width = next(width for width in _WIDTHS if most < 1 << (8 * width))
    return bytes([width]) + column.astype(f"<u{width}").tobytes()


def unpack(data: bytes) -> np.ndarray:
    """The numbers of a column, int64.

    Raises:
        ValueError: it is none.
    """
    if data[:1] not in {bytes([width]) for width in _WIDTHS}:
        raise ValueError("a column without its width")
    column = np.frombuffer(data, f"<u{data[0]}", offset=1)
    if len(column) and int(column.max()) > _MOST:
        raise ValueError("a number larger than any file")
    return column.astype(np.int64)


def _decode_boxes(packed: Sequence[bytes], dimensions: int, count: int) -> Boxes:
    if len(packed) != 2 * dimensions:
        raise ValueError("boxes of other dimensions than their tensors")
    numbers = np.empty((2, dimensions, count), np.int64)
    for column, data in zip(numbers.reshape(2 * dimensions, count), packed, strict=True):
        column[:] = unpack(data)
    return Boxes(numbers[0], numbers[1])


class _Table:
    """The columns that pieces share, checked."""

    def __init__(self, columns: Columns, count: int) -> None:
        self.holders = unpack(columns.holders)
        self.sites = unpack(columns.sites)
        self.files = unpack(columns.files)
        self.ranks = unpack(columns.ranks)
        self.suffixes = unpack(columns.suffixes)
        self.groups = columns.groups
        self.file_names = columns.file_names
        self.suffix_names = columns.suffix_names
        # Where each piece's sites begin, and one end.
        self.site_begins = np.concatenate([[0], np.cumsum(self.sites)])
        if not len(self.holders) == len(self.sites) == count:
            raise ValueError("pieces without holders or sites")
        if not len(self.files) == len(self.ranks) == len(self.suffixes) == self.site_begins[-1]:
            raise ValueError("sites without a file, a rank or a suffix")
        for column, names in ((self.holders, self.groups), (self.files, self.file_names), (self.suffixes, self.suffix_names)):
            if column.max(initial=-1) >= len(names):
                raise ValueError("an index beyond what it leads to")

    def piece(self, number: int, region: Region) -> Piece:
        begin, end = self.site_begins[number : number + 2].tolist()
        columns = (self.files[begin:end].tolist(), self.ranks[begin:end].tolist(), self.suffixes[begin:end].tolist())
        sites = tuple(Site(self.file_names[file], rank, self.suffix_names[suffix]) for file, rank, suffix in zip(*columns, strict=True))
        return Piece(region, sites, self.groups[self.holders[number]])


class _TablePieces(Pieces):
    """Some pieces of a table, one after the other."""

    def __init__(self, table: _Table, first: int, boxes: Boxes, first_box: int, count: int) -> None:
        self._table = table
        self._first = first
        self._all_boxes = boxes
        self._first_box = first_box
        self._count = count

    @property
    def boxes(self) -> Boxes:
        return self._all_boxes.take(slice(self._first_box, self._first_box + self._count))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Piece, ...]: ...
    def __getitem__(self, index: int | slice) -> Piece | tuple[Piece, ...]:
        if isinstance(index, slice):
            return tuple(self[number] for number in range(*index.indices(self._count)))
        number = index + self._count if index < 0 else index
        if not 0 <= number < self._count:
            raise IndexError(index)
        return self._table.piece(self._first + number, self.boxes[number])

    def __iter__(self) -> Iterator[Piece]:
        for number, region in enumerate(self.boxes.regions()):
            yield self._table.piece(self._first + number, region)
