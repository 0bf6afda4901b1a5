"""Strategy files that are damaged, hostile, or say what can't be read: an error that names the file, and never another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.errors import CheckpointNotFoundError, LayoutError, MetadataError, ReshardError
from reshard.sources.legacy.cuts import Cut as SavedCut
from reshard.sources.legacy.strategy_files import read_strategy
from reshard.storage import PosixStorage
from reshard.storage.memory import MemoryStorage
from tests.sources.legacy.runs import Cut, strategy_bytes, strategy_json

CUTS = {"up": Cut((8, 6), (2, 2), (0, -1), -1), "down": Cut((8, 6), (2, 2), (-1, 0))}
DATA = strategy_bytes(CUTS, 0)


def layout_json(**changes: Any) -> bytes:
    document = json.loads(strategy_json(CUTS, 0))
    document["parallel_layout_item"]["up"].update(changes)
    return json.dumps(document).encode()


HOSTILE = {
    "cut off.ckpt": DATA[:-3],
    "a length beyond the file.ckpt": b"\x1a\xff\xff\x7f" + DATA,
    "no strategy.ckpt": b"hello, I am no strategy",
    "nothing but a stage.ckpt": b"\x08\x01",
    "a layout twice.ckpt": DATA + DATA,
    "no JSON.json": b"{",
    "a list.json": b"[1]",
    "a negative axis size.json": layout_json(dev_matrix=[-2, 2]),
    "text in a list.json": layout_json(tensor_map=["a", 0]),
    "no devices.json": layout_json(dev_matrix=[]),
    "split by hand.json": layout_json(param_split_shape=[3, 5], indices_offset=[0, 3]),
    "a field.json": layout_json(field=4),
    "a key twice.json": b'{"parallel_layout_item": {}, "parallel_layout_item": {}}',
    "no layouts.json": b'{"parallel_layout_item": {}}',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(HOSTILE[name])
    with pytest.raises(MetadataError) as caught:
        read_strategy(PosixStorage(), str(path))
    assert caught.value.file == str(path)
    assert caught.value.fix is not None


IMPOSSIBLE = {
    "an axis that isn't there": {"tensor_map": [5, -1]},
    "an axis twice": {"tensor_map": [0, 0]},
    "more dimensions": {"tensor_map": [0, -1, -1]},
    "more ranks than any job has": {"dev_matrix": [2**40, 2]},
    "parts that don't divide the replicas": {"opt_weight_shard_size": 3},
    "a number of parts below -1": {"opt_weight_shard_size": -7},
    "parts on other ranks than neighbours": {"opt_weight_shard_step": 1},
    "parts where there are no replicas": {"tensor_map": [0, 1], "opt_weight_shard_size": 2},
}


@pytest.mark.parametrize("changes", IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_a_strategy_that_cannot_be(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "strategy.json"
    path.write_bytes(layout_json(**changes))
    strategy = read_strategy(PosixStorage(), str(path))
    assert strategy.layouts("down", [0, 1, 2, 3], 2) is not None
    with pytest.raises(LayoutError) as caught:
        strategy.layouts("up", [0, 1, 2, 3], 2)
    assert caught.value.file == str(path)
    assert caught.value.tensor == "up"


def test_no_files(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointNotFoundError, match="strategy"):
            read_strategy(PosixStorage(), str(path))


def test_one_list_of_axes_of_a_tensor_of_one_dimension() -> None:
    """A strategy file with one list doesn't say whether it is of one dimension or has one axis for each: the tensor does."""
    cut = SavedCut((2, 2), ((1,), (0,)), is_flat=True)
    vector, matrix = cut.layout(range(4), 1), cut.layout(range(4), 2)
    assert (vector.fragments, matrix.fragments) == ((4,), (2, 2))
    # Whole lists of axes for each dimension leave no doubt.
    with pytest.raises(LayoutError):
        SavedCut((2, 2), ((1,), (0,))).layout(range(4), 1)


@pytest.mark.parametrize("matrix", [(2, 2), (4, 2), (2, 3, 2), (2, 1, 4), (6,)])
@pytest.mark.parametrize("split", range(3))
@pytest.mark.parametrize("shard", [0, -1, 2, 3, 4])
def test_cuts_are_those_of_the_oracle(matrix: tuple[int, ...], split: int, shard: int) -> None:
    axes = len(matrix)
    tensor_map = [(-1, -1), (0, -1), (-1, axes - 1)][split]
    cut = Cut((48, 24), matrix, tensor_map, shard)
    replicas = len(cut.group(0))
    whole = np.arange(48 * 24).reshape(48, 24)
    saved = SavedCut(matrix, tuple((axis,) for axis in tensor_map), shard, cut.step, is_flat=True)
    if shard > 1 and (replicas % shard or not _reaches(matrix, cut, shard)):
        with pytest.raises(LayoutError):
            saved.layout(range(cut.size), 2)
        return
    if shard == -1 and replicas == 1:
        cut = Cut(cut.shape, matrix, tensor_map)
    layout = saved.layout(range(cut.size), 2)
    for position in range(cut.size):
        assert np.array_equal(whole[layout.region(position, (48, 24)).slices], cut.part(whole, position))


def _reaches(matrix: tuple[int, ...], cut: Cut, shard: int) -> bool:
    """Whether so many parts are whole inner axes and at most a part of the next."""
    for axis in reversed([axis for axis in range(len(matrix)) if axis not in cut.used and matrix[axis] > 1]):
        if shard % matrix[axis]:
            return matrix[axis] % shard == 0
        shard //= matrix[axis]
    return shard == 1


@given(st.binary(max_size=60), st.integers(0, len(DATA)), st.integers(0, 8), st.sampled_from(["ckpt", "json"]))
def test_whatever_bytes_there_are_no_other_error_comes(noise: bytes, at: int, cut: int, suffix: str) -> None:
    data = DATA if suffix == "ckpt" else strategy_json(CUTS, 0)
    storage = MemoryStorage()
    storage.make_directory("/x")
    storage.write_bytes(f"/x/strategy.{suffix}", data[:at] + noise + data[at + cut :])
    try:
        strategy = read_strategy(storage, f"/x/strategy.{suffix}")
        for name in strategy.cuts:
            strategy.layouts(name, [0, 1, 2, 3], 2)
    except ReshardError:
        pass
