"""The reader on its own terms: every way a box can lie in file and memory, and files that change under it."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import ReshardError
from reshard.geometry import Region
from reshard.geometry.dtypes import by_numpy
from reshard.loading import reader, scattered, verified_reads
from reshard.state import HostMemory, Shard, ShardedTensor, model_key
from reshard.storage.posix import PosixStorage
from reshard.testing import mesh_of, run_ranks, split, tensor_on_rank
from reshard.testing.faulty import FaultyStorage

KEY = model_key("w")


def save_split(root: Path, array: np.ndarray, *axes: str | None) -> None:
    layout = split(mesh_of(tp=2), *axes)

    def save(comm: Communicator) -> None:
        tensor = tensor_on_rank(KEY, array, layout, comm.rank)
        assert tensor is not None
        reshard.save(root, 1, model={"w": tensor}, communicator=comm)

    run_ranks(2, save)


def load_into(root: Path, array: np.ndarray) -> reshard.RestoreReport:
    shard = Shard(Region.whole(array.shape), HostMemory(array))
    report = reshard.load(root, model={"w": ShardedTensor(KEY, by_numpy(array.dtype), array.shape, None, (shard,))})
    assert report is not None
    return report


@pytest.mark.parametrize("order", ["C", "F", "stepped"])
@pytest.mark.parametrize("axes", [("tp", None), (None, "tp")])
@pytest.mark.parametrize(("block", "window", "part", "pieces"), [(1 << 20, 4 << 20, 16 << 20, 1024), (64, 96, 32, 3)])
def test_any_strides_and_any_sizes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: str,
    axes: tuple[str | None, ...],
    block: int,
    window: int,
    part: int,
    pieces: int,
) -> None:
    for module, name, value in (
        (reader, "BLOCK_BYTES", block),
        (reader, "WINDOW_BYTES", window),
        (reader, "PART_BYTES", part),
        (reader, "PIECE_BYTES", block),
        (scattered, "PART_BYTES", part),
        (scattered, "MOST_PIECES", pieces),
        (verified_reads, "PART_BYTES", part),
        (verified_reads, "PIECE_BYTES", block),
    ):
        monkeypatch.setattr(module, name, value)
    whole = np.random.default_rng(0).standard_normal((14, 30)).astype(np.float32)
    save_split(tmp_path, whole, *axes)
    target = np.zeros((14, 60), np.float32)[:, ::2] if order == "stepped" else np.zeros((14, 30), np.float32, order=order)  # type: ignore[call-overload]
    load_into(tmp_path, target)
    assert np.array_equal(target, whole)


def test_a_strided_read_touches_what_it_needs(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    save_split(tmp_path, whole, "tp", None)

    def load(comm: Communicator) -> reshard.RestoreReport:
        tensor = tensor_on_rank(KEY, whole, split(mesh_of(tp=2), None, "tp"), comm.rank, blank=True)
        assert tensor is not None
        report = reshard.load(tmp_path, model={"w": tensor}, communicator=comm)
        assert report is not None
        assert np.array_equal(tensor.shards[0].memory.read(), whole[:, comm.rank * 256 : comm.rank * 256 + 256])
        return report

    for report in run_ranks(2, load):
        assert report.bytes_read == report.bytes_needed == whole.nbytes
        # Every page has something for either rank. Where a file begins and ends on a page isn't said.
        most = 2 * (whole.nbytes + 2 * mmap.PAGESIZE)
        assert 2 * whole.nbytes <= report.bytes_of_pages <= most
        assert re.search(r"needed +read +verified +unverified +pages", report.table())


def test_a_read_of_whole_rows_maps_nothing(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    save_split(tmp_path, whole, "tp", None)
    report = load_into(tmp_path, np.zeros((512, 512), np.float32))
    assert report.bytes_of_pages == 0
    assert "pages" not in report.table()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("piece", [1 << 20, 64])
def test_tensors_that_move_alike_may_lie_differently_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool, piece: int
) -> None:
    monkeypatch.setattr(reader, "PIECE_BYTES", piece)
    values = {f"w{n}": np.random.default_rng(n).standard_normal((6, 8)).astype(np.float32) for n in range(6)}
    reshard.save(tmp_path, 1, model=values)
    targets = {name: np.zeros((6, 8), np.float32, order="F" if name in ("w1", "w4") else "C") for name in reversed(values)}
    report = reshard.load(tmp_path, model=targets, verify=verify)
    assert report is not None
    assert set(report.restored) == set(values)
    assert report.bytes_verified == (report.bytes_needed if verify else 0)
    assert all(np.array_equal(targets[name], values[name]) for name in values)


class Shrinking(FaultyStorage):
    """Cuts a file short right before it is read, from the `after`-th operation of a name on."""

    def __init__(self, path: Path, operation: str, after: int) -> None:
        super().__init__(PosixStorage())
        self._path, self._operation, self._left = path, operation, after

    def _do(self, name: str, path: str, work: Any) -> Any:
        if name == self._operation and path == str(self._path):
            self._left -= 1
            if self._left < 0:
                os.truncate(path, 200_000)
        return super()._do(name, path, work)


# The header is read in two calls.
@pytest.mark.parametrize(("operation", "after", "verify"), [("scatter", 0, False), ("read_into", 2, True), ("map", 0, True)])
def test_a_file_that_shrinks_during_the_load_is_an_error(tmp_path: Path, operation: str, after: int, verify: bool) -> None:
    whole = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    save_split(tmp_path, whole, "tp", None)
    data = min(tmp_path.glob("iteration_*/*model*"))
    # Whole rows are read; half of the columns are mapped.
    columns = 512 if operation == "map" else 1024
    target = np.zeros((1024, columns), np.float32)
    shard = Shard(Region((0, 0), target.shape), HostMemory(target))
    tensor = ShardedTensor(KEY, by_numpy(whole.dtype), whole.shape, None, (shard,))
    with pytest.raises(ReshardError, match="ends before"):
        reshard.load(tmp_path, model={"w": tensor}, storage=Shrinking(data, operation, after), verify=verify)
