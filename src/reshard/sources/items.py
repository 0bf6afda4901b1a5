"""Where the tensors of foreign files lie: the places that one rank found for all, column by column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np

from reshard.format.piece_table import pack, unpack

Kind = Literal["raw", "archive"]


class ItemTable(msgspec.Struct, array_like=True, dict=True):
    """The items of a checkpoint: of each file, which piece of which tensor lies where. Columns are packed as in an index.

    Attributes:
        kind: `raw`: an item is a tensor's bytes; `archive`: it is what `torch.save` wrote of one.
        files: names in the checkpoint's directory.
        counts: of each file, how many items it has.
        tensors: of each item, the number of its tensor in the catalog's order.
        pieces: of each item, the number of the piece.
        begins: of each item, where it begins in the file.
        sizes: of each item, its bytes.
    """

    kind: Kind
    files: list[str]
    counts: bytes
    tensors: bytes
    pieces: bytes
    begins: bytes
    sizes: bytes

    @classmethod
    def of(cls, kind: Kind, rows: Mapping[str, Sequence[tuple[int, int, int, int]]]) -> ItemTable:
        """The table of these rows: tensor, piece, begin and size of each item, by file."""
        columns = np.array([row for listed in rows.values() for row in listed], np.int64).reshape(-1, 4).T
        return cls(kind, list(rows), pack([len(listed) for listed in rows.values()]), *(pack(column) for column in columns))

    def rows(self, file: str) -> list[tuple[int, int, int, int]]:
        """The items of a file: tensor, piece, begin and size of each; none for a file that has none.

        Raises:
            ValueError: the table is damaged.
        """
        bounds = self._bounds.get(file)
        return [] if bounds is None else list(zip(*(column[bounds].tolist() for column in self._columns), strict=True))

    @cached_property
    def _bounds(self) -> dict[str, slice]:
        ends = np.cumsum(unpack(self.counts)).tolist()
        return {file: slice(begin, end) for file, begin, end in zip(self.files, [0, *ends], ends, strict=False)}

    @cached_property
    def _columns(self) -> tuple[np.ndarray, ...]:
        return tuple(unpack(column) for column in (self.tensors, self.pieces, self.begins, self.sizes))
