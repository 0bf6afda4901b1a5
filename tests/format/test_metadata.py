"""`metadata.json`: what the published implementation wrote comes out again, and any catalog survives."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.catalog import Catalog, Chunk, Place
from reshard.errors import CaptureError, LayoutError, MetadataError
from reshard.format.metadata import decode_metadata, encode_metadata
from reshard.format.names import data_file_name, tensor_name
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import ALL, by_name
from reshard.geometry.tensor_map import replica_ids, slices_of, tensor_map_of
from reshard.state import Kind, TensorKey, model_key, slot_key
from reshard.version import __version__
from tests.catalogs import stored_tensor
from tests.golden import WITH_METADATA, iteration

F32 = by_name("float32")


def golden(case):
    path = iteration(case) / "metadata.json"
    return path.read_bytes(), str(path)


@pytest.mark.parametrize("case", WITH_METADATA)
def test_a_golden_catalog_is_written_as_it_was(case):
    data, path = golden(case)
    catalog = decode_metadata(data, path)
    ours, theirs = json.loads(encode_metadata(catalog)), json.loads(data)
    assert ours.pop("format_version") == 2
    assert ours.pop("writer") == f"reshard {__version__}"
    for name, parameter in ours["state_dict_metadata"].items():
        tensor = catalog.tensors[next(key for key in catalog.tensors if tensor_name(key) == name)]
        for chunk, stored in zip(parameter["chunk"], tensor.chunks, strict=True):
            assert tuple(chunk.pop("offset")) == stored.region.offset
    # Compared as text: the order of keys counts, at every level.
    assert json.dumps(ours["state_dict_metadata"]) == json.dumps(theirs["state_dict_metadata"])
    assert list(ours) == list(theirs)
    assert {key: json.dumps(value) for key, value in ours["storage_data"].items()} == {
        key: json.dumps(value) for key, value in theirs["storage_data"].items()
    }
    if not case.endswith("_rr"):  # with redundancy removed the order of storage is the plan's, and free
        assert list(ours["storage_data"]) == list(theirs["storage_data"])


@pytest.mark.parametrize("case", WITH_METADATA)
def test_a_golden_catalog_comes_back(case):
    data, path = golden(case)
    catalog = decode_metadata(data, path)
    assert catalog.directory == str(iteration(case))
    assert decode_metadata(encode_metadata(catalog), path) == catalog


def test_what_golden_metadata_means():
    data, path = golden("dp2_tp2_optshard_rr")
    tensor = decode_metadata(data, path).tensors[model_key("embedding.word_embeddings.weight")]
    assert tensor.global_shape == (128, 32)
    assert tensor.layout == Layout(Mesh((2, 1, 2), ("a", "b", "c"), (0, 1, 2, 3)), ((2, 0, 1), ()))
    # Rank 1 holds rows 64 to 95: tensor parallelism splits first, then the optimizer.
    assert [(chunk.region.offset[0], chunk.holders) for chunk in tensor.chunks] == [(0, (0,)), (64, (1,)), (32, (2,)), (96, (3,))]
    data, path = golden("dp2_tp2_pp2_rr")
    tensor = decode_metadata(data, path).tensors[slot_key("adam_m", "output_layer.weight")]
    assert tensor.layout is not None
    assert tensor.layout.mesh.ranks == (4, 5, 6, 7)
    assert {rank for chunk in tensor.chunks for rank in chunk.holders} == {4, 5, 6, 7}


_names = st.one_of(
    st.text(string.ascii_letters + "._0123456789", min_size=1, max_size=12),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
    st.sampled_from(["it's", '"', "a', (0,))", "a, (1,))", "\\", "\n", "層.重み", "😀", "__metadata__", "a:b", "__dict__", "('w', (0,))"]),
)


@st.composite
def keys(draw):
    if draw(st.booleans()):
        return model_key(draw(_names))
    return slot_key(draw(_names).replace(".", "_"), draw(st.just("") | _names))


@st.composite
def layouts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    size = prod(shape)
    ranks = tuple(draw(st.permutations(range(size + 3)))[:size])
    mesh = Mesh(shape, ("dp", "cp", "tp")[: len(shape)], ranks)
    axes = draw(st.permutations(range(len(shape))))
    split = [[] for _ in range(draw(st.integers(0, 3)))]
    for axis in axes:
        where = draw(st.integers(-1, len(split) - 1))
        if where >= 0:
            split[where].append(axis)
    return Layout(mesh, tuple(map(tuple, split)))


@st.composite
def stored_tensors(draw, key):
    layout = draw(layouts())
    even = draw(st.booleans())
    shape = (
        tuple(n * draw(st.integers(0 if even else 1, 3)) for n in layout.fragments)
        if even
        else tuple(draw(st.integers(0, 9)) for _ in layout.split)
    )
    kept = layout if layout.is_even(shape) and draw(st.booleans()) else None
    holders = {}
    for rank in layout.mesh.ranks:
        holders.setdefault(layout.rank_region(rank, shape), []).append(rank)
    # Without a layout empty parts are left out; with one, each of its slices is there.
    regions = [region for region in holders if kept is not None or not region.is_empty]
    if kept is None and draw(st.booleans()):
        regions = draw(st.permutations(regions))
    chunks = []
    for region in regions:
        ranks = sorted(holders[region])
        if region.is_empty and draw(st.booleans()):
            chunks.append(Chunk(region, ()))
            continue
        writers = ranks if draw(st.booleans()) else ranks[:1]
        name = tensor_name(key) + draw(st.sampled_from(["", "@1"]))
        places = tuple(
            Place(data_file_name(draw(st.sampled_from([None, "CKP", "qwen3-x"])), key.kind, rank, 99), name, rank) for rank in writers
        )
        chunks.append(Chunk(region, places, draw(st.sampled_from([tuple(ranks), ()]))))
    return stored_tensor(key, draw(st.sampled_from(ALL)), shape, kept, tuple(chunks))


@st.composite
def catalogs(draw):
    found = {tensor_name(key): key for key in draw(st.lists(keys(), max_size=6))}
    return Catalog("/root/iteration_00000001", {key: draw(stored_tensors(key)) for key in found.values()})


@given(catalogs())
def test_any_catalog_comes_back(catalog):
    data = encode_metadata(catalog)
    assert data.isascii()
    assert b"\n" not in data
    assert b'": ' not in data or any(": " in tensor_name(key) for key in catalog.tensors)
    assert decode_metadata(data, "/root/iteration_00000001/metadata.json") == catalog
    assert encode_metadata(decode_metadata(data, "/root/iteration_00000001/metadata.json")) == data


@given(catalogs())
def test_any_catalog_is_written_as_the_contract_says(catalog):
    document = json.loads(encode_metadata(catalog))
    assert list(document) == ["state_dict_metadata", "storage_data", "format_version", "writer"]
    storage = document["storage_data"]
    for tensor in catalog.tensors.values():
        name = tensor_name(tensor.key)
        parameter = document["state_dict_metadata"][name]
        layout = tensor.layout
        assert list(parameter)[:5] == ["properties", "global_shape", "axis_fragmentations", "layout", "chunk"]
        assert parameter["properties"] == {
            "dtype": tensor.dtype.mindspore,
            "replica_id": 0 if layout is None else replica_ids(layout),
            "allow_shape_mismatch": False,
            "allow_to_save": True,
        }
        assert tuple(parameter["global_shape"]) == tensor.global_shape
        if layout is None:
            assert parameter["layout"] is None
            assert parameter["axis_fragmentations"] == [1] * len(tensor.global_shape)
        else:
            device_matrix, tensor_map, interleaved_parallel, alias_name, rank_list = parameter["layout"].values()
            assert (device_matrix, alias_name, rank_list) == (list(layout.mesh.shape), list(layout.mesh.axes), list(layout.mesh.ranks))
            assert tensor_map == tensor_map_of(layout)
            assert interleaved_parallel is False
            assert parameter["axis_fragmentations"] == list(layout.fragments)
        numbers = [chunk["global_offset"] for chunk in parameter["chunk"]]
        if layout is None and len(numbers) > 1:
            assert numbers == [[n] for n in range(1, len(numbers) + 1)], "0 means the whole tensor"
            nothing = [0] * len(tensor.global_shape)
            assert parameter["chunk"].pop() == {"global_offset": numbers.pop(), "local_shape": nothing, "offset": nothing}
        for chunk, (number,), written in zip(tensor.chunks, numbers, parameter["chunk"], strict=True):
            assert written == {"global_offset": [number], "local_shape": list(chunk.region.shape), "offset": list(chunk.region.offset)}
            if layout is not None:
                assert slices_of(layout, tensor.global_shape)[number] == chunk.region
            for entry, place in zip(storage.pop(str((name, (number,))), []), chunk.places, strict=True):
                assert entry["file_name"] == place.file
                assert entry["storage_rank"] == place.rank
                assert entry.get("rank_group", []) == list(chunk.holders)
    assert storage == {}


W = model_key("w")


def one(layout, shape, chunks, key=W):
    return Catalog("/c", {key: stored_tensor(key, F32, shape, layout, tuple(chunks))})


def at(offset, shape, rank=0, file=None, name="w"):
    return Chunk(Region(offset, shape), (Place(file or data_file_name("CKP", Kind.MODEL, rank, 2), name, rank),), (rank,))


TWO = Mesh((2,), ("tp",), (0, 1))


def test_a_layout_that_splits_unevenly_cannot_be_said():
    catalog = one(Layout(TWO, ((0,),)), (5,), [at((0,), (3,)), at((3,), (2,), 1)])
    again = decode_metadata(encode_metadata(catalog), "/c/metadata.json")
    assert again == one(None, (5,), catalog.tensors[model_key("w")].chunks)


def test_the_interleaved_axis_is_marked():
    mesh = Mesh((2, 2), ("tp", "interleaved_parallel"), (0, 0, 1, 1))
    catalog = one(Layout(mesh, ((0,),)), (4,), [at((0,), (2,)), at((2,), (2,), 1)])
    data = encode_metadata(catalog)
    assert json.loads(data)["state_dict_metadata"]["w"]["layout"]["interleaved_parallel"] is True
    assert decode_metadata(data, "/c/metadata.json") == catalog


def test_chunks_of_a_layout_are_written_in_the_order_of_its_ranks():
    chunks = [at((0,), (2,)), at((2,), (2,), 1)]
    layout = Layout(TWO, ((0,),))
    assert encode_metadata(one(layout, (4,), chunks[::-1])) == encode_metadata(one(layout, (4,), chunks))


@pytest.mark.parametrize(
    ("catalog", "error", "said"),
    [
        (one(None, (4,), [at((0,), (2,))]), LayoutError, "hold 2 of 4"),
        (one(None, (4,), [at((0,), (3,)), at((2,), (2,))]), LayoutError, "overlap"),
        (one(None, (4,), [at((0,), (5,))]), LayoutError, "outside"),
        (one(Layout(TWO, ((0,),)), (4,), [at((0,), (2,))]), LayoutError, "slices of its layout"),
        (one(Layout(TWO, ((0,),)), (4,), [at((0,), (4,))]), LayoutError, "slices of its layout"),
        (one(None, (4,), [Chunk(Region((0,), (4,)), ())]), MetadataError, "stored nowhere"),
        (one(None, (4,), [at((0,), (4,), file="../w.safetensors")]), MetadataError, "can't hold it"),
        (one(None, (4,), [at((0,), (4,), file="CKP-opt-0000000-0000001.safetensors")]), MetadataError, "can't hold it"),
        (one(None, (4,), [at((0,), (4,))], TensorKey(Kind.MODEL, None, "")), CaptureError, "can't be named"),
    ],
)
def test_a_catalog_that_is_no_checkpoint_is_not_written(catalog, error, said):
    with pytest.raises(error, match=said):
        encode_metadata(catalog)


def test_two_tensors_of_one_name_are_not_written():
    model, slot = model_key("m.w"), slot_key("m", "w")
    chunk = at((0,), (4,), name="m.w")
    other = replace(chunk, places=(Place("CKP-opt-0000000-0000002.safetensors", "m.w", 0),))
    catalog = Catalog("/c", {model: stored_tensor(model, F32, (4,), None, (chunk,)), slot: stored_tensor(slot, F32, (4,), None, (other,))})
    with pytest.raises(CaptureError, match=r"same name(.|\n)*m\.w"):
        encode_metadata(catalog)
