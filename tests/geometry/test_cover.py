from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.geometry import Region
from reshard.geometry.boxes import Boxes
from reshard.geometry.cover import cover_fault, find_covered, find_overlap

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


@given(st.lists(_regions, max_size=5), st.sampled_from([(4, 4), (8, 8), (0, 4), (5, 2)]), st.integers(0, 2**32))
def test_many_tensors_at_once_against_counting(tensors, shape, seed):
    random = np.random.default_rng(seed)
    # Random regions hardly ever cover anything: among them are some that do, whole or with one region moved.
    tensors = [*tensors, _pieces(random, Region((0, 0), shape)), _pieces(random, Region((0, 0), shape))]
    if tensors[-1] and random.random() < 0.5:
        moved = tensors[-1][0]
        tensors[-1][0] = Region((moved.offset[0] + 1, moved.offset[1]), moved.shape)
    owners = np.repeat(np.arange(len(tensors)), [len(regions) for regions in tensors])
    order = random.permutation(len(owners))
    flat = [region for regions in tensors for region in regions]
    boxes = Boxes.of([flat[index] for index in order], 2)
    found = find_covered(boxes, owners[order], np.array([shape] * len(tensors)).T)
    for regions, covered in zip(tensors, found.tolist(), strict=True):
        counts = np.zeros((12, 12), int)
        for region in regions:
            counts[region.slices] += 1
        inside = all(region.fits(shape) for region in regions)
        assert covered == (inside and bool((counts[: shape[0], : shape[1]] == 1).all()))


def _pieces(random: np.random.Generator, region: Region) -> list[Region]:
    """A region cut at random, each part again."""
    extents = [d for d, extent in enumerate(region.shape) if extent > 1]
    if not extents or random.random() < 0.3:
        return [region]
    d = random.choice(extents)
    at = int(random.integers(1, region.shape[d]))
    first = tuple(at if i == d else extent for i, extent in enumerate(region.shape))
    rest = tuple(extent - at if i == d else extent for i, extent in enumerate(region.shape))
    moved = tuple(offset + at if i == d else offset for i, offset in enumerate(region.offset))
    return [*_pieces(random, Region(region.offset, first)), *_pieces(random, Region(moved, rest))]


@pytest.mark.parametrize(
    ("shape", "regions"),
    [
        ((), [Region((), ())]),
        ((2,) * 8, [Region((0,) * 8, (1, *(2,) * 7)), Region((1, *(0,) * 7), (1, *(2,) * 7))]),
        ((2**31, 2**31), [Region((0, 0), (2**30, 2**31)), Region((2**30, 0), (2**30, 2**31))]),
    ],
)
def test_shapes_that_no_array_has(shape, regions):
    for given_regions, covered in ((regions, True), (regions[1:], False), ([*regions, regions[0]], False)):
        boxes, owners = Boxes.of(given_regions, len(shape)), np.zeros(len(given_regions), np.intp)
        assert find_covered(boxes, owners, np.array([shape], np.int64).T).tolist() == [covered]


def test_numbers_that_overflow_cover_nothing():
    boxes = Boxes(np.array([[0, 2**62]]), np.array([[4, 2**62 + 2**61]]))
    assert find_covered(boxes, np.zeros(2, np.intp), np.array([[4]])).tolist() == [False]


def test_no_tensors():
    assert find_covered(Boxes.of([], 2), np.empty(0, np.intp), np.empty((2, 0), np.int64)).tolist() == []
