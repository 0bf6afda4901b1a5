"""Balanced loads hold every stored tensor that one rank reads whole against its digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import reshard
from reshard.comm import Communicator
from reshard.errors import DataFileError
from reshard.format.safetensors import read_header
from reshard.state import model_key
from reshard.storage.posix import PosixStorage
from reshard.testing import mesh_of, run_ranks, run_ranks_settled, split, tensor_on_rank

WHOLE = {name: np.random.default_rng(index).standard_normal((64, 96)).astype(np.float32) for index, name in enumerate("abcd")}


def save(root: Path) -> None:
    reshard.save(root, 1, model=dict(WHOLE))


def load(root: Path, comm: Communicator, *axes: str | None) -> None:
    model = {}
    for name, array in WHOLE.items():
        tensor = tensor_on_rank(model_key(name), array, split(mesh_of(tp=comm.world_size), *axes), comm.rank, blank=True)
        assert tensor is not None
        model[name] = tensor
    reshard.load(root, model=model, communicator=comm, balanced=True)


def flip(root: Path, tensor: str, at: int) -> Path:
    """One bit of a byte of a tensor, counted from its first one or, below zero, from its end."""
    (path,) = root.glob("iteration_*/*-model-*")
    entry = read_header(PosixStorage(), str(path)).entries[tensor]
    data = bytearray(path.read_bytes())
    data[(entry.begin if at >= 0 else entry.end) + at] ^= 4
    path.write_bytes(data)
    return path


# Replicated and split tensors are staged and sent; a single rank reads straight into its own memory.
@pytest.mark.parametrize(("world", "axes"), [(1, (None, None)), (2, (None, None)), (2, (None, "tp"))])
@pytest.mark.parametrize("at", [0, 5000, -1])
def test_a_flipped_bit_is_everyones_error(tmp_path: Path, world: int, axes: tuple[str | None, ...], at: int) -> None:
    save(tmp_path)
    run_ranks(world, lambda comm: load(tmp_path, comm, *axes))
    path = flip(tmp_path, "c", at)
    outcomes = run_ranks_settled(world, lambda comm: load(tmp_path, comm, *axes))
    whole = [outcome for outcome in outcomes if isinstance(outcome, DataFileError)]
    assert len(whole) == world, outcomes
    for error in whole:
        assert "not as they were saved" in str(error)
        assert str(path) in str(error)
        assert "tensor:   c" in str(error)
