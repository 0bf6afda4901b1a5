"""Who writes what: checked against whole arrays."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.catalog import StoredTensor
from reshard.errors import CaptureError, UsageError
from reshard.format.metadata import decode_metadata, encode_metadata
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.planning.agreement import Holding, RankDescription, TensorDescription
from reshard.planning.file_plan import plan_rank_files
from reshard.planning.write_plan import plan_catalog
from reshard.state import GLOBAL_STEP, Kind, TensorKey, model_key, slot_key

FLOAT = by_name("float32")
DIRECTORY = "/root/iteration_00000001"


def held(key: TensorKey, shape: tuple[int, ...], *regions: Region, layout: Layout | None = None) -> TensorDescription:
    return TensorDescription(key, Holding(FLOAT, shape, layout, regions))


def under(layout: Layout, rank: int, key: TensorKey, shape: tuple[int, ...]) -> TensorDescription:
    return held(key, shape, layout.rank_region(rank, shape), layout=layout)


def ranks(*tensors: list[TensorDescription]) -> list[RankDescription]:
    return [RankDescription(rank, tuple(held)) for rank, held in enumerate(tensors)]


def catalog(descriptions, **options):
    return plan_catalog(descriptions, **{"prefix": "CKP", "save_optimizer": True, "directory": DIRECTORY} | options)


@st.composite
def layouts(draw) -> tuple[int, list[tuple[tuple[int, ...], Layout | None, bool]]]:
    """A world size, and tensors: shape, layout on all ranks in some order, whether the ranks say the layout."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 12))
    world = math.prod(sizes)
    order = tuple(draw(st.permutations(range(world))))
    mesh = Mesh(tuple(sizes), tuple(f"axis{i}" for i in range(len(sizes))), order)
    tensors = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        split: list[list[int]] = [[] for _ in shape]
        for axis in draw(st.permutations(range(len(sizes)))):
            place = draw(st.integers(-1, len(shape) - 1))
            if place >= 0:
                split[place].append(axis)
        tensors.append((shape, Layout(mesh, tuple(map(tuple, split))), draw(st.booleans())))
    return world, tensors


def check_layout(tensor: StoredTensor, layout: Layout, says: bool) -> None:
    shape = tensor.global_shape
    if 0 in shape or (says and not layout.is_even(shape)):
        assert tensor.layout is None
    elif says:
        assert tensor.layout == layout
    elif layout.is_even(shape):
        assert (tensor.layout is None) == (len(tensor.chunks) == 1)
    if tensor.layout is not None:
        for rank in tensor.layout.mesh.ranks:
            assert tensor.layout.rank_region(rank, shape) == layout.rank_region(rank, shape)


@given(layouts())
def test_what_the_ranks_write_is_every_tensor(case):
    """Files are filled as the plan says, and the catalog's chunks read from them are the whole arrays."""
    world, tensors = case
    wholes = {}
    for number, (shape, _, _) in enumerate(tensors):
        wholes[model_key(f"t{number}")] = np.arange(1, 1 + math.prod(shape), dtype=np.float32).reshape(shape)
    descriptions = []
    for rank in range(world):
        mine = []
        for (key, whole), (_, layout, says) in zip(wholes.items(), tensors, strict=True):
            mine.append(held(key, whole.shape, layout.rank_region(rank, whole.shape), layout=layout if says else None))
        descriptions.append(RankDescription(rank, tuple(mine)))
    files = {}
    for description in descriptions:
        by_key = {tensor.key: tensor for tensor in description.tensors}
        for plan in plan_rank_files(description, world, "CKP", save_optimizer=True):
            for entry in plan.entries:
                region = Region.whole(entry.shape) if 0 in entry.shape else by_key[entry.key].regions[entry.shard]
                assert region.shape == entry.shape
                files[plan.file_name, entry.name] = wholes[entry.key][region.slices]
    found = catalog(descriptions)
    assert list(found.tensors) == list(wholes)
    asked = set()
    for (key, whole), (shape, layout, says) in zip(wholes.items(), tensors, strict=True):
        tensor = found.tensors[key]
        again = np.full(whole.shape, -1, np.float32)
        for chunk in tensor.chunks:
            assert chunk.places
            holders = [rank for rank in range(world) if 0 in shape or chunk.region == layout.rank_region(rank, shape)]
            assert list(chunk.holders) == holders
            for place in chunk.places:
                again[chunk.region.slices] = files[place.file, place.name]
                assert place.rank in chunk.holders
                asked.add((place.file, place.name))
        assert np.array_equal(again, whole)
        check_layout(tensor, layout, says)
    assert asked == set(files)
    encoded = encode_metadata(found)
    assert decode_metadata(encoded, f"{DIRECTORY}/metadata.json").tensors == found.tensors


@given(st.integers(1, 5), st.integers(0, 12), st.data())
def test_any_regions_that_make_up_the_whole(world, size, data):
    """Regions of no layout, several on a rank."""
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, size - 1)), max_size=6)))
    edges = [0, *[cut for cut in cuts if cut < size], size]
    regions = [Region((a,), (b - a,)) for a, b in itertools.pairwise(edges)]
    mine: list[list[Region]] = [[] for _ in range(world)]
    for region in regions:
        for rank in data.draw(st.sets(st.integers(0, world - 1), min_size=1)):
            mine[rank].append(region)
    key = model_key("w")
    descriptions = ranks(*[[held(key, (size,), *own)] for own in mine])
    tensor = catalog(descriptions).tensors[key]
    written = {
        (plan.file_name, entry.name): own[entry.shard] if size else regions[0]
        for description, own in zip(descriptions, mine, strict=True)
        for plan in plan_rank_files(description, world, "CKP", save_optimizer=False)
        for entry in plan.entries
    }
    placed = {(place.file, place.name): chunk.region for chunk in tensor.chunks for place in chunk.places}
    assert placed == written
    assert sum(chunk.region.size for chunk in tensor.chunks) == size


def test_file_names_count_by_rank():
    description = RankDescription(3, tuple(held(key, (2,), Region.whole((2,))) for key in (model_key("w"), slot_key("adam_m", "w"))))
    model, optimizer = plan_rank_files(description, 8, "qwen3", save_optimizer=True)
    assert (model.file_name, optimizer.file_name) == ("qwen3-model-0000003-0000008.safetensors", "qwen3-opt-0000003-0000008.safetensors")
    assert [entry.name for entry in model.entries] == ["w"]
    assert [entry.name for entry in optimizer.entries] == ["adam_m.w"]
    assert model.nbytes == 8
    assert [plan.kind for plan in plan_rank_files(description, 8, None, save_optimizer=False)] == [Kind.MODEL]
    assert plan_rank_files(description, 8, None, save_optimizer=False)[0].file_name == "model-0000003-0000008.safetensors"


def test_a_rank_with_nothing_writes_empty_files():
    plans = plan_rank_files(RankDescription(0, ()), 2, "CKP", save_optimizer=True)
    assert [(plan.kind, plan.entries, plan.nbytes) for plan in plans] == [(Kind.MODEL, (), 0), (Kind.OPTIMIZER, (), 0)]


def test_several_parts_on_a_rank_are_numbered_and_empty_ones_left_out():
    key = model_key("w")
    regions = [Region((0,), (2,)), Region((2,), (0,)), Region((5,), (1,))]
    (plan,) = plan_rank_files(RankDescription(0, (held(key, (6,), *regions),)), 2, "CKP", save_optimizer=False)
    assert [(entry.name, entry.shard, entry.shape) for entry in plan.entries] == [("w", 0, (2,)), ("w@1", 2, (1,))]
    tensor = catalog(ranks([held(key, (6,), *regions)], [held(key, (6,), Region((2,), (3,)))])).tensors[key]
    places = [(chunk.region.offset, chunk.places[0].name, chunk.places[0].rank) for chunk in tensor.chunks]
    assert places == [((0,), "w", 0), ((5,), "w@1", 0), ((2,), "w", 1)]
    assert tensor.layout is None


def test_a_name_that_is_taken_by_a_part():
    parts = held(model_key("w"), (2,), Region((0,), (1,)), Region((1,), (1,)))
    with pytest.raises(CaptureError, match="same name") as caught:
        plan_rank_files(RankDescription(4, (parts, held(model_key("w@1"), (1,), Region.whole((1,))))), 8, "CKP", save_optimizer=True)
    assert (caught.value.tensor, caught.value.rank) == ("w@1", 4)


def test_the_order_is_rank_by_rank_model_first():
    whole = Region.whole((1,))
    keys = [slot_key("adam_m", "a"), model_key("a"), GLOBAL_STEP], [model_key("b"), GLOBAL_STEP, slot_key("adam_m", "b")]
    found = catalog(ranks(*[[held(key, (1,), whole) for key in mine] for mine in keys]))
    assert list(found.tensors) == [model_key("a"), slot_key("adam_m", "a"), GLOBAL_STEP, model_key("b"), slot_key("adam_m", "b")]
    (chunk,) = found.tensors[GLOBAL_STEP].chunks
    assert chunk.holders == (0, 1)
    assert [place.file for place in chunk.places] == ["CKP-opt-0000000-0000002.safetensors", "CKP-opt-0000001-0000002.safetensors"]


def test_without_optimizer_there_is_none_in_the_catalog():
    whole = Region.whole((1,))
    found = catalog(ranks([held(model_key("a"), (1,), whole), held(GLOBAL_STEP, (1,), whole)]), save_optimizer=False)
    assert list(found.tensors) == [model_key("a")]


def test_a_tensor_of_two_stages_keeps_the_first_layout_and_all_storage():
    """As the published implementation writes a tied embedding: `rank_list` of the first stage, storage of both."""
    stages = [Layout(Mesh((2,), ("tp",), pair), ((0,), ())) for pair in ((0, 1), (2, 3))]
    key, shape = model_key("embed"), (4, 3)
    found = catalog(ranks(*[[under(stages[rank // 2], rank, key, shape)] for rank in range(4)])).tensors[key]
    assert found.layout == stages[0]
    assert [(chunk.region.offset, chunk.holders) for chunk in found.chunks] == [((0, 0), (0, 2)), ((2, 0), (1, 3))]
    assert [[place.rank for place in chunk.places] for chunk in found.chunks] == [[0, 2], [1, 3]]


def test_a_second_stage_may_split_the_same_tensor_otherwise():
    key, shape = model_key("embed"), (4, 3)
    first = Layout(Mesh((2,), ("tp",), (0, 1)), ((0,), ()))
    second = Layout(Mesh((2,), ("tp",), (2, 3)), ((), ()))
    found = catalog(ranks(*[[under(first if rank < 2 else second, rank, key, shape)] for rank in range(4)])).tensors[key]
    assert found.layout == first
    assert [chunk.holders for chunk in found.chunks] == [(0,), (1,)]


def test_an_uneven_layout_is_none_and_chunks_say_where_they_lie():
    layout = Layout(Mesh((4,), ("dp",), (0, 1, 2, 3)), ((0,),))
    key = model_key("w")
    descriptions = ranks(*[[under(layout, rank, key, (5,))] for rank in range(4)])
    found = catalog(descriptions)
    assert found.tensors[key].layout is None
    chunks = [(chunk.region.offset, chunk.region.shape, chunk.holders) for chunk in found.tensors[key].chunks]
    assert chunks == [((0,), (2,), (0,)), ((2,), (2,), (1,)), ((4,), (1,), (2,))]
    assert plan_rank_files(descriptions[3], 4, "CKP", save_optimizer=False)[0].entries == ()
    entry = json.loads(encode_metadata(found))["state_dict_metadata"]["w"]
    assert entry["layout"] is None
    # The last one is empty and stored nowhere: for its sake the published reader refuses the tensor.
    assert [(chunk["global_offset"], chunk["local_shape"]) for chunk in entry["chunk"]] == [([1], [2]), ([2], [2]), ([3], [1]), ([4], [0])]


def test_a_tensor_without_elements_is_written_whole():
    key = model_key("none")
    for layout in (None, Layout(Mesh((2,), ("dp",), (0, 1)), ((0,), ()))):
        descriptions = ranks(*[[held(key, (4, 0), Region((2 * rank, 0), (2, 0)), layout=layout)] for rank in range(2)])
        (chunk,) = catalog(descriptions).tensors[key].chunks
        assert (chunk.region, chunk.holders) == (Region.whole((4, 0)), (0, 1))
        assert plan_rank_files(descriptions[1], 2, "CKP", save_optimizer=False)[0].entries[0].shape == (4, 0)


def test_a_zero_dimensional_tensor():
    key = model_key("count")
    (chunk,) = catalog(ranks([held(key, (), Region((), ()))])).tensors[key].chunks
    assert chunk.region == Region((), ())


@pytest.mark.parametrize(
    ("regions", "says"),
    [
        ([Region((0,), (2,)), Region((3,), (1,))], "3 of 4 elements"),
        ([Region((0,), (3,)), Region((2,), (2,))], "overlap"),
        ([Region((0,), (2,)), Region((2,), (3,))], "outside"),
    ],
)
def test_parts_that_do_not_make_up_the_whole(regions, says):
    with pytest.raises(CaptureError, match="make up the whole") as caught:
        catalog(ranks(*[[held(slot_key("adam_m", "w"), (4,), region)] for region in regions]))
    assert caught.value.tensor == "adam_m.w"
    assert says in str(caught.value.found)


def test_a_part_that_is_not_where_its_layout_says():
    layout = Layout(Mesh((2,), ("tp",), (0, 1)), ((0,),))
    swapped = ranks(*[[held(model_key("w"), (4,), layout.rank_region(1 - rank, (4,)), layout=layout)] for rank in range(2)])
    with pytest.raises(CaptureError, match="not where its layout says") as caught:
        catalog(swapped)
    assert (caught.value.tensor, caught.value.rank) == ("w", 0)


def test_a_rank_outside_its_layouts_mesh():
    layout = Layout(Mesh((1,), ("tp",), (7,)), ((),))
    with pytest.raises(CaptureError, match="not in the mesh"):
        catalog(ranks([held(model_key("w"), (4,), Region.whole((4,)), layout=layout)]))


def test_a_prefix_that_is_a_path():
    with pytest.raises(UsageError, match="prefix"):
        plan_rank_files(RankDescription(0, ()), 1, "../x", save_optimizer=False)
