"""Pickles are read as data: what Python's own pickler writes of plain values comes back, and no file can run or exhaust anything."""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import DataFileError
from reshard.sources.pytorch.objects import TORCH_OBJECTS
from reshard.sources.pytorch.pickles import read_pickle
from reshard.sources.pytorch.vocabulary import Record, UnknownNameError, Vocabulary, Word

PLAIN = Vocabulary()

atoms = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=300) | st.binary(max_size=300)
)
keys = st.text(max_size=5) | st.integers() | st.tuples(st.integers(), st.text(max_size=3))


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    lists = st.lists(inner, max_size=4)
    return lists | lists.map(tuple) | st.dictionaries(keys, inner, max_size=4) | st.frozensets(keys, max_size=3)


def plain_containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inner) | st.dictionaries(st.text(max_size=3), inner)


trees = st.recursive(atoms, containers, max_leaves=20)


@given(trees, st.sampled_from([4, 5]))
def test_plain_values_come_back(tree: Any, protocol: int) -> None:
    assert read_pickle(pickle.dumps(tree, protocol), PLAIN, "file") == tree


@given(st.recursive(st.integers() | st.text(max_size=9), plain_containers, max_leaves=20))
def test_plain_values_of_protocol_2_come_back(tree: Any) -> None:
    assert read_pickle(pickle.dumps(tree, 2), TORCH_OBJECTS, "file") == tree


def test_shared_and_ordered_values_come_back() -> None:
    shared = [1]
    found = read_pickle(pickle.dumps([shared, shared, collections.OrderedDict(a=1, b=b"x")], 2), TORCH_OBJECTS, "file")
    assert found == [[1], [1], {"a": 1, "b": b"x"}]
    assert found[0] is found[1]


class Runs:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = function, arguments

    def __reduce__(self) -> Any:
        return self.what


def hostile(tmp_path: Path) -> dict[str, Any]:
    sign = str(tmp_path / "ran")
    command = f"touch {sign}"
    return {
        "a command": Runs(os.system, command),
        "eval": Runs(eval, f"open({sign!r}, 'w')"),
        "inside a dictionary": {"model": {"w": Runs(os.system, command)}},
        "inside a call that is known": collections.OrderedDict(a=Runs(os.system, command)),
        "a call of what a call gives": Runs(getattr, Runs(__import__, "os"), "system"),
        "a function that does no harm": Runs(print, "x"),
    }


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("what", list(hostile(Path("/"))))
def test_nothing_is_run(what: str, protocol: int, tmp_path: Path) -> None:
    data = pickle.dumps(hostile(tmp_path)[what], protocol)
    with pytest.raises(UnknownNameError) as caught:
        read_pickle(data, TORCH_OBJECTS, "some.pt")
    assert caught.value.file == "some.pt"
    assert "nothing of it was run" in caught.value.what
    assert any(name in str(caught.value.found) for name in ("posix.system", "builtins.", "collections."))
    assert not (tmp_path / "ran").exists()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


START = b"\x80\x02"
BROKEN = {
    "nothing": b"",
    "no protocol": b"N.",
    "an old protocol": b"\x80\x01N.",
    "a later protocol": b"\x80\x06N.",
    "no end": START + b"N",
    "an empty stack": START + b".",
    "a memo of nothing": START + b"h\x07.",
    "a huge memo": START + b"Nr" + struct.pack("<I", 2**32 - 1) + b".",
    "a text longer than the file": START + b"X" + struct.pack("<I", 2**31) + b"a.",
    "bytes longer than the file": START + b"\x8e" + struct.pack("<Q", 2**62) + b"a.",
    "a frame longer than the file": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "a huge integer": START + b"\x8a\xff" + b"\x01" * 255 + b".",
    "no mark": START + b"NNt.",
    "a mark inside a tuple": START + b"(N\x86.",
    "an item of a number": START + b"K\x01Na.",
    "a key without a value": START + b"}(Nu.",
    "a key that is a list": START + b"}]Ns.",
    "a key that is a deep tuple": START + b"})" + b"\x85" * 100_000 + b"Ns.",
    "a call of a text": START + text("os.system") + b")R.",
    "a call of a call": START + b"ccollections\nOrderedDict\n)R)R.",
    "a call of a word": START + b"ctorch\nfloat32\n)R.",
    "a state for a word": START + b"ctorch\nfloat32\n}b.",
    "a state for a list": START + b"]}b.",
    "a name that is a number": b"\x80\x04K\x01K\x02\x93.",
    "a persistent id that is no storage": START + text("x") + b"Q.",
    "an extension": START + b"\x82\x01.",
    "an instance by name": START + b"(ios\nsystem\n.",
    "a storage of a word that is none": START + b"(" + text("storage") + text("x") + text("0") + text("cpu") + b"K\x01tQ.",
    "a tensor beyond its storage": START
    + b"ctorch._utils\n_rebuild_tensor_v2\n(("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + b"K\x04tQK\x01K\x04\x85K\x01\x85\x89}tR.",
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_pickle_of_values_is_an_error(what: str) -> None:
    with pytest.raises(DataFileError) as caught:
        read_pickle(BROKEN[what], TORCH_OBJECTS, "some.pt")
    assert caught.value.file == "some.pt"


def test_deep_values_cost_no_stack() -> None:
    tree = read_pickle(START + b"]" * 200_000 + b"a" * 199_999 + b".", PLAIN, "file")
    assert type(tree) is list
    assert type(read_pickle(START + b")" + b"\x85" * 200_000 + b".", PLAIN, "file")) is tuple


@given(st.binary(max_size=200))
def test_any_bytes_are_values_or_an_error(data: bytes) -> None:
    for start in (b"", START, b"\x80\x04"):
        with contextlib.suppress(DataFileError):
            read_pickle(start + data, TORCH_OBJECTS, "file")


def test_records_and_words() -> None:
    vocabulary = Vocabulary(records=frozenset({"some.Thing"}), words=frozenset({"torch.float32"}))
    data = b"\x80\x02csome\nThing\n)\x81}" + text("a") + b"ctorch\nfloat32\nsb."
    record = read_pickle(data, vocabulary, "file")
    assert type(record) is Record
    assert (record.name, record.arguments, record.fields) == ("some.Thing", (), {"a": Word("torch.float32")})
