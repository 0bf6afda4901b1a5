"""A stored checkpoint as a collection of global tensors."""

from __future__ import annotations

import json
import os
import shutil
from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.catalog import Catalog, Chunk, Place
from reshard.checkpoint import Checkpoint
from reshard.errors import CheckpointNotFoundError, DataFileError, MetadataError, StorageError, UsageError
from reshard.format.common import CommonInfo, encode_common
from reshard.format.extra import global_tree, write_extra
from reshard.format.metadata import encode_metadata
from reshard.format.names import COMMON_FILE, EXTRA_DIRECTORY, GLOBAL_EXTRA_FILE, METADATA_FILE, data_file_name
from reshard.format.safetensors import plan_header, write_tensors
from reshard.format.seal import SEAL_FILE, SealedFile, encode_seal
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import by_numpy
from reshard.shortcuts import load
from reshard.state import HostMemory, Kind, ParameterGroup, Shard, ShardedTensor, model_key
from reshard.storage import MemoryStorage, PosixStorage
from tests.catalogs import stored_tensor
from tests.golden import CASES, expected, iteration
from tests.golden import root as golden_root


@pytest.mark.parametrize("case", CASES)
def test_every_golden_tensor_is_bit_for_bit_what_is_expected(case):
    checkpoint = Checkpoint(golden_root(case))
    whole = expected(case)
    assert set(checkpoint) == set(whole)
    assert len(checkpoint) == len(whole)
    halves = 0
    for name, array in whole.items():
        values = checkpoint[name][...]
        if values.dtype == ml_dtypes.bfloat16:
            halves += 1
            values = values.astype(np.float32)
        assert values.dtype == array.dtype
        assert values.shape == array.shape
        assert values.tobytes() == array.tobytes(), name
    assert (halves > 0) == (case == "dp2_tp2_bf16")
    assert checkpoint.iteration == 1
    assert checkpoint.directory == str(iteration(case))
    assert checkpoint.common == CommonInfo(1, 1, 1, checkpoint.common.loss_scale, 4)
    assert dict(checkpoint.values) == {}
    assert checkpoint.groups == ()


def test_no_framework_is_needed(run_python):
    code = """
import sys
for name in ("torch", "mindspore", "transformers", "safetensors"):
    sys.modules[name] = None  # importing it fails
from reshard.checkpoint import Checkpoint
from tests.catalogs import stored_tensor
checkpoint = Checkpoint(sys.argv[1])
print(len(checkpoint), float(checkpoint["adam_v.output_layer.weight"][...].sum()))
"""
    count, total = run_python(code, str(golden_root("dp2_tp2_pp2_rr"))).stdout.split()
    assert int(count) == 106
    assert float(total) == float(expected("dp2_tp2_pp2_rr")["adam_v.output_layer.weight"].sum())


def test_a_view_says_what_the_tensor_is_before_anything_is_read(tmp_path):
    root = shutil.copytree(golden_root("dp2_tp2_bf16"), tmp_path / "root")
    for path in root.rglob("*.safetensors"):
        path.unlink()
    view = Checkpoint(root)["decoder.layers.0.mlp.linear_fc2.weight"]
    assert view.name == "decoder.layers.0.mlp.linear_fc2.weight"
    assert view.key == model_key(view.name)
    assert view.shape == (32, 64)
    assert view.dtype.name == "bfloat16"
    assert view.nbytes == 32 * 64 * 2
    assert view.layout is not None
    assert view.layout.mesh.shape == (2, 1, 2)
    assert [chunk.region for chunk in view.chunks] == [Region((0, 0), (32, 32)), Region((0, 32), (32, 32))]
    with pytest.raises(DataFileError, match="missing"):
        view[...]


class CountingStorage(PosixStorage):
    """Counts the bytes that are read of data, from where a file's header ends."""

    def __init__(self):
        super().__init__()
        self.spans = []

    def open_read(self, path):
        file = super().open_read(path)
        inner = file.read_into

        def read_into(offset, buffer):
            self.spans.append((path, offset, len(buffer)))
            inner(offset, buffer)

        file.read_into = read_into
        return file

    def read(self, view, index):
        view.headers.get(view.chunks[0].places[0].file)
        for chunk in view.chunks:
            view.headers.get(chunk.places[0].file)
        self.spans.clear()
        values = view[index]
        return values, sum(length for *_, length in self.spans)


INDICES = [
    ...,
    (),
    0,
    -1,
    slice(0, 8),
    slice(120, 1000),
    slice(5, 5),
    slice(None, None, 3),
    slice(1, 100, 50),
    (slice(None), 0),
    (slice(30, 70), slice(3, 9)),
    (..., slice(3, 9)),
    (..., -1),
    (3, ...),
    (3, 4),
    (3, 4, ...),
    (slice(None), slice(None, None, 5)),
    (slice(10, 90, 7), slice(1, None, 2)),
    (np.int64(3), slice(None)),
    slice(-8, None),
    slice(90, 10),
]


@pytest.mark.parametrize("index", INDICES, ids=repr)
@pytest.mark.parametrize("case", ["dp2_tp2", "dp2_tp2_optshard_rr", "handmade_layout_null"])
def test_an_index_is_numpys(case, index):
    storage = CountingStorage()
    name = "embedding.word_embeddings.weight"
    values, nbytes = storage.read(Checkpoint(golden_root(case), storage)[name], index)
    right = np.asarray(expected(case)[name][index])
    assert isinstance(values, np.ndarray)
    assert values.shape == right.shape
    assert values.tobytes() == right.tobytes()
    steps = [item.step for item in (index if isinstance(index, tuple) else (index,)) if isinstance(item, slice)]
    if all(step in (None, 1) for step in steps):
        assert nbytes == right.nbytes, "exactly the bytes that are needed"


def test_a_step_does_not_read_wide_gaps(tmp_path):
    storage = CountingStorage()
    array = np.arange(100 * 2048, dtype=np.float32).reshape(100, 2048)
    write(tmp_path, "w", array, [Region.whole(array.shape)])
    values, nbytes = storage.read(Checkpoint(tmp_path, storage)["w"], (slice(3, None, 10), slice(0, 512)))
    assert np.array_equal(values, array[3::10, :512])
    assert nbytes == values.nbytes


@pytest.mark.parametrize(
    "index",
    [
        128,
        -129,
        (0, 0, 0),
        (..., 0, ...),
        None,
        [0, 1],
        "a",
        1.0,
        True,
        slice(None, None, -1),
        slice(None, None, 0),
        slice(0, 4, 1.5),
        np.array([1]),
    ],
)
def test_an_index_that_a_stored_tensor_does_not_take(index):
    view = Checkpoint(golden_root("dp2_tp2"))["embedding.word_embeddings.weight"]
    with pytest.raises(UsageError) as caught:
        view[index]
    assert caught.value.tensor == view.name


def test_regions():
    view = Checkpoint(golden_root("dp2_tp2"))["embedding.word_embeddings.weight"]
    whole = expected("dp2_tp2")[view.name]
    assert np.array_equal(view.read(Region((60, 1), (8, 3))), whole[60:68, 1:4])
    assert view.read(Region((60, 1), (0, 3))).shape == (0, 3)
    assert np.array_equal(np.asarray(view), whole)
    with pytest.raises(UsageError, match="outside"):
        view.read(Region((60, 1), (100, 3)))
    with pytest.raises(UsageError, match="outside"):
        view.read(Region((0,), (1,)))
    with pytest.raises(TypeError):
        iter(view)


def test_a_name_that_is_not_there():
    checkpoint = Checkpoint(golden_root("dp2_tp2"))
    assert "embedding.word_embeddings.weights" not in checkpoint
    assert 3 not in checkpoint
    with pytest.raises(UsageError, match=r"such as embedding\.word_embeddings\.weight"):
        checkpoint["embedding.word_embeddings.weights"]


def write(directory, name, array, regions, layout=None, storage=None):
    """A checkpoint of one tensor, each region in the file of a rank of its own."""
    storage = storage or PosixStorage()
    chunks = []
    sealed = {}
    for rank, region in enumerate(regions):
        part = array[region.slices] if array.ndim else array
        file = data_file_name("t", Kind.MODEL, rank, len(regions))
        header = plan_header([("other", by_numpy(np.dtype(np.int8)), (rank,)), (name, by_numpy(array.dtype), part.shape)], {"format": "ms"})
        values = {name: part, "other": np.zeros(rank, np.int8)}
        sealed[file] = write_tensors(storage, f"{directory}/{file}", header, [(entry, values[entry]) for entry in header.entries])
        chunks.append(Chunk(region, (Place(file, name, rank),), (rank,)))
    tensor = stored_tensor(model_key(name), by_numpy(array.dtype), array.shape, layout, tuple(chunks))
    small = {METADATA_FILE: encode_metadata(Catalog(str(directory), {tensor.key: tensor})), COMMON_FILE: encode_common(CommonInfo())}
    for file, text in small.items():
        storage.write_bytes(f"{directory}/{file}", text)
        sealed[file] = SealedFile.whole(text)
    extra = f"{EXTRA_DIRECTORY}/{GLOBAL_EXTRA_FILE}"
    storage.make_directory(f"{directory}/{EXTRA_DIRECTORY}")
    sealed[extra] = write_extra(storage, f"{directory}/{extra}", global_tree({}, ()))
    storage.write_bytes(f"{directory}/{SEAL_FILE}", encode_seal(sealed))


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16])
def test_a_column_of_a_type_that_numpy_does_not_know(tmp_path, dtype):
    array = np.arange(24).reshape(4, 6).astype(dtype)
    write(tmp_path, "w", array, [Region.whole(array.shape)])
    assert np.array_equal(Checkpoint(tmp_path)["w"][:, 1:3], array[:, 1:3])
    held = np.zeros((4, 2), dtype)
    mine = ShardedTensor(model_key("w"), by_numpy(array.dtype), (4, 6), None, (Shard(Region((0, 1), (4, 2)), HostMemory(held)),))
    load(tmp_path, model={"w": mine})
    assert np.array_equal(held, array[:, 1:3])


@st.composite
def splits(draw):
    """A tensor, and disjoint regions that cover it: a layout's, even or not, or cuts of cuts."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    if draw(st.booleans()):
        mesh = Mesh((2, 3), ("dp", "tp"), tuple(range(6)))
        axes = draw(st.permutations([0, 1])) if shape else []
        split = [[] for _ in shape]
        for axis in axes:
            split[draw(st.integers(0, len(shape) - 1))].append(axis)
        layout = Layout(mesh, tuple(map(tuple, split)))
        regions = list(dict.fromkeys(layout.region(position, shape) for position in range(6)))
        even = layout.is_even(shape) and 0 not in shape
        return shape, [region for region in regions if not region.is_empty], layout if even else None
    regions = [Region.whole(shape)]
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        region = regions.pop(draw(st.integers(0, len(regions) - 1)))
        d = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, region.shape[d]))
        for first, last in ((0, cut), (cut, region.shape[d])):
            offset = (*region.offset[:d], region.offset[d] + first, *region.offset[d + 1 :])
            regions.append(Region(offset, (*region.shape[:d], last - first, *region.shape[d + 1 :])))
    return shape, [region for region in regions if not region.is_empty], None


@given(st.data())
def test_any_slice_of_any_split(data):
    shape, regions, layout = data.draw(splits())
    dtype = data.draw(st.sampled_from([np.float32, np.int8, ml_dtypes.bfloat16, np.bool_]))
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype) if shape else np.asarray(1).astype(dtype)
    if dtype is np.float32:
        array = np.arange(prod(shape), dtype=dtype).reshape(shape)
    storage = MemoryStorage()
    storage.make_directory("/c")
    name = data.draw(st.sampled_from(["w", "it's", "a, (0,))", "層"]))
    write("/c", name, array, regions, layout, storage)
    checkpoint = Checkpoint("/c", storage)
    view = checkpoint[name]
    assert view.layout == layout
    index = tuple(
        data.draw(st.slices(n).filter(lambda s: s.step is None or s.step > 0) | (st.integers(-n, n - 1) if n else st.nothing()))
        for n in shape
    )
    right = array[index]
    assert view[index].tobytes() == right.tobytes()
    assert view[index].shape == right.shape
    assert view.read().tobytes() == array.tobytes()
    if regions:
        assert checkpoint.check() == ("the files hold tensors that the metadata doesn't list; ignored: other",)


def test_values_and_hyper_parameters(tmp_path):
    root = shutil.copytree(golden_root("dp2_tp2_noopt"), tmp_path / "root")
    extra = root / "iteration_00000001" / "extra"
    extra.mkdir()
    groups = (ParameterGroup({"lr": 0.1}, ("a",)),)
    write_extra(PosixStorage(), str(extra / "global.safetensors"), global_tree({"scheduler": {"last": (1, 2)}}, groups))
    checkpoint = Checkpoint(root)
    assert checkpoint.values["scheduler"] == {"last": (1, 2)}
    assert checkpoint.groups == groups


def test_a_relative_path(monkeypatch):
    monkeypatch.chdir(golden_root("dp2_tp2").parent)
    assert Checkpoint("checkpoint").directory == str(iteration("dp2_tp2"))


def test_without_common_information(tmp_path):
    root = shutil.copytree(golden_root("dp2_tp2_noopt"), tmp_path / "root")
    (root / "iteration_00000001" / "common.json").unlink()
    assert Checkpoint(root).common is None


def test_a_read_only_directory(tmp_path):
    root = shutil.copytree(golden_root("dp2_tp2_noopt"), tmp_path / "root")
    for path in [*root.rglob("*"), root]:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        assert len(Checkpoint(root).check()) == 0
    finally:
        for path in [root, root / "iteration_00000001"]:
            path.chmod(0o700)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointNotFoundError):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="none"):
        Checkpoint(tmp_path / "none")


def test_a_shape_that_metadata_made_up_takes_no_memory(tmp_path):
    root = shutil.copytree(golden_root("handmade_layout_null"), tmp_path / "root")
    path = root / "iteration_00000001" / METADATA_FILE
    document = json.loads(path.read_text())
    parameter = document["state_dict_metadata"]["decoder.final_layernorm.weight"]
    parameter["global_shape"] = parameter["chunk"][0]["local_shape"] = [2**59]
    path.unlink()
    path.write_text(json.dumps(document))
    view = Checkpoint(root)["decoder.final_layernorm.weight"]
    for index in (..., slice(None, None, 2), slice(None, None, 5000), slice(0, 3)):
        with pytest.raises(DataFileError, match="not what the metadata promises"):
            view[index]


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    root = shutil.copytree(golden_root("dp2_tp2_noopt"), tmp_path / "root")
    view = Checkpoint(root)["embedding.word_embeddings.weight"]
    view[0:1]
    path = root / "iteration_00000001" / view.chunks[0].places[0].file
    path.chmod(0o600)
    os.truncate(path, 100)
    with pytest.raises((DataFileError, StorageError), match=path.name):
        view[...]


def test_damaged_metadata_is_an_error_of_the_tree(tmp_path):
    root = shutil.copytree(golden_root("dp2_tp2_noopt"), tmp_path / "root")
    path = root / "iteration_00000001" / METADATA_FILE
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MetadataError, match=METADATA_FILE):
        Checkpoint(root)
