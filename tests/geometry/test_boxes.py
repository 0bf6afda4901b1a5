"""Many regions at once against each of them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reshard.geometry import Region
from reshard.geometry.boxes import Boxes

_lines = st.tuples(st.integers(0, 5), st.integers(0, 4))


def _regions(dimensions: int) -> st.SearchStrategy[Region]:
    return st.lists(_lines, min_size=dimensions, max_size=dimensions).map(
        lambda lines: Region(tuple(o for o, _ in lines), tuple(n for _, n in lines))
    )


@given(st.integers(0, 3).flatmap(lambda d: st.tuples(st.just(d), st.lists(_regions(d), max_size=8), _regions(d))))
def test_they_are_the_regions_that_they_were_made_of(case: tuple[int, list[Region], Region]) -> None:
    dimensions, regions, wanted = case
    boxes = Boxes.of(regions, dimensions)
    assert len(boxes) == len(regions)
    assert boxes.regions() == regions
    assert [boxes[index] for index in range(len(regions))] == regions
    touching = [index for index, region in enumerate(regions) if region.intersect(wanted) is not None]
    assert boxes.touching(wanted).tolist() == touching


@given(st.integers(0, 3).flatmap(lambda d: st.tuples(st.just(d), st.lists(_regions(d), max_size=8), st.lists(_regions(d), max_size=8))))
def test_pairs_are_those_that_touch(case: tuple[int, list[Region], list[Region]]) -> None:
    dimensions, these, others = case
    found = Boxes.of(these, dimensions).touching_pairs(Boxes.of(others, dimensions))
    pairs = [(a, b) for a, mine in enumerate(these) for b, theirs in enumerate(others) if mine.intersect(theirs) is not None]
    assert list(zip(*(indices.tolist() for indices in found), strict=True)) == pairs


def test_many_pairs_are_found_in_parts() -> None:
    rows = [Region((row, 0), (1, 9)) for row in range(1200)]
    whole = [Region((0, 0), (1200, 9))] * 700
    mine, theirs = Boxes.of(rows, 2).touching_pairs(Boxes.of(whole, 2))
    assert np.array_equal(mine, np.repeat(np.arange(1200), 700))
    assert np.array_equal(theirs, np.tile(np.arange(700), 1200))
