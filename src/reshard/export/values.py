"""The values of stored tensors, piece by piece in the order of a file, read ahead while others are written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from math import prod

import numpy as np

from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors import PlannedHeader
from reshard.geometry import DType, Region
from reshard.geometry.casts import cast_values
from reshard.storage import Storage
from reshard.views import TensorView

# What is read, converted and written at a time.
_PIECE_BYTES = 16 << 20

# Pieces that are read at a time.
_READERS = 4

# A row of a tensor that is this part of the budget at most is one piece, so that it is verified whole; a longer one is cut.
_ROW_PART = 8

# A conversion may hold values as 4 bytes each on the way.
_CAST_BYTES = 4


def write_shard(
    storage: Storage,
    path: str,
    header: PlannedHeader,
    tensors: Iterable[tuple[TensorView, DType]],
    *,
    memory_budget: int,
    written: Callable[[int], None] | None = None,
) -> None:
    """Write a new safetensors file of whole tensors, and make it durable.

    Args:
        storage: where to.
        path: of the new file.
        header: as `plan_header` made it, without digests.
        tensors: the source of each entry, in the order of the header, and the type that is written.
        memory_budget: bytes that are held at a time.
        written: is told of every piece, how long it was.

    Raises:
        DamagedCheckpointError: the source isn't what it promises.
        StorageError: a storage refuses.
    """
    with storage.create(path, header.file_size) as file:
        position = header.nbytes
        for values in _read_ahead(tensors, memory_budget):
            data = memoryview(values.reshape(-1).view(np.uint8))
            file.write_at(position, data)
            position += data.nbytes
            if written is not None:
                written(data.nbytes)
        assert position == header.file_size  # every entry has had its tensor
        file.write_at(0, memoryview(header.encode(())))
        file.sync()


def _read_ahead(tensors: Iterable[tuple[TensorView, DType]], memory_budget: int) -> Iterator[np.ndarray]:
    """The pieces in order; as many are being read as the budget holds."""
    waiting: deque[tuple[Future[np.ndarray], int]] = deque()
    held = 0
    with ThreadPoolExecutor(_READERS, "reshard-export") as pool:
        try:
            for view, dtype in tensors:
                each = (
                    max(view.dtype.itemsize, dtype.itemsize) if view.dtype == dtype else view.dtype.itemsize + dtype.itemsize + _CAST_BYTES
                )
                for region in cut(view, memory_budget):
                    cost = each * region.size
                    while waiting and (held + cost > memory_budget or len(waiting) >= 2 * _READERS):
                        future, freed = waiting.popleft()
                        yield future.result()
                        held -= freed
                    waiting.append((pool.submit(_values, view, region, dtype), cost))
                    held += cost
            while waiting:
                yield waiting.popleft()[0].result()
        finally:
            for future, _ in waiting:
                future.cancel()


def _values(view: TensorView, region: Region, dtype: DType) -> np.ndarray:
    values = view.read(region)
    return values if view.dtype == dtype else cast_values(values, dtype)


def cut(view: TensorView, memory_budget: int) -> Iterator[Region]:
    """Regions that are a tensor's elements in row-major order one after the other, none without elements.

    Where it can be, they begin and end at row blocks of what is stored, which can be verified only whole.

    Args:
        view: the tensor.
        memory_budget: bytes; a piece is a small part of them.
    """
    if 0 in view.shape:
        return
    stored = [chunk.region for chunk in view.chunks]
    itemsize = view.dtype.itemsize
    yield from _cut(
        Region.whole(view.shape), 0, stored, itemsize, min(_PIECE_BYTES, memory_budget // _ROW_PART), memory_budget // _ROW_PART
    )


def _cut(region: Region, dimension: int, stored: list[Region], itemsize: int, most: int, longest: int) -> Iterator[Region]:
    if region.size * itemsize <= most or dimension == len(region.shape):
        yield region
        return
    row = itemsize * prod(region.shape[dimension + 1 :])
    for begin, end in _spans(region, dimension, stored, itemsize, max(1, most // row)):
        offset = (*region.offset[:dimension], begin, *region.offset[dimension + 1 :])
        part = Region(offset, (*region.shape[:dimension], end - begin, *region.shape[dimension + 1 :]))
        if row <= longest:
            yield part
        else:
            yield from _cut(part, dimension + 1, stored, itemsize, most, longest)


def _spans(region: Region, dimension: int, stored: list[Region], itemsize: int, rows: int) -> Iterator[tuple[int, int]]:
    """Parts of a region along a dimension, of so many rows, cut where stored chunks and their row blocks begin."""
    first, last = region.offset[dimension], region.offset[dimension] + region.shape[dimension]
    touched = [chunk for chunk in stored if region.intersect(chunk) is not None]
    edges = {first, last}
    block = 1
    for chunk in touched:
        edges |= {edge for edge in (chunk.offset[dimension], chunk.offset[dimension] + chunk.shape[dimension]) if first < edge < last}
        blocks = row_blocks_of(chunk.shape, itemsize)
        if blocks.dimension == dimension:
            block = max(block, blocks.rows)
    step = max(rows - rows % block, block)
    for begin, end in pairwise(sorted(edges)):
        for at in range(begin, end, step):
            yield at, min(at + step, end)
