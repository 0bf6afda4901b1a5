"""Metadata that nobody vouches for: each fault is an error that says what and where."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import DamagedCheckpointError, MetadataError, ReshardError
from reshard.format.metadata import decode_metadata
from reshard.geometry.dtypes import by_name
from reshard.state import GLOBAL_STEP, Kind, model_key, slot_key
from tests.faults import HOSTILE
from tests.golden import iteration

FILE = "/root/iteration_00000001/metadata.json"


def parameter(shape, layout, chunks, fragments=None, dtype="Float32"):
    return {
        "properties": {"dtype": dtype, "replica_id": 0, "allow_shape_mismatch": False, "allow_to_save": True},
        "global_shape": shape,
        "axis_fragmentations": fragments or [1] * len(shape),
        "layout": layout,
        "chunk": chunks,
    }


def layout(device_matrix, tensor_map, alias, ranks, interleaved=False):
    return {
        "device_matrix": device_matrix,
        "tensor_map": tensor_map,
        "interleaved_parallel": interleaved,
        "alias_name": alias,
        "rank_list": ranks,
    }


def chunk(number, shape, offset=None):
    return {"global_offset": [number], "local_shape": shape} | ({} if offset is None else {"offset": offset})


def stored(rank=0, file=None, **more):
    return [{"file_name": file or f"CKP-model-000000{rank}-0000002.safetensors", "storage_rank": rank, "rank_group": [rank]} | more]


def good():
    """Two ranks; `w` split by columns, `free` without a layout in two uneven chunks, `whole` without a layout."""
    return {
        "state_dict_metadata": {
            "w": parameter([4, 6], layout([2], [-1, 0], ["tp"], [0, 1]), [chunk(0, [4, 3], [0, 0]), chunk(1, [4, 3], [0, 3])], [1, 2]),
            "free": parameter([5], None, [chunk(1, [3], [0]), chunk(2, [2], [3])]),
            "whole": parameter([2, 2], None, [chunk(0, [2, 2])]),
        },
        "storage_data": {
            "('w', (0,))": stored(0),
            "('w', (1,))": stored(1),
            "('free', (1,))": stored(0),
            "('free', (2,))": stored(1, name="free@1"),
            "('whole', (0,))": stored(0),
        },
    }


def decode(document):
    data = document if isinstance(document, bytes) else json.dumps(document, separators=(",", ":")).encode()
    return decode_metadata(data, FILE)


def test_the_metadata_that_is_damaged_below_is_good_before():
    catalog = decode(good())
    assert catalog.notes == ()
    assert [[c.region.offset for c in t.chunks] for t in catalog.tensors.values()] == [[(0, 0), (0, 3)], [(0,), (3,)], [(0, 0)]]
    assert catalog.tensors[model_key("free")].chunks[1].places[0].name == "free@1"


GOOD = json.dumps(good(), separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not JSON"),
        (GOOD[:-1], "not JSON"),
        (GOOD[: len(GOOD) // 2], "not JSON"),
        (GOOD + b"x", "not JSON"),
        (b"\0" * 100, "not JSON"),
        (b"[]", "unexpected value"),
        (b"{}", "state_dict_metadata"),
        (b'{"state_dict_metadata":{}}', "storage_data"),
        (b'{"state_dict_metadata":null,"storage_data":{}}', "unexpected value"),
        (b"\xef\xbb\xbf" + GOOD, "byte-order mark"),
        (GOOD.decode().encode("utf-16"), "byte-order mark"),
        (GOOD.replace(b'"w"', b'"\xff"'), "UTF-8"),
        (b'{"state_dict_metadata":{"w":' + b"[" * 100_000, "nested too deeply|not JSON"),
        (b'{"state_dict_metadata":{"w":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b'},"storage_data":{}}', "nested too deeply"),
        (b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"," + GOOD[1:], "nested too deeply"),
        (GOOD.replace(b'"free":{', b'"w":{', 1), "same key twice|stored nowhere"),
        (GOOD.replace(b"('free', (1,))", b"('w', (0,))"), "same key twice|stored nowhere"),
        (GOOD.replace(b'"w":{', b'"w":1,"w":{', 1), "same key twice"),
        (GOOD.replace(b'"free":{', b'"free":{},"free":{', 1), "same key twice"),
        (GOOD.replace(b"\"('w', (0,))\":", b"\"('w', (0,))\":[],\"('w', (0,))\":", 1), "same key twice"),
        (GOOD.replace(b'"global_shape":[4,6]', b'"global_shape":[4,6],"global_shape":[4,6]'), "same key twice"),
        (GOOD.replace(b'"alias_name":["tp"]', b'"alias_name":["tp"],"alias_name":["tp"]'), "same key twice"),
        (GOOD.replace(b'"storage_rank":0', b'"storage_rank":0,"storage_rank":1', 1), "same key twice"),
        (GOOD[:-1] + b',"storage_data":{}}', "same key twice|stored nowhere"),
        (GOOD.replace(b"[4,6]", b"[4,1e1]"), "unexpected value"),
        (GOOD.replace(b"[4,6]", b"[4,NaN]"), "not JSON"),
        (GOOD.replace(b"[4,6]", b"[4," + b"9" * 5000 + b"]"), "unexpected value|not JSON"),
    ],
)
def test_bytes_that_are_no_metadata(data, said, tried):
    with pytest.raises(MetadataError, match=said) as caught:
        decode(data)
    assert caught.value.file == FILE
    tried(HOSTILE, 1)


def change(*path, to):
    """A function that sets one place of the document."""

    def apply(document):
        *parents, last = path
        for key in parents:
            document = document[key]
        document[last] = to

    return apply


def of(name, *path, to):
    return change("state_dict_metadata", name, *path, to=to)


def drop(*path):
    def apply(document):
        *parents, last = path
        for key in parents:
            document = document[key]
        del document[last]

    return apply


def reorder_layout(document):
    entry = document["state_dict_metadata"]["w"]
    entry["layout"] = dict(sorted(entry["layout"].items()))


@pytest.mark.parametrize(
    ("damage", "said", "tensor"),
    [
        # what lies where
        (of("w", "chunk", 1, "offset", to=[0, 2]), "offset contradicts its layout", "w"),
        (of("w", "chunk", 1, "local_shape", to=[4, 2]), "shape contradicts its layout", "w"),
        (of("w", "chunk", 1, "global_offset", to=[2]), "slice id that its layout doesn't have", "w"),
        (of("w", "chunk", 1, "global_offset", to=[0]), "offset contradicts|one slice id", "w"),
        (of("w", "chunk", to=[chunk(0, [4, 3]), chunk(0, [4, 3])]), "one slice id", "w"),
        (of("w", "chunk", to=[chunk(0, [4, 3])]), "don't cover", "w"),
        (of("w", "chunk", to=[]), "don't cover", "w"),
        (of("w", "axis_fragmentations", to=[2, 1]), "fragments contradict", "w"),
        (of("w", "axis_fragmentations", to=[2]), "fragments contradict", "w"),
        (of("w", "global_shape", to=[4, 8]), "shape contradicts", "w"),
        (of("w", "global_shape", to=[4, 7]), "evenly", "w"),
        (of("w", "global_shape", to=[24]), "fragments contradict|dimensions", "w"),
        (of("free", "chunk", 1, "offset", to=[2]), "overlap", "free"),
        (of("free", "chunk", 1, "offset", to=[4]), "outside", "free"),
        (of("free", "chunk", 1, "local_shape", to=[1]), "hold 4 of 5", "free"),
        (of("free", "chunk", 1, "local_shape", to=[2, 1]), "one offset", "free"),
        (of("free", "chunk", 1, "global_offset", to=[1]), "one slice id", "free"),
        (of("free", "chunk", 1, to=chunk(2, [2])), "doesn't say where", "free"),
        (of("free", "axis_fragmentations", to=[2]), "fragments contradict", "free"),
        (of("free", "chunk", to=[]), "hold 0 of 5", "free"),
        (of("whole", "chunk", 0, "local_shape", to=[2, 1]), "hold 2 of 4", "whole"),
        (of("whole", "chunk", 0, "local_shape", to=[4]), "one offset", "whole"),
        # layouts
        (reorder_layout, "contract's order", "w"),
        (of("w", "layout", "tensor_map", to=[-1, 1]), "axis that device_matrix", "w"),
        (of("w", "layout", "tensor_map", to=[0, 0]), "at most once", "w"),
        (of("w", "layout", "tensor_map", to=[-1, [0, 0]]), "at most once", "w"),
        (of("w", "layout", "tensor_map", to=[0]), "fragments|dimensions", "w"),
        (of("w", "layout", "device_matrix", to=[3]), "one rank per place", "w"),
        (of("w", "layout", "rank_list", to=[0]), "one rank per place", "w"),
        (of("w", "layout", "alias_name", to=["tp", "dp"]), "one name per axis", "w"),
        (of("w", "layout", "alias_name", to=["None"]), "unique", "w"),
        (of("w", "layout", "interleaved_parallel", to=True), "interleaved_parallel", "w"),
        (of("w", "layout", "alias_name", to=["interleaved_parallel"]), "interleaved_parallel", "w"),
        (of("w", "layout", "device_matrix", to=[2**62]), "unexpected value", "w"),
        (of("w", "layout", "device_matrix", to=[0]), "unexpected value", "w"),
        (of("w", "layout", "rank_list", to=[0, -1]), "unexpected value", "w"),
        (of("w", "layout", to={}), "unexpected value", "w"),
        (of("w", "layout", to=[[2], [-1, 0], False, ["tp"], [0, 1]]), "unexpected value", "w"),
        # numbers that can't be
        (of("w", "global_shape", to=[2**63, 6]), "unexpected value", "w"),
        (of("whole", "global_shape", to=[2**62, 2]), "larger than any file", "whole"),
        (of("whole", "global_shape", to=[2**31, 2**31]), "larger than any file", "whole"),
        (of("whole", "global_shape", to=[0, 2**62, 2**62]), "larger than any file", "whole"),
        (of("w", "global_shape", to=[-4, 6]), "unexpected value", "w"),
        (of("w", "global_shape", to=[4.5, 6]), "unexpected value", "w"),
        (of("w", "global_shape", to=["4", 6]), "unexpected value", "w"),
        (of("w", "global_shape", to=[True, 6]), "unexpected value", "w"),
        (of("w", "global_shape", to=[1] * 1000), "unexpected value", "w"),
        (of("w", "chunk", 0, "global_offset", to=[-1]), "unexpected value", "w"),
        (of("w", "chunk", 0, "global_offset", to=[0, 0]), "unexpected value", "w"),
        (of("free", "chunk", 0, "offset", to=[-1]), "unexpected value", "free"),
        (of("w", "properties", "dtype", to="Float33"), "element type", "w"),
        (of("w", "properties", "dtype", to=None), "unexpected value", "w"),
        (drop("state_dict_metadata", "w", "layout"), "layout", "w"),
        (drop("state_dict_metadata", "w", "chunk"), "chunk", "w"),
        # storage
        (drop("storage_data", "('w', (1,))"), "stored nowhere", "w"),
        (change("storage_data", "('w', (7,))", to=stored()), "doesn't have", "w"),
        (change("storage_data", "('w', (0,))", to=[]), "unexpected value", "w"),
        (change("storage_data", "('w', (0,))", to=None), "unexpected value", "w"),
        (change("storage_data", "w", to=stored()), "key of storage_data", None),
        (change("storage_data", "('w', (0,))", to=stored(-1)), "unexpected value", "w"),
        (change("storage_data", "('w', (0,))", to=stored(0, "CKP-opt-0000000-0000002.safetensors")), "model files and in optimizer", "w"),
        *(
            (change("storage_data", "('w', (0,))", to=stored(0, name)), "leads out", "w")
            for name in ("../CKP-model-0000000-0000002.safetensors", "/etc/passwd", "..", ".", "a/b.safetensors", "a\\b", "a\0b", "\n")
        ),
        (change("storage_data", "('w', (0,))", 0, "file_name", to=""), "leads out", "w"),
        # versions
        (change("format_version", to=3), "newer version of reshard", None),
        (change("format_version", to=0), "newer version of reshard", None),
        (change("format_version", to="1"), "unexpected value", None),
    ],
)
def test_metadata_that_contradicts_itself(damage, said, tensor, tried):
    document = good()
    document["format_version"] = 1
    if damage.__name__ == "apply":
        try:
            damage(document)
        except KeyError:
            pytest.fail("the test's own path is wrong")
    else:
        damage(document)
    with pytest.raises(MetadataError, match=said) as caught:
        decode(document)
    assert caught.value.file == FILE
    assert caught.value.tensor == tensor
    assert caught.value.fix
    tried(HOSTILE, 1)


def test_what_other_writers_may_add_is_no_damage():
    document = good()
    document["more"] = {"a": [1]}
    document["state_dict_metadata"]["w"]["more"] = 1
    document["state_dict_metadata"]["w"]["chunk"][0]["more"] = 1
    document["storage_data"]["('w', (0,))"][0]["more"] = "a:b"
    assert decode(document) == decode(good())


def test_what_early_writers_left_out_is_no_damage():
    document = good()
    del document["storage_data"]["('w', (0,))"][0]["rank_group"]
    document["state_dict_metadata"]["w"]["properties"] = {"dtype": "float32"}
    assert decode(document).tensors[model_key("w")].chunks[0].holders == ()


def test_storage_keys_that_another_python_wrote():
    document = good()
    storage = document["storage_data"]
    storage['("w", (0,))'] = storage.pop("('w', (0,))")
    storage["('\\x77', (1,))"] = storage.pop("('w', (1,))")
    assert decode(document).tensors == decode(good()).tensors


def test_storage_of_unknown_tensors_is_noted():
    document = good()
    document["storage_data"]["('learning_rate', (0,))"] = stored()
    catalog = decode(document)
    assert catalog.tensors == decode(good()).tensors
    assert len(catalog.notes) == 1
    assert "learning_rate" in catalog.notes[0]


def test_a_rank_group_may_be_wider_than_the_rank_list():
    """`global_step` over pipeline stages: the first stage's layout, every stage's storage."""
    document = good()
    document["state_dict_metadata"]["global_step"] = parameter([1], layout([1], [-1], ["a"], [0]), [chunk(0, [1])], dtype="Int32")
    document["storage_data"]["('global_step', (0,))"] = [
        {"file_name": f"CKP-opt-000000{rank}-0000002.safetensors", "storage_rank": rank, "rank_group": [0, 1]} for rank in (0, 1)
    ]
    (only,) = decode(document).tensors[GLOBAL_STEP].chunks
    assert only.holders == (0, 1)
    assert [place.rank for place in only.places] == [0, 1]


def test_the_kind_of_a_tensor_comes_from_its_file():
    document = good()
    for entries in document["storage_data"].values():
        entries[0]["file_name"] = entries[0]["file_name"].replace("model", "opt")
    assert set(decode(document).tensors) == {slot_key("w", ""), slot_key("free", ""), slot_key("whole", "")}
    assert {key.kind for key in decode(document).tensors} == {Kind.OPTIMIZER}


def test_an_element_type_that_is_unknown_here_may_be_asked_for():
    document = good()
    document["state_dict_metadata"]["w"]["properties"]["dtype"] = "HiFloat8"
    asked = []

    def dtype_of(place):
        asked.append((place.file, place.name))
        return by_name("uint8")

    catalog = decode_metadata(json.dumps(document).encode(), FILE, dtype_of)
    assert catalog.tensors[model_key("w")].dtype.name == "uint8"
    assert asked == [("CKP-model-0000000-0000002.safetensors", "w")]


_junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_any_value_may_be_wrong(data):
    """Whatever stands anywhere: a catalog that is whole, or an error of the tree."""
    document = copy.deepcopy(good())
    target = document
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        inner = target[key]
        if not isinstance(inner, (dict, list)) or data.draw(st.integers(0, 5)) == 0:
            target[key] = data.draw(_junk)
            break
        target = inner
    try:
        catalog = decode(document)
    except DamagedCheckpointError as error:
        assert error.file == FILE  # noqa: PT017 (no error is fine too)
        return
    for tensor in catalog.tensors.values():
        assert sum(chunk.region.size for chunk in tensor.chunks) * tensor.dtype.itemsize == tensor.nbytes
        assert all(chunk.places for chunk in tensor.chunks if not chunk.region.is_empty)


@given(st.data())
def test_any_byte_of_golden_metadata_may_be_wrong(data):
    content = bytearray((iteration("dp2_tp2_noopt") / "metadata.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(content))
    except ReshardError as error:
        assert isinstance(error, MetadataError)  # noqa: PT017
