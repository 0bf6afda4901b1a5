from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.geometry import Region
from reshard.geometry.cover import cover_fault, find_overlap

_regions = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3)).map(lambda t: Region(t[:2], t[2:])), max_size=6
)


@given(_regions)
def test_against_counting_every_element(regions):
    counts = np.zeros((8, 8), int)
    for region in regions:
        counts[region.slices] += 1
    overlap = find_overlap(regions)
    assert (overlap is not None) == bool((counts > 1).any())
    if overlap is not None:
        assert overlap[0].intersect(overlap[1]) is not None
    for shape in ((4, 4), (8, 8), (0, 4)):
        inside = all(region.fits(shape) for region in regions)
        right = inside and bool((counts[: shape[0], : shape[1]] == 1).all())
        assert (cover_fault(regions, shape) is None) == right


@pytest.mark.parametrize(
    ("regions", "shape", "said"),
    [
        ([Region((), ())], (), None),
        ([], (), "hold 0 of 1"),
        ([Region((), ()), Region((), ())], (), "overlap"),
        ([], (0, 3), None),
        ([Region((0, 0), (0, 3))], (0, 3), None),
        ([Region((0,), (3,))], (3, 1), "outside"),
    ],
)
def test_few_dimensions_and_none(regions, shape, said):
    fault = cover_fault(regions, shape)
    assert (fault is None) if said is None else said in fault


def test_many_regions_of_one_tensor():
    rows = [Region((row, 0), (1, 8)) for row in range(20_000)]
    columns = [Region((0, column), (8, 1)) for column in range(20_000)]
    assert cover_fault(rows, (20_000, 8)) is None
    assert cover_fault(columns, (8, 20_000)) is None
    assert "overlap" in cover_fault([*columns, Region((7, 19_999), (1, 1))], (8, 20_000))
