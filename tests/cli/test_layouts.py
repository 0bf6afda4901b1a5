"""How tensors on ranks are said and drawn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reshard.catalog import Chunk, Place, StoredTensor
from reshard.cli.layouts import draw, layout_words, ranks_of, tensor_ranks
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.state import model_key
from tests.catalogs import stored_tensor


def stored(shape: tuple[int, ...], *chunks: tuple[Region, tuple[int, ...]], layout: Layout | None = None) -> StoredTensor:
    return stored_tensor(
        model_key("w"),
        by_name("float32"),
        shape,
        layout,
        tuple(Chunk(region, (Place(f"m-{ranks[0]}", "w", ranks[0]),), ranks) for region, ranks in chunks),
    )


def laid_out(shape: tuple[int, ...], mesh: Mesh, split: tuple[tuple[int, ...], ...]) -> StoredTensor:
    layout = Layout(mesh, split)
    holders: dict[Region, list[int]] = {}
    for position, rank in enumerate(mesh.ranks):
        region = layout.region(position, shape)
        # An empty shard of an uneven split is never stored.
        if not region.is_empty:
            holders.setdefault(region, []).append(rank)
    return stored(shape, *((region, tuple(sorted(ranks))) for region, ranks in holders.items()), layout=layout)


CUBE = Mesh((2, 1, 2), ("dp", "cp", "tp"), (0, 1, 2, 3))


def test_words_name_the_axes_that_split_and_those_that_replicate() -> None:
    assert layout_words(laid_out((8, 4), CUBE, ((2,), ()))) == "dim 0 over tp(2), replicated over dp(2)"
    assert layout_words(laid_out((8, 4), CUBE, ((2,), (0,)))) == "dim 0 over tp(2), dim 1 over dp(2)"
    assert layout_words(laid_out((8, 4), CUBE, ((), ()))) == "replicated over dp(2), tp(2)"


def test_several_axes_of_one_dimension_are_said_outermost_first() -> None:
    assert layout_words(laid_out((8, 4), CUBE, ((2, 0, 1), ()))) == "dim 0 over tp(2) then dp(2)"


def test_one_rank_holds_it_whole() -> None:
    assert layout_words(laid_out((8,), Mesh((1,), ("dp",), (0,)), ((0,),))) == "whole"


def test_without_a_layout_the_regions_are_counted() -> None:
    whole = Region.whole((5,))
    assert layout_words(stored((5,), (whole, (0,)))) == "whole"
    uneven = stored((5,), (Region((0,), (3,)), (0,)), (Region((3,), (2,)), (1,)))
    assert layout_words(uneven) == "2 regions, in no even layout"


def test_a_matrix_split_both_ways_is_drawn_as_a_grid() -> None:
    assert draw(laid_out((8, 4), CUBE, ((2,), (0,)))) == [
        "            dim 1",
        "            0:2   2:4",
        "          ┌─────┬─────┐",
        "dim 0 0:4 │  0  │  2  │",
        "          ├─────┼─────┤",
        "      4:8 │  1  │  3  │",
        "          └─────┴─────┘",
    ]


def test_a_later_dimension_alone_runs_across() -> None:
    assert draw(laid_out((8, 4), CUBE, ((), (2,)))) == [
        "  dim 1",
        "  0:2   2:4",
        "┌─────┬─────┐",
        "│ 0,2 │ 1,3 │",
        "└─────┴─────┘",
    ]


def test_uneven_parts_are_drawn_where_they_lie() -> None:
    assert draw(stored((5,), (Region((0,), (3,)), (0,)), (Region((3,), (2,)), (1,)))) == [
        "          ┌───┐",
        "dim 0 0:3 │ 0 │",
        "          ├───┤",
        "      3:5 │ 1 │",
        "          └───┘",
    ]


def test_what_is_no_grid_is_not_drawn() -> None:
    brick = stored((4, 4), (Region((0, 0), (2, 4)), (0,)), (Region((2, 0), (2, 1)), (1,)), (Region((2, 1), (2, 3)), (2,)))
    assert draw(brick) is None
    assert draw(stored((4,), (Region.whole((4,)), (0, 1)))) is None
    assert draw(stored((17,), *((Region((i,), (1,)), (i,)) for i in range(17)))) is None
    three = Mesh((2, 2, 2), ("a", "b", "c"), tuple(range(8)))
    assert draw(laid_out((4, 4, 4), three, ((0,), (1,), (2,)))) is None


def test_ranks_come_from_the_holders_or_else_from_who_wrote_it() -> None:
    written = Chunk(Region.whole((2,)), (Place("a", "w", 3), Place("b", "w", 1)))
    assert ranks_of(written) == (1, 3)
    assert ranks_of(Chunk(written.region, written.places, holders=(0, 1, 2, 3))) == (0, 1, 2, 3)
    assert tensor_ranks(laid_out((8, 4), CUBE, ((2,), ()))) == {0, 1, 2, 3}


@given(st.data())
def test_the_box_of_every_rank_is_drawn_where_its_region_lies(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=2))
    mesh = Mesh(tuple(sizes), ("x", "y"), tuple(range(sizes[0] * sizes[1])))
    split = data.draw(st.sampled_from([((0,), (1,)), ((1,), (0,)), ((0, 1), ()), ((), (1,)), ((0,), ())]))
    shape = tuple(data.draw(st.integers(1, 3)) * 16 for _ in range(2))
    tensor = laid_out(shape, mesh, split)
    lines = draw(tensor)
    if lines is None:
        rows, columns = (len({chunk.region.offset[d] for chunk in tensor.chunks}) for d in range(2))
        assert (rows, columns) == (1, 1) or rows > 16 or columns > 8
        return
    boxes = [line.split("│")[1:-1] for line in lines if "│" in line]
    drawn = {int(rank) for row in boxes for cell in row for rank in _ranks_in(cell)}
    assert drawn == {rank for chunk in tensor.chunks for rank in ranks_of(chunk)}
    for chunk in tensor.chunks:
        row = sorted({c.region.offset[0] for c in tensor.chunks}).index(chunk.region.offset[0])
        column = sorted({c.region.offset[1] for c in tensor.chunks}).index(chunk.region.offset[1])
        assert set(_ranks_in(boxes[row][column])) == set(ranks_of(chunk))


def _ranks_in(cell: str) -> list[int]:
    ranks = []
    for part in cell.strip().split(","):
        first, _, last = part.partition("-")
        ranks += range(int(first), int(last or first) + 1)
    return ranks
