"""Layouts against numpy, PyTorch's own split, and ids seen in real checkpoints."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import LayoutError
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.tensor_map import layout_from_tensor_map, replica_ids, slices_of, tensor_map_of
from reshard.testing import every_placement, mesh_of, part_by_array_split, slice_of, split

AXES = ("dp", "ep", "tp")


@st.composite
def layouts(draw: st.DrawFn, even: bool = False) -> tuple[Layout, tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    ranks = draw(st.permutations(range(100, 100 + math.prod(shape))))
    mesh = Mesh(shape, AXES[: len(shape)], tuple(ranks))
    dimensions = draw(st.integers(0, 3))
    layout = split(mesh, *draw(st.sampled_from(every_placement(dimensions, mesh.axes))))
    extents = tuple(draw(st.integers(0, 3)) * parts if even else draw(st.integers(0, 13)) for parts in layout.fragments)
    return layout, extents


@given(layouts())
def test_regions_are_what_numpy_splits(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    seen = np.zeros(shape, int)
    for rank in layout.mesh.ranks:
        region = layout.rank_region(rank, shape)
        assert np.array_equal(slice_of(whole, region), part_by_array_split(whole, layout, rank))
        seen[region.slices] += 1
    copies = len(layout.mesh.ranks) // math.prod(layout.fragments)
    assert (seen == copies).all()


@given(layouts())
def test_all_places_at_once_are_each_of_them(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    places = range(len(layout.mesh.ranks))
    assert layout.regions(shape).regions() == [layout.region(position, shape) for position in places]
    assert layout.slice_ids().tolist() == [layout.slice_id(position) for position in places]
    slices: dict[int, Region] = {}
    for position in places:
        slices.setdefault(layout.slice_id(position), layout.region(position, shape))
    found = slices_of(layout, shape)
    assert list(found.items()) == list(slices.items())


@given(layouts(even=True))
def test_slice_ids_number_the_parts_in_row_major_order(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, shape = case
    assert layout.is_even(shape)
    for position in range(len(layout.mesh.ranks)):
        region = layout.region(position, shape)
        parts = np.unravel_index(layout.slice_id(position), layout.fragments) if layout.fragments else ()
        extents = tuple(size // count for size, count in zip(shape, layout.fragments, strict=True))
        assert region.shape == extents
        assert region.offset == tuple(int(part) * extent for part, extent in zip(parts, extents, strict=True))


@given(layouts())
def test_replicas_are_numbered_among_those_that_hold_the_same(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, _ = case
    ids = [layout.slice_id(position) for position in range(len(layout.mesh.ranks))]
    assert replica_ids(layout) == [ids[:position].count(number) for position, number in enumerate(ids)]


@given(layouts())
def test_the_contracts_fields_carry_a_layout(case: tuple[Layout, tuple[int, ...]]) -> None:
    layout, _ = case
    mesh = layout.mesh
    assert layout_from_tensor_map(mesh.shape, tensor_map_of(layout), mesh.axes, mesh.ranks) == layout


def test_ids_seen_in_a_real_checkpoint() -> None:
    """Optimizer-parallel embedding of a published checkpoint: dimension 0 by tp, then dp, then cp; chunks of ranks 0..3 are 0, 2, 1, 3."""
    layout = layout_from_tensor_map([2, 1, 2], [[0, 2, 1], -1], ["a", "b", "c"], [0, 1, 2, 3])
    assert [layout.slice_id(position) for position in range(4)] == [0, 2, 1, 3]
    assert layout.rank_region(2, (128, 32)).offset == (32, 0)
    assert layout.fragments == (4, 1)


def test_position_is_found_in_any_rank_list() -> None:
    """Stage 1 of a pipeline, and ranks out of order: position in the list, not rank modulo its length."""
    layout = split(Mesh((2, 2), ("dp", "tp"), (6, 4, 7, 5)), "tp", None)
    assert [layout.slice_id(layout.mesh.position(rank)) for rank in (4, 5, 6, 7)] == [1, 1, 0, 0]
    with pytest.raises(LayoutError, match="not in the mesh"):
        layout.rank_region(0, (4, 4))


def test_several_axes_split_one_after_the_other() -> None:
    """Seven rows by tp=2 then dp=2: 4 and 3 rows, then 2+2 and 2+1."""
    layout = split(mesh_of(dp=2, tp=2), ("tp", "dp"))
    regions = [layout.rank_region(rank, (7,)) for rank in range(4)]
    assert [(r.offset[0], r.shape[0]) for r in regions] == [(0, 2), (4, 2), (2, 2), (6, 1)]


@pytest.mark.parametrize(
    ("shape", "axes", "ranks"),
    [
        ((2,), ("a", "b"), (0, 1)),
        ((2, 0), ("a", "b"), ()),
        ((2, 1), ("a", "a"), (0, 1)),
        ((2,), ("None",), (0, 1)),
        ((2,), ("",), (0, 1)),
        ((3,), ("a",), (0, 1)),
    ],
)
def test_impossible_meshes_are_refused(shape: tuple[int, ...], axes: tuple[str, ...], ranks: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError):
        Mesh(shape, axes, ranks)


def test_impossible_layouts_are_refused() -> None:
    mesh = mesh_of(dp=2, tp=2)
    with pytest.raises(LayoutError, match="at most once"):
        Layout(mesh, ((0,), (0,)))
    with pytest.raises(LayoutError, match="doesn't have"):
        Layout(mesh, ((2,),))
    with pytest.raises(LayoutError, match="numbers of dimensions"):
        split(mesh, "dp").rank_region(0, (4, 4))
    with pytest.raises(LayoutError, match="tensor_map"):
        layout_from_tensor_map([2, 2], [2, -1], ["a", "b"], [0, 1, 2, 3])
