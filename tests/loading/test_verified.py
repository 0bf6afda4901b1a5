"""Loads hold what they read against the digests of row blocks: a flipped bit is everyone's error, whoever reads it and whatever for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import DataFileError
from reshard.format.row_blocks import row_blocks_of
from reshard.format.safetensors import read_header
from reshard.geometry import Region
from reshard.state import ShardedTensor, model_key
from reshard.storage.posix import PosixStorage
from reshard.testing import mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank

# One row block, and many.
SHAPES = {"a": (64, 96), "b": (500, 240), "c": (700,), "d": (500, 240)}
WHOLE = {name: np.random.default_rng(index).standard_normal(shape).astype(np.float32) for index, (name, shape) in enumerate(SHAPES.items())}
TOTAL = sum(array.nbytes for array in WHOLE.values())

Axes = tuple[str | None, ...]
"""What splits the rows and the columns of the matrices; vectors are whole everywhere. `pp`: each rank has some of the tensors."""


def held(comm: Communicator, axes: Axes, *, blank: bool) -> dict[str, ShardedTensor]:
    model = {}
    for index, (name, array) in enumerate(WHOLE.items()):
        if axes == ("pp",) and index % comm.world_size != comm.rank:
            continue
        mine = axes if array.ndim == 2 and axes != ("pp",) else (None,) * array.ndim
        tensor = tensor_on_rank(model_key(name), array, split(mesh_of(tp=comm.world_size), *mine), comm.rank, blank=blank)
        assert tensor is not None
        model[name] = tensor
    return model


def save(root: Path, world: int = 1, axes: Axes = (None, None)) -> None:
    run_ranks(world, lambda comm: reshard.save(root, 1, model=held(comm, axes, blank=False), communicator=comm))


def load(root: Path, comm: Communicator, axes: Axes, **options: Any) -> tuple[reshard.RestoreReport, dict[str, list[np.ndarray]]]:
    model = held(comm, axes, blank=True)
    report = reshard.load(root, model=model, communicator=comm, **options)
    return report, {name: [shard.memory.read() for shard in tensor.shards] for name, tensor in model.items()}


def chunks(root: Path) -> list[tuple[Path, Any]]:
    """Every stored tensor of which there is one copy, with its file."""
    paths = sorted(root.glob("iteration_*/*-model-*"))
    found = [(path, entry) for path in paths for entry in read_header(PosixStorage(), str(path)).entries.values()]
    return [(path, entry) for path, entry in found if entry.name != "c" or len(paths) == 1]


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def places(begin: int, end: int) -> Sequence[int]:
    """Some bytes of a stored tensor: the first, the last, and one inside."""
    return (begin, begin + 5 * (end - begin) // 9, end - 1)


SOURCES: list[tuple[int, Axes]] = [(1, (None, None)), (2, ("tp", None)), (4, (None, "tp"))]
TARGETS: list[Axes] = [(None, None), ("tp", None), (None, "tp"), ("pp",)]


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_in_a_balanced_load_every_byte_is_verified(tmp_path: Path, source: tuple[int, Axes], world: int) -> None:
    save(tmp_path, *source)
    stored = chunks(tmp_path)
    for number, axes in enumerate(TARGETS):
        for report, _ in run_ranks(world, lambda comm, axes=axes: load(tmp_path, comm, axes, balanced=True)):
            assert report.bytes_read == TOTAL
            assert report.bytes_verified == TOTAL
        # Everywhere in the end, over all layouts of the target.
        for index, (path, entry) in enumerate(stored):
            position = places(entry.begin, entry.end)[(index + number) % 3]
            flip(path, position)
            outcomes = run_ranks_settled(world, lambda comm, axes=axes: load(tmp_path, comm, axes, balanced=True))
            flip(path, position)
            assert all(isinstance(outcome, DataFileError) for outcome in outcomes), (axes, entry.name, outcomes)
            for error in outcomes:
                assert "not as they were saved" in str(error)
                assert str(path) in str(error)
                assert f"tensor:   {entry.name}" in str(error)


def test_the_rows_are_named(tmp_path: Path) -> None:
    save(tmp_path)
    (path,) = tmp_path.glob("iteration_*/*-model-*")
    begin = read_header(PosixStorage(), str(path)).entries["b"].begin
    rows = row_blocks_of(SHAPES["b"], 4).rows
    assert rows == 17
    flip(path, begin + 4 * 240 * 3 * rows)
    for balanced in (True, False):
        for error in run_ranks_settled(2, lambda comm, b=balanced: load(tmp_path, comm, (None, "tp") if b else ("tp", None), balanced=b)):
            assert f"rows {3 * rows} to {4 * rows} of dimension 0 (bytes {begin + 960 * 3 * rows}" in str(error)


def test_a_load_that_does_not_verify_takes_what_is_there(tmp_path: Path) -> None:
    save(tmp_path)
    path, entry = next((path, entry) for path, entry in chunks(tmp_path) if entry.name == "b")
    flip(path, entry.begin + 2)
    expected = WHOLE["b"].copy()
    expected.view(np.uint8).reshape(-1)[2] ^= 4
    for world, balanced, axes in ((1, False, (None, None)), (1, True, (None, None)), (2, False, ("tp", None)), (2, True, (None, "tp"))):
        for report, memory in run_ranks(world, lambda comm, a=axes, b=balanced: load(tmp_path, comm, a, balanced=b, verify=False)):
            assert report.bytes_verified == 0
            assert report.bytes_unverified == report.bytes_read > 0
            if world == 1:
                assert memory["b"][0].tobytes() == expected.tobytes()


def verifiable(entry: Any, wanted: Region) -> int:
    """The bytes of the row blocks of a stored tensor that lie whole in rows that are wanted."""
    blocks = row_blocks_of(entry.shape, 4)
    if wanted.shape[1:] != entry.shape[1:]:
        return 0
    row_bytes = 4 * math.prod(entry.shape[1:])
    first, last = wanted.offset[0], wanted.offset[0] + wanted.shape[0]
    found = 0
    for begin in range(0, entry.shape[0], blocks.rows):
        end = min(begin + blocks.rows, entry.shape[0])
        found += (end - begin) * row_bytes if first <= begin and end <= last else 0
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("axes", TARGETS, ids=str)
def test_in_a_direct_load_every_whole_block_of_a_contiguous_run_is_verified(tmp_path: Path, world: int, axes: Axes) -> None:
    save(tmp_path)
    stored = chunks(tmp_path)
    results = run_ranks(world, lambda comm: load(tmp_path, comm, axes))
    expected = [
        sum(
            verifiable(entry, shard.region) for _, entry in stored for shard in held(comm, axes, blank=True).get(entry.name, _NOBODY).shards
        )
        for comm in run_ranks(world, lambda comm: comm)
    ]
    assert [rank.bytes_verified for rank in results[0][0].ranks] == expected
    for rank in results[0][0].ranks:
        assert rank.bytes_unverified == rank.bytes_read - rank.bytes_verified
    if axes in ((None, None), ("pp",)):
        assert sum(expected) == results[0][0].bytes_needed, "gaps are all that isn't verified"
    if axes == ("tp", None):
        assert sum(expected) > 0.8 * TOTAL
    for path, entry in stored:
        for position in places(entry.begin, entry.end):
            flip(path, position)
            outcomes = run_ranks_settled(world, lambda comm: load(tmp_path, comm, axes))
            flip(path, position)
            row = (position - entry.begin) // (4 * math.prod(entry.shape[1:]))
            blocks = row_blocks_of(entry.shape, 4)
            block = Region((row // blocks.rows * blocks.rows, *(0,) * (len(entry.shape) - 1)), (1, *entry.shape[1:]))
            block = Region(block.offset, (min(blocks.rows, entry.shape[0] - block.offset[0]), *entry.shape[1:]))
            regions = [
                shard.region
                for comm in run_ranks(world, lambda comm: comm)
                for shard in held(comm, axes, blank=True).get(entry.name, _NOBODY).shards
            ]
            if any(region.contains(block) for region in regions):
                assert all(isinstance(outcome, DataFileError) for outcome in outcomes), (entry.name, position)
            else:
                assert not any(isinstance(outcome, Exception) for outcome in outcomes)


@pytest.mark.parametrize("source", [(2, (None, "tp")), (4, (None, "tp")), (3, ("tp", None)), (2, ("pp",))], ids=str)
def test_whole_chunks_are_verified_wherever_they_go_in_memory(tmp_path: Path, source: tuple[int, Axes]) -> None:
    """A chunk that is some columns of a tensor is one run in its file, but none in the memory of a rank that holds all columns."""
    save(tmp_path, *source)
    ((report, memory),) = run_ranks(1, lambda comm: load(tmp_path, comm, (None, None)))
    assert report.bytes_verified == report.bytes_needed == TOTAL
    assert all(np.array_equal(memory[name][0], array) for name, array in WHOLE.items())
    for index, (path, entry) in enumerate(chunks(tmp_path)):
        position = places(entry.begin, entry.end)[index % 3]
        flip(path, position)
        (outcome,) = run_ranks_settled(1, lambda comm: load(tmp_path, comm, (None, None)))
        flip(path, position)
        assert isinstance(outcome, DataFileError)
        assert outcome.tensor == entry.name


def test_files_without_digests_load_and_are_not_verified(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    (tmp_path / "iteration_00000001").mkdir()
    save_file(WHOLE, tmp_path / "iteration_00000001" / "CKP-model-0000000-0000001.safetensors")
    for balanced in (False, True):
        report, memory = run_ranks(1, lambda comm, b=balanced: load(tmp_path / "iteration_00000001", comm, (None, None), balanced=b))[0]
        assert (report.bytes_verified, report.bytes_unverified) == (0, TOTAL)
        assert all(np.array_equal(memory[name][0], array) for name, array in WHOLE.items())


_NOBODY = ShardedTensor(model_key("nobody"), WHOLE["a"].dtype, (), None, ())


@pytest.mark.parametrize("how", ["straight", "not a run in memory", "balanced"])
def test_blocks_longer_than_a_piece_and_tensors_longer_than_a_part(tmp_path: Path, how: str) -> None:
    shape = (9, 1 << 19)  # a row, of 2 MiB, is a block
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    reshard.save(tmp_path, 1, model={"w": array})
    ((path, entry),) = chunks(tmp_path)
    assert len(entry.digests) == 16 * 9

    def fill(comm: Communicator) -> tuple[reshard.RestoreReport, np.ndarray]:
        memory = np.zeros(shape, np.float32)
        if how == "not a run in memory":
            memory = np.zeros((9, 2 << 19), np.float32)[:, ::2]
        report = reshard.load(tmp_path, model={"w": memory}, communicator=comm, balanced=how == "balanced")
        return report, memory

    world = 2 if how == "balanced" else 1
    for report, memory in run_ranks(world, fill):
        assert report.bytes_verified == report.bytes_read == array.nbytes
        assert np.array_equal(memory, array)
    for row in (0, 7, 8):
        flip(path, entry.begin + (row + 1) * (2 << 20) - 1)
        outcomes = run_ranks_settled(world, fill)
        flip(path, entry.begin + (row + 1) * (2 << 20) - 1)
        for error in outcomes:
            assert isinstance(error, DataFileError)
            assert f"rows {row} to {row + 1} of dimension 0" in str(error)
