"""Write a safetensors file straight out of the tensors' memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import numpy as np

from reshard.errors import CaptureError
from reshard.format.safetensors.header import Header, TensorEntry, encode_header
from reshard.storage import Storage, WritableFile

# Large enough that the cost per write call vanishes, small enough that what is staged never matters.
BLOCK_BYTES = 8 << 20


def write_tensors(
    storage: Storage, path: str, header: Header, arrays: Iterable[tuple[str, np.ndarray]], *, block_bytes: int = BLOCK_BYTES
) -> None:
    """Write a new file: the data in blocks, then the header, then make it durable.

    Contiguous memory is written from where it lies; small or strided tensors are gathered in one block of `block_bytes`. The order of
    `header.entries` costs least; any order works.

    Args:
        storage: where to.
        path: of the new file.
        header: as `plan_header` made it.
        arrays: the values of every entry, once, by name; of the entry's shape and element type, any strides.
        block_bytes: bytes per block, and the most memory that is used beside the tensors'.

    Raises:
        CaptureError: an array that the header doesn't know, one that doesn't fit its entry, or entries without an array.
        StorageError: the storage refuses.
    """
    left = dict(header.entries)
    with storage.create(path, header.file_size) as file:
        stage = _Stage(file, block_bytes)
        for name, array in arrays:
            entry = left.pop(name, None)
            if entry is None or array.shape != entry.shape or array.dtype != entry.dtype.numpy:
                raise _unfit(path, name, array, entry)
            stage.write(entry.begin, array)
        if left:
            raise CaptureError(
                "tensors that the header promises were not written", file=path, tensor=next(iter(left)), found=f"{len(left)} missing"
            )
        stage.flush()
        file.write_at(0, memoryview(encode_header(header)))
        file.sync()


def _unfit(path: str, name: str, array: np.ndarray, entry: TensorEntry | None) -> CaptureError:
    if entry is None:
        return CaptureError("a tensor is written twice, or the header doesn't know it", file=path, tensor=name)
    return CaptureError(
        "a tensor's memory doesn't fit its entry in the header",
        file=path,
        tensor=name,
        found=f"{array.dtype} of shape {array.shape}",
        expected=f"{entry.dtype} of shape {entry.shape}",
    )


class _Stage:
    """Gathers what is small or strided into one block; the block's bytes lie one after the other in the file."""

    def __init__(self, file: WritableFile, block_bytes: int) -> None:
        self._file = file
        # At least one element of the widest type.
        self._block = np.empty(max(block_bytes, 16), dtype=np.uint8)
        self._begin = 0
        self._filled = 0

    def write(self, offset: int, array: np.ndarray) -> None:
        size = len(self._block)
        for piece in _pieces(array, size):
            nbytes = piece.nbytes
            # Half a block or more of contiguous memory is not worth a copy.
            if nbytes * 2 >= size and piece.flags.c_contiguous:
                self.flush()
                self._file.write_at(offset, memoryview(piece.reshape(-1).view(np.uint8)))
            else:
                if offset != self._begin + self._filled or self._filled + nbytes > size:
                    self.flush()
                    self._begin = offset
                target = self._block[self._filled : self._filled + nbytes]
                if piece.flags.c_contiguous:
                    target[:] = piece.reshape(-1).view(np.uint8)
                else:
                    # The staged bytes may not be aligned for the element type: numpy copes.
                    target.view(piece.dtype).reshape(piece.shape)[...] = piece
                self._filled += nbytes
            offset += nbytes

    def flush(self) -> None:
        if self._filled:
            self._file.write_at(self._begin, memoryview(self._block[: self._filled]))
            self._begin += self._filled
            self._filled = 0


def _pieces(array: np.ndarray, limit: int) -> Iterator[np.ndarray]:
    """Views that together are the array in row-major order, each of at most `limit` bytes and at least one element."""
    if array.nbytes <= limit:
        if array.size:
            yield array
        return
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    row = array.itemsize * prod(array.shape[1:])
    rows = limit // row
    if rows:
        for begin in range(0, len(array), rows):
            yield array[begin : begin + rows]
    else:
        for part in array:
            yield from _pieces(part, limit)
