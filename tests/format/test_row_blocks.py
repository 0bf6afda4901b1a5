"""Row blocks: rows that are together a tensor, few blocks where it is small and many where it is large; bytes are held against them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import DataFileError
from reshard.format.digest import digest_of
from reshard.format.row_blocks import LEAST_BYTES, LEAST_NUMBER, MOST_BYTES, RowBlocks, row_blocks_of
from reshard.format.safetensors import BlockCheck, TensorEntry, count_whole
from reshard.geometry.dtypes import by_name

FLOAT = by_name("float32")

_extents = st.one_of(st.integers(0, 3), st.integers(1, 5000))


@given(st.lists(_extents, max_size=4).map(tuple), st.sampled_from([1, 2, 4, 8, 16]))
def test_blocks_are_rows_that_are_together_the_tensor(shape: tuple[int, ...], itemsize: int) -> None:
    nbytes = itemsize * math.prod(shape)
    blocks = row_blocks_of(shape, itemsize)
    if not nbytes or max(shape, default=1) == 1:
        assert blocks == RowBlocks(None, 1, nbytes, 1)
        return
    assert blocks.dimension == min(d for d, extent in enumerate(shape) if extent > 1)
    extent = shape[blocks.dimension]
    row_bytes = nbytes // extent
    assert blocks.nbytes == blocks.rows * row_bytes
    assert (blocks.number - 1) * blocks.rows < extent <= blocks.number * blocks.rows
    if nbytes <= LEAST_BYTES:
        assert blocks.number == 1
    else:
        assert blocks.rows == 1 or blocks.nbytes <= max(LEAST_BYTES, nbytes / LEAST_NUMBER)
        assert blocks.rows == 1 or blocks.nbytes <= MOST_BYTES
        # One more row would be too much.
        assert blocks.nbytes + row_bytes > min(max(LEAST_BYTES, nbytes // LEAST_NUMBER), MOST_BYTES)
        assert blocks.number >= min(extent, LEAST_NUMBER) or blocks.nbytes + row_bytes > LEAST_BYTES


@pytest.mark.parametrize(
    ("shape", "itemsize", "blocks"),
    [
        ((), 4, RowBlocks(None, 1, 4, 1)),
        ((1, 1), 4, RowBlocks(None, 1, 4, 1)),
        ((3, 0), 4, RowBlocks(None, 1, 0, 1)),
        ((4096,), 4, RowBlocks(0, 4096, 16 << 10, 1)),
        ((4097,), 4, RowBlocks(0, 4096, 16 << 10, 2)),
        ((1, 1024, 1024), 4, RowBlocks(1, 16, 64 << 10, 64)),
        ((151_936, 4096), 2, RowBlocks(0, 512, 4 << 20, 297)),
        ((2, 1 << 30), 1, RowBlocks(0, 1, 1 << 30, 2)),
    ],
)
def test_examples(shape: tuple[int, ...], itemsize: int, blocks: RowBlocks) -> None:
    assert row_blocks_of(shape, itemsize) == blocks


def stored(shape: tuple[int, ...], seed: int = 0) -> tuple[TensorEntry, np.ndarray]:
    """A tensor as a header has it, and its bytes."""
    data = np.random.default_rng(seed).integers(0, 256, 4 * math.prod(shape), np.uint8)
    step = row_blocks_of(shape, 4).nbytes or 1
    digests = b"".join(digest_of(data[at : at + step]) for at in range(0, max(1, data.nbytes), step))
    return TensorEntry("w", FLOAT, shape, 1000, 1000 + data.nbytes, digests), data


@given(st.sampled_from([(70, 500), (9000,), (40, 41, 42), (3, 20_000), (5,), ()]), st.data())
def test_what_comes_whole_is_checked_and_nothing_else(shape: tuple[int, ...], data: st.DataObject) -> None:
    """Pieces of any sizes, with gaps; a byte is changed: it is found if and only if its block came whole, and nothing else is."""
    entry, whole = stored(shape)
    size = whole.nbytes
    edges = sorted(data.draw(st.sets(st.integers(0, size), max_size=6)) | {0, size})
    taken = [data.draw(st.booleans()) for _ in edges[1:]]
    place = data.draw(st.integers(0, size - 1))
    damaged = whole.copy()
    damaged[place] ^= 1
    step = row_blocks_of(shape, 4).nbytes
    seen = np.zeros(size, bool)
    right, wrong = BlockCheck(entry, "f"), BlockCheck(entry, "f")
    for begin, end, is_taken in zip(edges, edges[1:], taken, strict=False):
        if is_taken:
            right.update(begin, memoryview(whole[begin:end]))
            wrong.update(begin, memoryview(damaged[begin:end]))
            seen[begin:end] = True
    full = [at for at in range(0, size, step) if seen[at : at + step].all()]
    assert right.verified == wrong.verified == sum(min(step, size - at) for at in full)
    right.raise_if_wrong()
    block = place // step
    assert [number for number, _ in wrong.wrong] == ([block] if block * step in full else [])
    if wrong.wrong:
        with pytest.raises(DataFileError, match=f"bytes {1000 + block * step} to {1000 + min(size, (block + 1) * step)} of the file"):
            wrong.raise_if_wrong()


@given(st.sampled_from([(70, 500), (9000,), (3, 20_000), (5,), (), (0, 3)]), st.data())
def test_the_whole_blocks_of_a_run_are_counted(shape: tuple[int, ...], data: st.DataObject) -> None:
    entry, whole = stored(shape)
    begin = data.draw(st.integers(0, whole.nbytes))
    end = data.draw(st.integers(begin, whole.nbytes))
    check = BlockCheck(entry, "f")
    check.update(begin, memoryview(whole[begin:end]))
    assert count_whole(entry, begin, end - begin) == check.verified
    assert count_whole(entry._replace(digests=b""), begin, end - begin) == 0


def test_an_error_names_the_places_that_are_wrong() -> None:
    entry, data = stored((1000, 100))  # 40 rows a block, 25 blocks
    check = BlockCheck(entry, "f")
    for block in (0, 3, 4, 8, 12, 24):
        data[16_000 * block] ^= 1
    check.update(0, memoryview(data))
    error = check.error()
    assert error.tensor == "w"
    assert str(error.found).startswith("rows 0 to 40 of dimension 0 (bytes 1000 to 17000 of the file), rows 120 to 200 of dimension 0 (")
    assert str(error.found).endswith("and 1 more place")


def test_a_tensor_without_digests_is_not_checked() -> None:
    entry, data = stored((1000, 100))
    check = BlockCheck(entry._replace(digests=b""), "f")
    check.update(0, memoryview(data))
    assert (check.verified, check.wrong) == (0, [])
