from __future__ import annotations

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reshard.errors import CaptureError, DataFileError, StorageError
from reshard.format.digest import digest_of
from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors import Header, parse_header, parsing, plan_columns, plan_header, read_header, write_tensors
from reshard.geometry.dtypes import ALL, by_name, by_numpy
from reshard.state import HostMemory
from reshard.storage import MemoryStorage, PosixStorage
from tests.faults import HOSTILE
from tests.golden import CASES, iteration

F32 = by_name("float32")
FILES = [path for case in CASES for path in sorted(iteration(case).glob("*.safetensors"))]


def values(dtype, shape, seed=0):
    """Random bytes of a dtype: every bit pattern, NaN payloads among them."""
    data = np.random.default_rng(seed).integers(0, 2 if dtype.name == "bool" else 256, (*shape, dtype.itemsize), np.uint8)
    return data.view(dtype.numpy).reshape(shape)


def plan(tensors, metadata=None, **options):
    return plan_header([(name, by_numpy(array.dtype), array.shape) for name, array in tensors.items()], metadata or {}, **options)


def write(path, tensors, metadata=None, digests=True, **options):
    header = plan(tensors, metadata, digests=digests)
    sealed = write_tensors(PosixStorage(), str(path), header, [(name, tensors[name]) for name in header.entries], **options)
    data = path.read_bytes()
    assert (sealed.size, sealed.covered, sealed.digest) == (len(data), header.nbytes, digest_of(data[: header.nbytes]))
    return header


def digests_of(array):
    """Of the row blocks of an array, one after the other."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    step = row_blocks_of(array.shape, array.itemsize).nbytes or 1
    return b"".join(digest_of(data[at : at + step]) for at in range(0, max(1, data.nbytes), step))


def written(header, tensors, metadata, start) -> Header:
    """What must be read again."""
    entries = {e.name: e._replace(digests=digests_of(tensors[e.name])) for e in header.entries.values()}
    return Header(entries, metadata, header.nbytes, header.file_size, digest_of(start))


def all_dtypes():
    shapes = [(), (3, 5), (0, 2), (70, 33), (150, 1, 300)]
    return {f'{dtype.name}.{n} "é"': values(dtype, shape, n) for dtype in ALL for n, shape in enumerate(shapes)}


def test_a_file_has_the_bytes_that_the_official_library_writes(tmp_path):
    tensors = all_dtypes()
    write(tmp_path / "ours", tensors, {"format": "ms"}, digests=False)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs", {"format": "ms"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_official_library_opens_a_file_with_much_metadata(tmp_path):
    tensors = all_dtypes()
    metadata = {"format": "ms", "tree": '{"a": [1, "\\n", "é"]}', "": "\x7f"}
    header = write(tmp_path / "file", tensors, metadata)
    with safetensors.safe_open(tmp_path / "file", framework="np") as file:
        digests = "".join(digests_of(tensors[name]).hex() for name in header.entries)
        assert file.metadata() == {**metadata, "xxh3_128": digests}
        assert set(file.keys()) == set(tensors)
        for name in tensors:
            if "float8" in name:  # its numpy half has no such type; the bytes are compared above
                continue
            assert file.get_tensor(name).tobytes() == tensors[name].tobytes()
    start = (tmp_path / "file").read_bytes()[: header.nbytes]
    assert read_header(PosixStorage(), str(tmp_path / "file")) == written(header, tensors, metadata, start)


@pytest.mark.parametrize("metadata", [{}, {"format": "ms"}])
def test_a_file_without_tensors(tmp_path, metadata):
    write(tmp_path / "ours", {}, metadata, digests=False)
    safetensors.numpy.save_file({}, tmp_path / "theirs", metadata or None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert read_header(PosixStorage(), str(tmp_path / "ours")).entries == {}
    write(tmp_path / "digested", {}, metadata)
    assert read_header(PosixStorage(), str(tmp_path / "digested")).entries == {}
    assert safetensors.numpy.load_file(tmp_path / "digested") == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parts[-4]}/{path.name}")
def test_golden_headers(path):
    header = read_header(PosixStorage(), str(path))
    data = path.read_bytes()
    assert header.metadata in ({"format": "ms"}, {})
    with safetensors.safe_open(path, framework="np") as file:
        assert set(file.keys()) == set(header.entries)
        for name, entry in header.entries.items():
            assert tuple(file.get_slice(name).get_shape()) == entry.shape
            assert file.get_tensor(name).tobytes() == data[entry.begin : entry.end]
    planned = plan_header([(e.name, e.dtype, e.shape) for e in header.entries.values()], header.metadata, digests=False)
    assert (planned.entries, planned.nbytes, planned.file_size) == (header.entries, header.nbytes, header.file_size)
    assert planned.encode([]) == data[: header.nbytes]


_arrays = st.one_of(
    [hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)) for dtype in ("u1", "<f4", "<i8", "?")]
)


@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), _arrays, max_size=6), st.integers(1, 400), st.booleans()
)
def test_any_tensors_and_any_piece(tensors, piece_bytes, transposed):
    tensors.pop("__metadata__", None)
    if transposed:
        tensors = {name: array.T for name, array in tensors.items()}
    plain = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    # Given by name, every byte is as the reference implementation writes it, which knows no other order.
    ordered = plan(dict(sorted(tensors.items())), digests=False)
    assert ordered.encode([]) == safetensors.numpy.save(plain)[: ordered.nbytes]
    storage = MemoryStorage()
    storage.make_directory("/d")
    for digests in (True, False):
        header = plan(tensors, digests=digests)
        path = f"/d/{digests}"
        write_tensors(storage, path, header, ((name, tensors[name]) for name in header.entries), piece_bytes=piece_bytes)
    data = storage.read_bytes("/d/False")
    loaded = safetensors.numpy.load(data)
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in loaded.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in plain.items()
    }
    digested = storage.read_bytes("/d/True")
    header = plan(tensors)
    start = digested[: header.nbytes]
    assert digested[header.nbytes :] == data[plan(tensors, digests=False).nbytes :]
    assert read_header(storage, "/d/True") == written(header, tensors, {}, start)
    assert parse_header(start, len(digested), "f") == written(header, tensors, {}, start)


@pytest.mark.parametrize("piece_bytes", [100, 16_000, 20_000, 70_000, 8 << 20])
def test_each_row_block_has_its_digest_whatever_is_written_at_a_time(tmp_path, piece_bytes):
    tensors = {
        "gathered": values(F32, (7, 1000), 1),
        "large": values(F32, (900, 100), 2),
        "long rows": values(F32, (1, 3, 30_000), 3),
        "strided": values(F32, (100, 900), 4).T,
    }
    write(tmp_path / "file", tensors, piece_bytes=piece_bytes)
    entries = read_header(PosixStorage(), str(tmp_path / "file")).entries
    assert {name: entry.digests for name, entry in entries.items()} == {name: digests_of(array) for name, array in tensors.items()}
    assert [len(entries[name].digests) // 16 for name in tensors] == [2, 23, 3, 23]


@pytest.mark.parametrize("piece_bytes", [16, 100, 4096, 8 << 20])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a.T,
        lambda a: a[::-1],
        lambda a: a[:, 3:17],
        lambda a: a[5:9, ::7].T,
        lambda a: np.broadcast_to(a[0], (40, 50)),
        lambda a: a.reshape(10, 4, 50).transpose(2, 0, 1),
        lambda a: a[:, 0],
        lambda a: a[3, 4],
    ],
)
def test_memory_of_any_strides(tmp_path, view, piece_bytes):
    array = np.asarray(view(values(F32, (40, 50))))
    write(tmp_path / "file", {"w": array, "after": np.arange(3, dtype=np.int8)}, piece_bytes=piece_bytes)
    loaded = safetensors.numpy.load_file(tmp_path / "file")
    assert loaded["w"].tobytes() == array.tobytes()
    assert loaded["w"].shape == array.shape
    assert list(loaded["after"]) == [0, 1, 2]


class Recording(MemoryStorage):
    """Notes what is written where, and whether it is a tensor's own memory."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory
        self.writes = []

    def create(self, path, size):
        file = super().create(path, size)
        inner = file.write_at

        def write_at(offset, data):
            own = any(np.shares_memory(np.frombuffer(data, np.uint8), array) for array in self.memory)
            self.writes.append((offset, len(data), own))
            inner(offset, data)

        file.write_at = write_at
        return file


def test_large_memory_is_written_from_where_it_lies_and_small_tensors_share_a_block():
    large = values(F32, (100, 100))
    small = {f"b{n:05d}": np.full((4,), n % 251, np.uint8) for n in range(10_000)}
    tensors = {"a": large, **small}
    storage = Recording([large])
    storage.make_directory("/d")
    header = plan(tensors)
    write_tensors(storage, "/d/f", header, [(name, tensors[name]) for name in header.entries], piece_bytes=16_000)
    data, head = storage.writes[:-1], storage.writes[-1]
    assert sum(length for _, length, own in data if own) >= 32_000
    assert max(length for _, length, _ in data) <= 16_000
    assert len(data) < 10
    assert head == (0, header.nbytes, False), "the header is written last"


def test_a_header_that_is_still_zero_is_no_checkpoint_to_anyone(tmp_path):
    header = plan({"w": np.zeros(3, np.float32)})
    (tmp_path / "file").write_bytes(bytes(header.file_size))
    with pytest.raises(DataFileError, match="never finished"):
        read_header(PosixStorage(), str(tmp_path / "file"))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / "file", framework="np")


def test_what_is_written_must_be_what_was_planned(tmp_path):
    a, b = np.zeros(3, np.float32), np.zeros((2, 2), np.int32)
    header = plan({"a": a, "b": b})
    cases = [
        ([("a", a)], "not written"),
        ([("a", a), ("b", b), ("b", b)], "doesn't have at this place"),
        ([("a", a), ("c", b)], "doesn't have at this place"),
        ([("b", b), ("a", a)], "doesn't have at this place"),
        ([("a", a), ("b", b.astype(np.int64))], "doesn't fit"),
        ([("a", a), ("b", b.astype(">i4"))], "doesn't fit"),
        ([("a", a), ("b", b.reshape(4))], "doesn't fit"),
        ([("a", a), ("b", HostMemory(b[:1]))], "doesn't fit"),
    ]
    for n, (arrays, said) in enumerate(cases):
        with pytest.raises(CaptureError, match=said):
            write_tensors(PosixStorage(), str(tmp_path / f"file{n}"), header, arrays)
        with pytest.raises(DataFileError, match="never finished"):
            read_header(PosixStorage(), str(tmp_path / f"file{n}"))


def test_an_existing_file_is_not_written_over(tmp_path):
    write(tmp_path / "file", {"w": np.zeros(3)})
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(StorageError):
        write(tmp_path / "file", {"w": np.ones(3)})
    assert (tmp_path / "file").read_bytes() == before


def test_names_that_no_file_can_hold():
    with pytest.raises(CaptureError, match="two tensors of one name"):
        plan_header([("w", F32, (1,)), ("w", F32, (2,))], {})
    with pytest.raises(CaptureError, match="__metadata__"):
        plan_header([("__metadata__", F32, (1,))], {})
    with pytest.raises(CaptureError, match="Unicode"):
        plan_header([("\ud800", F32, (1,))], {})


ENTRIES = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}}


@pytest.mark.parametrize(
    "free",
    [{}, {"format": "pt"}, {"format": "}"}, {"}": "x"}, {"format": '},"c":{'}, {"format": "é"}, {"format": '"}', "digits": "0" * 300_000}],
    ids=lambda free: str(free)[:30],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["compact", "wide"])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_a_header_says_the_same_wherever_its_free_text_is(free, separators, is_first):
    told = {"__metadata__": free, **ENTRIES} if is_first else {**ENTRIES, "__metadata__": free}
    for escaped in (True, False):
        start = file_of(json.dumps(told, separators=separators, ensure_ascii=escaped) + "  ")
        header = parse_header(start, len(start) + 11, "f")
        assert header.metadata == free
        entries = [(e.name, e.shape, e.begin - len(start), e.end - len(start)) for e in header.entries.values()]
        assert entries == [("a", (2,), 0, 8), ("b", (3,), 8, 11)]


def test_a_header_of_ours_is_gone_over_once(monkeypatch):
    tensors = {"w": values(F32, (900, 100)), "v": values(F32, (3,))}
    header = plan(tensors)
    monkeypatch.delattr(parsing, "_free_text")
    assert (
        parse_header(header.encode([digests_of(array) for array in tensors.values()]), header.file_size, "f").entries.keys()
        == tensors.keys()
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"__metadata__":{"x":"1"},"__metadata__":{"x":"2"},%s}', "same key twice"),
        ('{"__metadata__":{"x":"1"},%s,"__metadata__":{"x":"2"}}', "same key twice"),
        ('{"__metadata__":{"x":"1","x":"2"},%s}', "same key twice"),
        ('{"__metadata__":{"x":"1"},%s,"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "same key twice"),
        ('{"__metadata__":{"x":1},%s}', "unexpected value"),
        ('{"__metadata__":{"x":"1"},%s', "not JSON"),
        ('{"__metadata__":{"x":"1"},%s}}', "not JSON"),
        ('{"__metadata__":{"x":"1"},%s} x', "not JSON"),
        ('{"__metadata__":{"x":"1",},%s}', "not JSON"),
        ('{"__metadata__":{"x":"1"},,%s}', "not JSON"),
        ('{"__metadata__":{"x":"1}","y":{},%s}', "unexpected value|not JSON"),
    ],
)
def test_a_header_that_begins_with_its_free_text_may_be_wrong(text, said):
    start = file_of(text % json.dumps(ENTRIES, separators=(",", ":"))[1:-1])
    with pytest.raises(DataFileError, match=said):
        parse_header(start, len(start) + 11, "f")


@pytest.mark.parametrize("text", ["", '"xxh3_128":"', '\\"xxh3_128":"', '","xxh3_128":"', "xxh3_128"])
def test_digests_have_a_place_of_their_own_whatever_the_other_text_says(text):
    tensors = {"w": np.zeros(3), "xxh3_128": np.ones(2)}
    header = plan(tensors, {"format": text, text: "x"})
    digests = [digests_of(tensors[name]) for name in header.entries]
    parsed = parse_header(header.encode(digests), header.file_size, "f")
    assert parsed.metadata == {"format": text, text: "x"} if text != "xxh3_128" else {"format": text}
    assert [entry.digests for entry in parsed.entries.values()] == digests


def test_digests_that_are_not_those_of_the_row_blocks():
    array = values(F32, (900, 100))
    header = plan({"w": array, "v": array[:3]})
    start = header.encode([digests_of(array[:3]), digests_of(array)])
    text = (digests_of(array[:3]) + digests_of(array)).hex()
    assert start.count(text.encode()) == 1
    for other in (text[:-32], text + "0" * 32, text[:-1], "", text[:-1] + "G"):
        damaged = start.replace(text.encode(), other.encode())
        damaged = (len(damaged) - 8).to_bytes(8, "little") + damaged[8:]
        with pytest.raises(DataFileError, match="digests in the header can't be understood"):
            parse_header(damaged, len(damaged) + header.file_size - header.nbytes, "f")


def test_who_wants_no_digests_gets_none_and_they_are_counted_all_the_same():
    tensors = {"w": values(F32, (900, 100)), "v": values(F32, (3,))}
    header = plan(tensors)
    start = header.encode([digests_of(array) for array in tensors.values()])
    parsed = parse_header(start, header.file_size, "f", digests=False)
    assert parsed == replace(written(header, tensors, {}, start), entries=header.entries)
    damaged = start.replace(b'"xxh3_128":"', b'"xxh3_128":"' + b"0" * 32)
    damaged = (len(damaged) - 8).to_bytes(8, "little") + damaged[8:]
    with pytest.raises(DataFileError, match="digests in the header can't be understood"):
        parse_header(damaged, len(damaged) + header.file_size - header.nbytes, "f", digests=False)


@given(st.lists(st.tuples(st.sampled_from(["F32", "U8"]), st.lists(st.integers(0, 3), max_size=3)), max_size=6), st.randoms())
def test_a_header_may_name_its_tensors_in_any_order(kinds, random):
    entries, position = {}, 0
    for number, (code, shape) in enumerate(kinds):
        end = position + math.prod(shape) * (4 if code == "F32" else 1)
        entries[f"t{number}"] = (code, shape, [position, end])
        position = end
    named = list(entries.items())
    random.shuffle(named)
    # Free text may look like an entry.
    free = {"__metadata__": {"dtype": "F32", "shape": "none", "data_offsets": "0"}} if random.random() < 0.5 else {}
    headers = []
    for order in (entries.items(), named):
        text = json.dumps({**free, **json.loads(header_of(**dict(order)))})
        start = file_of(text)
        headers.append(parse_header(start, len(start) + position, "f"))
    for header in headers:
        assert sorted(header.entries) == sorted(entries)
        assert header.metadata == free.get("__metadata__", {})
        found = list(header.entries.values())
        assert [entry.begin for entry in found] == sorted(entry.begin for entry in found)
        for entry in found:
            code, shape, (begin, end) = entries[entry.name]
            assert (entry.dtype.safetensors, list(entry.shape), entry.digests) == (code, shape, b"")
            assert (entry.begin - header.nbytes, entry.end - header.nbytes) == (begin, end)


def test_a_hundred_thousand_tensors():
    shape = (2,)
    array = np.zeros(shape, np.float32)
    header = plan_header([(f"model.layers.{n}.weight", F32, shape) for n in range(100_000)], {})
    storage = Recording([])
    storage.make_directory("/d")
    write_tensors(storage, "/d/f", header, ((name, array) for name in header.entries))
    assert len(storage.writes) == 2, "all the data in one block, then the header"
    assert len(read_header(storage, "/d/f").entries) == 100_000


# --- files that nobody vouches for


def file_of(text, data=b"", length=None):
    text = text if isinstance(text, bytes) else text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def header_of(**entries):
    return json.dumps(
        {name: {"dtype": dtype, "shape": shape, "data_offsets": offsets} for name, (dtype, shape, offsets) in entries.items()}
    )


GOOD = header_of(a=("F32", [2], [0, 8]), b=("U8", [3], [8, 11]))


def test_the_file_that_is_damaged_below_is_good_before(tmp_path):
    (tmp_path / "f").write_bytes(file_of(GOOD, bytes(11)))
    assert len(read_header(PosixStorage(), str(tmp_path / "f")).entries) == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated"),
        (b"\x10\0\0", "truncated"),
        (bytes(8), "never finished"),
        (file_of(GOOD, bytes(10)), "truncated"),
        (file_of(GOOD, bytes(12)), "more bytes"),
        (file_of(GOOD)[:40], "truncated inside its header"),
        (file_of(GOOD, bytes(11), length=2**63), "not a safetensors file"),
        (file_of(GOOD, bytes(11), length=100_000_001), "not a safetensors file"),
        (file_of(GOOD, bytes(11), length=len(GOOD) + 12), "truncated inside"),
        (file_of(GOOD[:-1], bytes(11)), "not JSON"),
        (b"PK\x03\x04" + bytes(100), "safetensors"),
        (file_of("[]"), "unexpected value"),
        (file_of("1"), "unexpected value"),
        (file_of(b"\xef\xbb\xbf" + GOOD.encode(), bytes(11)), "byte-order mark"),
        (file_of(GOOD.encode().replace(b'"a"', b'"\xff"'), bytes(11)), "UTF-8"),
        (file_of(GOOD.replace('"b"', '"a"'), bytes(11)), "same key twice"),
        (file_of(GOOD.replace('"shape": [2]', '"shape": [2], "shape": [2]'), bytes(11)), "same key twice"),
        (file_of('{"__metadata__": {"a": "1", "a": "2"}}'), "same key twice"),
        (file_of('{"__metadata__": {"a": 1}}'), "unexpected value"),
        (file_of('{"__metadata__": []}'), "unexpected value"),
        (file_of('{"a": ' + "[" * 100_000), "nested too deeply|not JSON"),
        (file_of('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply|can't be understood"),
        (file_of(header_of(a=("F32", [2], [0, 8]), b=("U8", [3], [7, 10])), bytes(10)), "overlap"),
        (file_of(header_of(a=("F32", [2], [0, 8]), b=("F32", [2], [0, 8])), bytes(8)), "overlap"),
        (file_of(header_of(a=("F32", [2], [0, 8]), b=("U8", [3], [9, 12])), bytes(12)), "hole"),
        (file_of(header_of(a=("F32", [2], [4, 12])), bytes(12)), "hole"),
        (file_of(header_of(a=("F32", [3], [0, 8])), bytes(8)), "contradict its shape"),
        (file_of(header_of(a=("F64", [2], [0, 8])), bytes(8)), "contradict its shape"),
        (file_of(header_of(a=("F32", [-2], [0, 8])), bytes(8)), "impossible"),
        (file_of(header_of(a=("F32", [2], [8, 0])), bytes(8)), "impossible"),
        (file_of(header_of(a=("F32", [2], [-8, 0])), bytes(8)), "impossible"),
        (file_of(header_of(a=("F32", [2**63], [0, 2**65]))), "truncated|contradict|understood"),
        (file_of(header_of(a=("F32", [2**40, 2**40], [0, 8])), bytes(8)), "contradict its shape"),
        (file_of(header_of(a=("F32", [2**40, 0], [0, 0]))), None),
        (file_of(header_of(a=("F32", [2**63, 0], [0, 0]))), "impossible"),
        (file_of(header_of(a=("F32", [0, 2**40, 2**40], [0, 0]))), "impossible"),
        (file_of(header_of(a=("F32", [1] * 65, [0, 4])), bytes(4)), "impossible"),
        (file_of(header_of(a=("F33", [2], [0, 8])), bytes(8)), "F33"),
        (file_of(header_of(a=("F32", ["2"], [0, 8])), bytes(8)), "can't be understood"),
        (file_of(header_of(a=("F32", [2.0], [0, 8])), bytes(8)), "can't be understood"),
        (file_of(header_of(a=("F32", [True], [0, 4])), bytes(4)), "can't be understood"),
        (file_of(header_of(a=("F32", [2], [0, 8, 8])), bytes(8)), "can't be understood"),
        (file_of('{"a": {"dtype": "F32", "shape": [2]}}', bytes(8)), "can't be understood"),
        (file_of('{"a": {"dtype": "F32", "data_offsets": [0, 4]}}', bytes(4)), "can't be understood"),
        (file_of('{"a": {"shape": [], "data_offsets": [0, 4]}}', bytes(4)), "can't be understood"),
        # As many colons as entries that lack nothing would have.
        (file_of('{"a": {"dtype": "F32", "dtype": "F32", "data_offsets": [0, 4]}}', bytes(4)), "can't be understood"),
        (file_of('{"a": null}'), "can't be understood"),
    ],
)
def test_a_damaged_file(tmp_path, content, said, tried):
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    if said is None:
        read_header(PosixStorage(), str(path))
        return
    with pytest.raises(DataFileError, match=said) as caught:
        read_header(PosixStorage(), str(path))
    assert caught.value.file == str(path)
    tried(HOSTILE, 1)


def test_a_truncated_file_says_what_was_promised_and_what_is_there(tmp_path):
    header = write(tmp_path / "f", {"w": np.zeros((100, 100), np.float32)})
    os.truncate(tmp_path / "f", 1000)
    with pytest.raises(DataFileError) as caught:
        read_header(PosixStorage(), str(tmp_path / "f"))
    assert "1000 bytes" in str(caught.value)
    assert f"{header.file_size} bytes" in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(DataFileError, match="missing"):
        read_header(PosixStorage(), str(tmp_path / "none.safetensors"))
    with pytest.raises(DataFileError, match="missing"):
        read_header(PosixStorage(), str(tmp_path))


@given(st.data())
def test_any_byte_of_a_header_may_be_wrong(data):
    """Whatever was changed: an error of the tree, or a header that fits the file."""
    content = bytearray(file_of(GOOD.ljust(136), bytes(11)))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 143))] = data.draw(st.integers(0, 255))
    storage = MemoryStorage()
    storage.make_directory("/d")
    storage.write_bytes("/d/f", bytes(content))
    try:
        header = read_header(storage, "/d/f")
    except DataFileError:
        return
    assert header.file_size == len(content)
    assert sum(entry.end - entry.begin for entry in header.entries.values()) == header.file_size - header.nbytes


class Noted(HostMemory):
    """Says how often it was read."""

    reads = 0

    def read(self) -> np.ndarray:
        Noted.reads += 1
        return super().read()


@pytest.mark.parametrize("piece_bytes", [1, 100, 40_000, 2 << 20])
def test_memory_gives_the_bytes_that_its_array_gives(tmp_path, piece_bytes):
    tensors = all_dtypes() | {
        "transposed": values(F32, (5, 7)).T,
        "several blocks": values(F32, (3, 5000), 1),
        "large": values(F32, (300, 700), 2),
        "scalar": np.float32(3),
    }
    header = write(tmp_path / "arrays", tensors)
    Noted.reads = 0
    memory = [(name, Noted(np.asarray(tensors[name]))) for name in header.names]
    sealed = write_tensors(PosixStorage(), str(tmp_path / "memory"), header, memory, piece_bytes=piece_bytes)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "arrays").read_bytes()
    assert sealed.size == header.file_size
    small = [a for a in map(np.asarray, tensors.values()) if 0 < a.nbytes <= min(piece_bytes, 64 << 10) and a.flags.c_contiguous]
    # The smallest piece has room for an element of any type.
    assert Noted.reads <= len(tensors) - len(small)


def test_memory_that_changes_while_it_waits_is_written_with_its_digest(tmp_path):
    arrays = {"a": values(F32, (8, 32), 1), "b": values(F32, (8, 32), 2)}
    header = plan(arrays)

    def changing():
        yield "a", HostMemory(arrays["a"])
        arrays["a"][:] = 7
        yield "b", HostMemory(arrays["b"])

    write_tensors(PosixStorage(), str(tmp_path / "x"), header, changing())
    found = read_header(PosixStorage(), str(tmp_path / "x")).entries["a"]
    assert found.digests == digests_of(arrays["a"])
    assert (tmp_path / "x").read_bytes()[found.begin : found.end] == arrays["a"].tobytes()


@pytest.mark.parametrize("names", [["a", "b.c", "é", "d"], ['quo"te', "back\\slash", "new\nline", "\x00"]])
def test_columns_make_the_header_that_single_tensors_make(names):
    forms = [(by_name("bfloat16"), (3, 2)), (F32, (70, 100)), (by_name("bfloat16"), (3, 2)), (by_name("int8"), ())]
    single = plan_header([(name, *form) for name, form in zip(names, forms, strict=True)], {"format": "ms"})
    by_form = {form: plan_header([("x", *form)], {}).kin[0] for form in forms}
    together = plan_columns(names, [by_form[form] for form in forms], {"format": "ms"})
    assert (together, dict(together.entries)) == (single, dict(single.entries))
    assert [single.names[0], list(single.names)] == [names[1], list(single.entries)]
    parsed = parse_header(single.encode([bytes(16)] * single.digests), single.file_size, "x")
    assert {name: entry._replace(digests=b"") for name, entry in parsed.entries.items()} == single.entries
