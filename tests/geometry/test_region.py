"""Regions against numpy index sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import LayoutError
from reshard.geometry import Region

SHAPE = (7, 6, 5)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    offset, shape = [], []
    for extent in SHAPE:
        begin = draw(st.integers(0, extent))
        offset.append(begin)
        shape.append(draw(st.integers(0, extent - begin)))
    return Region(tuple(offset), tuple(shape))


def elements(region: Region) -> set[int]:
    return set(np.arange(np.prod(SHAPE)).reshape(SHAPE)[region.slices].reshape(-1).tolist())


@given(regions(), regions())
def test_intersection_is_that_of_the_element_sets(a: Region, b: Region) -> None:
    common = a.intersect(b)
    assert (elements(common) if common else set()) == elements(a) & elements(b)
    assert common is None or not common.is_empty
    assert a.contains(b) == (elements(b) <= elements(a))


@given(regions(), regions())
def test_relative_coordinates_name_the_same_elements(a: Region, b: Region) -> None:
    common = a.intersect(b)
    if common is not None:
        whole = np.arange(np.prod(SHAPE)).reshape(SHAPE)
        assert np.array_equal(whole[a.slices][common.relative_to(a).slices], whole[common.slices])


def test_a_0d_region_has_one_element() -> None:
    region = Region.whole(())
    assert region.size == 1
    assert not region.is_empty
    assert region.intersect(region) == region
    assert np.array(5)[region.slices] == 5


@pytest.mark.parametrize(("offset", "shape"), [((0,), (1, 2)), ((-1,), (2,)), ((0,), (-2,))])
def test_impossible_regions_are_refused(offset: tuple[int, ...], shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        Region(offset, shape)


def test_fits_and_end() -> None:
    assert Region((2, 0), (3, 4)).fits((5, 4))
    assert not Region((2, 0), (3, 4)).fits((4, 4))
    assert not Region((2, 0), (3, 4)).fits((5, 4, 1))
    assert Region((2, 0), (3, 4)).end == (5, 4)
