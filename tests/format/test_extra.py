"""Extras: whatever goes in comes out, of the same types; what can't go in is named by its path."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, OrderedDict, deque, namedtuple
from enum import IntEnum

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reshard.errors import CaptureError, DamagedCheckpointError, DataFileError, MetadataError
from reshard.format.extra import FrameworkArray, decode_tree, encode_tree, global_tree, groups_of, read_extra, write_extra
from reshard.format.safetensors import plan_header, write_tensors
from reshard.geometry.dtypes import by_name
from reshard.state import ParameterGroup
from reshard.storage import MemoryStorage, PosixStorage


def same(a, b) -> bool:
    """Equal in value, type and bits, all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return [encode_tree(k)[0] for k in a] == [encode_tree(k)[0] for k in b] and all(
            same(x, y) for x, y in zip(a.values(), b.values(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, (set, frozenset)):
        return sorted(encode_tree(x)[0] for x in a) == sorted(encode_tree(x)[0] for x in b)
    if isinstance(a, (np.ndarray, np.generic)):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def through_a_file(tree):
    storage = MemoryStorage()
    storage.make_directory("/e")
    write_extra(storage, "/e/f", tree)
    return read_extra(storage, "/e/f")


_arrays = st.sampled_from(["u1", "<i4", "<i8", "<f2", "<f4", "<f8", "?", "<c8"]).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)
_hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=2).map(tuple) | st.frozensets(inner, max_size=2),
    max_leaves=4,
)
_leaves = st.one_of(
    _hashable,
    st.floats(),
    st.integers(-(2**200), 2**200),
    st.text(st.characters(), max_size=5),
    st.binary(min_size=250, max_size=300),
    _arrays,
    _arrays.filter(lambda a: a.size > 0).map(lambda a: a.reshape(-1)[0]),
    st.builds(FrameworkArray, st.sampled_from(["torch", "mindspore"]), st.text(max_size=5), _arrays),
)
_trees = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.sets(_hashable, max_size=3),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
        st.dictionaries(st.sampled_from(["$int", "$", "$array", "$dict"]), inner, max_size=2),
        st.dictionaries(_hashable, inner, max_size=3),
        st.dictionaries(_hashable, inner, max_size=3).map(OrderedDict),
        st.dictionaries(_hashable, st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


@given(_trees)
def test_any_tree_comes_back(tree):
    text, arrays = encode_tree(tree)
    assert text.isascii()
    assert same(decode_tree(text, arrays), tree)


@given(_trees)
def test_any_tree_comes_back_from_a_file(tree):
    assert same(through_a_file(tree), tree)


def test_the_states_of_random_generators_come_back():
    tree = {
        "python": random.Random(3).getstate(),
        "numpy": np.random.RandomState(3).get_state(),
        "generator": np.random.default_rng(3).bit_generator.state,
    }
    back = through_a_file(tree)
    assert same(back, tree)
    mine, theirs = random.Random(), random.Random(3)
    mine.setstate(back["python"])
    assert mine.random() == theirs.random()


def test_an_official_reader_opens_a_file_of_extras(tmp_path):
    tree = {"values": {"scheduler": {"last": 3, "rates": (0.1, float("inf"))}, "rng": np.arange(5, dtype=np.uint32)}, "groups": []}
    write_extra(PosixStorage(), str(tmp_path / "global.safetensors"), tree)
    with safetensors.safe_open(tmp_path / "global.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "reshard-extra-1"
        assert json.loads(file.metadata()["tree"])["values"]["scheduler"]["last"] == 3
        (name,) = file.keys()
        assert file.get_tensor(name).tolist() == [0, 1, 2, 3, 4]
    assert same(read_extra(PosixStorage(), str(tmp_path / "global.safetensors")), tree)


def test_memory_of_any_strides():
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    tree = [array.T, array[::-2, 1:], array.astype(ml_dtypes.bfloat16)[:, 0]]
    assert all(np.array_equal(a, b) for a, b in zip(through_a_file(tree), tree, strict=True))


def test_framework_arrays_become_tensors_again():
    tree = {"a": [FrameworkArray("torch", "bfloat16", np.zeros(2))]}
    text, arrays = encode_tree(tree)
    assert decode_tree(text, arrays, lambda value: (value.framework, value.dtype, value.array.shape)) == {
        "a": [("torch", "bfloat16", (2,))]
    }


def test_a_missing_file_is_none(tmp_path):
    assert read_extra(PosixStorage(), str(tmp_path / "none.safetensors")) is None


class Level(IntEnum):
    LOW = 1


Point = namedtuple("Point", "x y")  # noqa: PYI024 (the untyped kind is what is tested)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        lambda: 0,
        Level.LOW,
        Point(1, 2),
        deque([1]),
        complex(1, 2),
        bytearray(b"a"),
        range(3),
        np.array(["a"]),
        np.array([object()]),
        np.zeros(2, ">f4"),
        np.zeros(2, np.complex128),
        np.datetime64("2020-01-01"),
        np.zeros(2, [("a", "f4")]),
        np.ma.masked_array([1.0], [True]),
        int,
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.filterwarnings("ignore:.*alias.*:DeprecationWarning")
def test_what_a_checkpoint_cannot_hold_is_named_by_its_path(value):
    with pytest.raises(CaptureError) as caught:
        encode_tree({"scheduler": [1, (2, {"inner": value, 3: 4})]})
    assert caught.value.field == "scheduler[1][1].inner"
    with pytest.raises(CaptureError) as caught:
        encode_tree(value)
    assert caught.value.field == "the whole tree"


def test_keys_are_named_too():
    with pytest.raises(CaptureError) as caught:
        encode_tree({"a": {Level.LOW: 1}})
    assert "a[<Level.LOW: 1>] (the key)" in str(caught.value)


def test_a_value_that_contains_itself():
    cycle: dict = {"a": []}
    cycle["a"].append(cycle)
    with pytest.raises(CaptureError, match="contains itself"):
        encode_tree(cycle)
    shared = [1]
    assert decode_tree(*encode_tree([shared, shared])) == [[1], [1]]


def test_values_that_are_nested_too_deeply():
    deep: list = []
    for _ in range(1000):
        deep = [deep]
    with pytest.raises(CaptureError, match="nested too deeply"):
        encode_tree(deep)


def test_a_value_whose_own_words_fail_is_still_an_error_of_ours():
    class Broken:
        def __repr__(self):
            raise RuntimeError("no")

    with pytest.raises(CaptureError, match="Broken"):
        encode_tree([Broken()])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[" * 100_000,
        '{"$no such thing": 1}',
        '{"$int": 3}',
        '{"$int": "zz"}',
        '{"$float": "1.5"}',
        '{"$bytes": "*"}',
        '{"$bytes": 1}',
        '{"$array": "array-000007"}',
        '{"$array": ["array-000007"]}',
        '{"$long_bytes": 1}',
        '{"$tuple": 3}',
        '{"$tuple": {"a": 1}}',
        '{"$set": [[1]]}',
        '{"$dict": [1]}',
        '{"$dict": [[1, 2, 3]]}',
        '{"$dict": [[[1], 2]]}',
        '{"$framework": ["torch"]}',
        '{"$framework": ["torch", "float32", "none"]}',
        '{"$tuple": [], "a": 1}',
        "9" * 5000,
    ],
)
def test_text_that_is_no_tree(text):
    with pytest.raises(MetadataError, match="extras"):
        decode_tree(text, {})


def test_a_file_that_holds_no_extras(tmp_path):
    storage, path = PosixStorage(), str(tmp_path / "f")
    write_tensors(storage, path, plan_header([("a", by_name("float32"), (1,))], {"format": "ms"}), [("a", np.zeros(1, np.float32))])
    with pytest.raises(MetadataError, match="reshard-extra-1") as caught:
        read_extra(storage, path)
    assert caught.value.file == path


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_of_extras(tmp_path, keep):
    path = tmp_path / "f"
    write_extra(PosixStorage(), str(path), {"a": np.arange(10)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataFileError, match="truncated") as caught:
        read_extra(PosixStorage(), str(path))
    assert caught.value.file == str(path)


@given(st.data())
def test_any_byte_of_extras_may_be_wrong(data):
    storage = MemoryStorage()
    storage.make_directory("/e")
    write_extra(storage, "/e/good", {"a": (1, {2: b"x"}), "b": np.arange(3), "c": float("nan")})
    content = bytearray(storage.read_bytes("/e/good"))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    storage.write_bytes("/e/bad", bytes(content))
    try:
        read_extra(storage, "/e/bad")
    except DamagedCheckpointError as error:
        assert error.file == "/e/bad"  # noqa: PT017 (no error is fine too)


def test_hyper_parameters_come_back():
    groups = (
        ParameterGroup({"lr": 1e-3, "betas": (0.9, 0.95), "fused": None}, ("a.weight", "b.weight"), ("b.weight",)),
        ParameterGroup({"lr": np.float32(0.5)}, ()),
    )
    tree = through_a_file(global_tree({"scheduler": {"last": 3}}, groups))
    assert tree["values"] == {"scheduler": {"last": 3}}
    assert groups_of(tree) == groups
    assert groups_of(None) == ()


@pytest.mark.parametrize(
    "groups",
    [3, [3], [{}], [{"options": {}, "parameters": "ab"}], [{"options": [], "parameters": []}], [{"options": {}, "parameters": [1]}]],
)
def test_hyper_parameters_that_are_none(groups):
    with pytest.raises(MetadataError, match="hyper-parameters"):
        groups_of({"groups": groups}, "f")
