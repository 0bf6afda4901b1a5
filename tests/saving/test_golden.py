"""The published implementation's own checkpoints, written again by us: what the contract fixes is the same."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize

from reshard.catalog import Catalog, StoredTensor
from reshard.checkpoint import Checkpoint
from reshard.format.common import decode_common
from reshard.format.metadata import decode_metadata
from reshard.format.names import TRACKER_FILE, tensor_name
from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import by_name
from reshard.saving.options import SaveOptions
from reshard.saving.saver import Saver
from reshard.state import HostMemory, Shard, ShardedTensor, State, state_of
from reshard.storage import PosixStorage
from reshard.testing import run_ranks
from tests import golden

KEPT = ("dp2_tp2", "dp2_tp2_noopt", "dp2_tp2_bf16", "dp1_tp1_pp4")
# Redundancy removed.
REMOVED = ("dp2_tp2_rr", "dp2_tp2_optshard_rr", "dp2_tp2_pp2_rr")


def catalog_of(case: str) -> Catalog:
    path = golden.iteration(case) / "metadata.json"
    return decode_metadata(path.read_bytes(), str(path))


def region_on(tensor: StoredTensor, rank: int) -> Region | None:
    """What a rank holds: by its holders, since a tensor of several stages shows the layout of the first only."""
    for chunk in tensor.chunks:
        if rank in chunk.holders:
            return chunk.region
    return None


def layout_on(tensor: StoredTensor, rank: int) -> Layout | None:
    """A rank's layout: that of the tensor, over the ranks of its own stage."""
    layout = tensor.layout
    if layout is None or rank in layout.mesh:
        return layout
    size = len(layout.mesh.ranks)
    first = rank - rank % size
    return Layout(Mesh(layout.mesh.shape, layout.mesh.axes, tuple(range(first, first + size))), layout.split)


def state_on(catalog: Catalog, arrays: dict[str, np.ndarray], rank: int) -> State:
    tensors = []
    for key, stored in catalog.tensors.items():
        region = region_on(stored, rank)
        if region is not None:
            values = np.ascontiguousarray(arrays[tensor_name(key)][region.slices])
            if stored.dtype == by_name("bfloat16"):
                values = values.astype(ml_dtypes.bfloat16)
            shards = (Shard(region, HostMemory(values)),)
            tensors.append(ShardedTensor(key, stored.dtype, stored.global_shape, layout_on(stored, rank), shards))
    return state_of(*tensors)


def write_again(case: str, root: Path) -> Path:
    catalog, arrays = catalog_of(case), golden.expected(case)
    world = 1 + max(rank for tensor in catalog.tensors.values() for chunk in tensor.chunks for rank in chunk.holders)
    path = golden.iteration(case) / "common.json"
    common = decode_common(path.read_bytes(), str(path))
    options = SaveOptions(prefix="qwen3", save_optimizer="noopt" not in case, remove_redundancy=case in REMOVED)

    def run(comm):
        with Saver(PosixStorage(), comm, str(root), options) as saver:
            saver.save(1, state_on(catalog, arrays, comm.rank), common)

    run_ranks(world, run)
    return root / "iteration_00000001"


def keys_of(value: object) -> object:
    """The keys of JSON objects in their order, all the way down."""
    if isinstance(value, dict):
        return [(key, keys_of(item)) for key, item in value.items()]
    return [keys_of(item) for item in value] if isinstance(value, list) else None


def without_additions(metadata: dict) -> dict:
    """Without what this project adds beside the contract's keys."""
    for key in ("format_version", "writer"):
        assert metadata.pop(key)
    for parameter in metadata["state_dict_metadata"].values():
        for chunk in parameter["chunk"]:
            chunk.pop("offset")
    return metadata


@pytest.mark.parametrize("case", KEPT)
def test_what_the_contract_fixes_is_the_same(tmp_path, case):
    written, original = write_again(case, tmp_path / "root"), golden.iteration(case)
    assert sorted(p.name for p in written.iterdir() if p.name not in ("extra", "seal.json")) == sorted(p.name for p in original.iterdir())
    assert (written / "common.json").read_bytes() == (original / "common.json").read_bytes()
    assert (written.parent / TRACKER_FILE).read_bytes() == (original.parent / TRACKER_FILE).read_bytes()
    ours = without_additions(json.loads((written / "metadata.json").read_text()))
    theirs = json.loads((original / "metadata.json").read_text())
    assert keys_of(ours["state_dict_metadata"]) == keys_of(theirs["state_dict_metadata"])
    assert ours == theirs
    # Free by the contract, and the same all the same.
    assert list(ours["storage_data"]) == list(theirs["storage_data"])


@pytest.mark.parametrize("case", KEPT)
def test_files_hold_the_same_tensors_in_the_same_bytes(tmp_path, case):
    written, original = write_again(case, tmp_path / "root"), golden.iteration(case)
    for path in original.glob("*.safetensors"):
        ours, theirs = (dict(deserialize((directory / path.name).read_bytes())) for directory in (written, original))
        # Real checkpoints hold a tensor or two that their metadata doesn't list; we can't know of them.
        assert {name: theirs[name] for name in ours} == ours
        assert {name for name in theirs if name not in ours} <= {"learning_rate"}


@pytest.mark.parametrize("case", REMOVED)
def test_what_the_contract_fixes_is_the_same_where_redundancy_is_removed(tmp_path, case):
    """All but which holder writes a region: there both are free. Of what only one rank holds, all of it."""
    written, original = write_again(case, tmp_path / "root"), golden.iteration(case)
    assert sorted(p.name for p in written.iterdir() if p.name not in ("extra", "seal.json")) == sorted(p.name for p in original.iterdir())
    ours = without_additions(json.loads((written / "metadata.json").read_text()))
    theirs = json.loads((original / "metadata.json").read_text())
    assert keys_of(ours["state_dict_metadata"]) == keys_of(theirs["state_dict_metadata"])
    assert ours["state_dict_metadata"] == theirs["state_dict_metadata"]
    assert set(ours["storage_data"]) == set(theirs["storage_data"])
    for key, entries in theirs["storage_data"].items():
        (other,), (entry,) = entries, ours["storage_data"][key]
        assert list(entry) == list(other)
        assert entry["rank_group"] == other["rank_group"]
        assert entry["storage_rank"] in other["rank_group"]
        # Here every rank writes: the number in the name is the rank.
        kind = entry["file_name"].split("-")[1]
        assert entry["file_name"] == f"qwen3-{kind}-{entry['storage_rank']:07d}-{len(list(written.glob(f'*-{kind}-*'))):07d}.safetensors"
        assert kind == other["file_name"].split("-")[1]
        assert entry == other or len(entry["rank_group"]) > 1


@pytest.mark.parametrize("case", KEPT + REMOVED)
def test_whole_tensors_come_back(tmp_path, case):
    checkpoint = Checkpoint(write_again(case, tmp_path / "root"))
    checkpoint.check()
    arrays = golden.expected(case)
    assert set(checkpoint) <= set(arrays)
    assert "noopt" in case or set(checkpoint) == set(arrays)
    for name in checkpoint:
        assert np.array_equal(checkpoint[name].read().astype(arrays[name].dtype), arrays[name])
