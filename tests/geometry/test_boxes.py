"""Many regions at once against each of them."""

from __future__ import annotations

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
