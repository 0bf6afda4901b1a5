"""Blocks against numpy: together they are the region, and their byte runs cover it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reshard.geometry import Region
from reshard.planning.byte_runs import bytes_of_pages, plan_blocks, row_places, strides_of


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    offset = tuple(draw(st.integers(0, extent)) for extent in shape)
    return shape, Region(offset, tuple(draw(st.integers(0, extent - begin)) for extent, begin in zip(shape, offset, strict=True)))


@given(boxes(), st.sampled_from([1, 2, 4, 8]), st.integers(1, 200), st.integers(0, 64))
def test_blocks_are_the_region_and_nothing_else(
    case: tuple[tuple[int, ...], Region], itemsize: int, block_bytes: int, gap_bytes: int
) -> None:
    shape, region = case
    stored = np.arange(math.prod(shape) * itemsize, dtype=np.uint16).reshape(*shape, itemsize)  # one number per byte
    flat = stored.reshape(-1)
    found = np.zeros((*shape, itemsize), int)
    end = 0
    for block in plan_blocks(shape, region, itemsize, block_bytes=block_bytes, gap_bytes=gap_bytes):
        assert block.nbytes <= max(block_bytes, itemsize)
        assert block.offset >= end, "runs are in file order and don't overlap"
        end = block.offset + block.nbytes
        run = flat[block.offset : end]
        box = stored[block.region.slices]
        assert run[0] == box.reshape(-1)[0]
        assert run[-1] == box.reshape(-1)[-1]
        missing = np.diff(np.sort(box.reshape(-1).astype(int)))
        assert missing.size == 0 or missing.max() - 1 <= gap_bytes, "a run crosses no wider gap"
        found[block.region.slices] += 1
    expected = np.zeros_like(found)
    expected[region.slices] = 1
    assert np.array_equal(found, expected)


def test_a_contiguous_box_is_one_run() -> None:
    blocks = list(plan_blocks((8, 4), Region((2, 0), (3, 4)), 4, block_bytes=1 << 20, gap_bytes=0))
    assert [(block.offset, block.nbytes) for block in blocks] == [(32, 48)]


@pytest.mark.parametrize(("gap_bytes", "runs", "read"), [(0, 8, 64), (7, 8, 64), (8, 1, 120)])
def test_a_gap_is_crossed_only_when_it_is_small(gap_bytes: int, runs: int, read: int) -> None:
    blocks = list(plan_blocks((8, 4), Region((0, 1), (8, 2)), 4, block_bytes=1 << 20, gap_bytes=gap_bytes))
    assert (len(blocks), sum(block.nbytes for block in blocks)) == (runs, read)


def test_strides() -> None:
    assert strides_of((2, 3, 5), 4) == (60, 20, 4)
    assert strides_of((), 4) == ()


@given(boxes(), st.sampled_from([1, 2, 4, 8]))
def test_rows_are_the_box_in_its_own_order(case: tuple[tuple[int, ...], Region], itemsize: int) -> None:
    shape, box = case
    array = np.arange(math.prod(shape) * itemsize, dtype=np.uint16).reshape(*shape, itemsize)  # one number per byte
    nbytes, places = row_places(box, shape, itemsize)
    found = [array.reshape(-1)[place : place + nbytes] for place in places]
    assert np.array_equal(np.concatenate([np.empty(0, np.uint16), *found]), array[box.slices].reshape(-1))


def test_rows_are_as_long_as_they_can_be() -> None:
    assert row_places(Region((0, 1, 0), (2, 2, 5)), (2, 4, 5), 4) == (40, pytest.approx([20, 100]))
    assert row_places(Region((1, 0, 0), (2, 4, 5)), (4, 4, 5), 4)[0] == 160
    assert row_places(Region((0, 0, 1), (2, 4, 2)), (2, 4, 5), 4)[0] == 8


@given(boxes(), st.sampled_from([1, 2, 4, 8]), st.integers(0, 40), st.sampled_from([1, 2, 8, 16, 64]))
def test_pages_are_those_with_a_byte_of_the_box(case: tuple[tuple[int, ...], Region], itemsize: int, begin: int, page_bytes: int) -> None:
    shape, box = case
    assume(not box.is_empty)
    places = np.arange(math.prod(shape) * itemsize).reshape(*shape, itemsize)[box.slices]
    pages = np.unique((begin + places - places.min()) // page_bytes)
    assert bytes_of_pages(begin, box.shape, strides_of(shape, itemsize), itemsize, page_bytes) == page_bytes * len(pages)
