"""Random tensors under random layouts to other random layouts, against the numpy oracle."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import reshard
from reshard.comm import Communicator
from reshard.geometry import Layout, Mesh
from reshard.state import ShardedTensor, State, TensorKey, model_key
from reshard.storage.memory import MemoryStorage
from reshard.testing import differences, every_placement, run_ranks, split, state_on_rank


def named(state: State) -> dict[str, ShardedTensor]:
    return {key.parameter: tensor for key, tensor in state.tensors.items()}


DTYPES = (np.float32, np.float64, np.int8, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)
AXES = ("a", "b", "c")


@dataclass(frozen=True)
class Case:
    arrays: dict[TensorKey, np.ndarray]
    worlds: tuple[int, int]
    layouts: tuple[dict[TensorKey, Layout], dict[TensorKey, Layout]]


def factorings(number: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(number,)]
    return [(first, *rest) for first in range(1, number + 1) if number % first == 0 for rest in factorings(number // first, parts - 1)]


@st.composite
def meshes(draw: st.DrawFn, world: int) -> Mesh:
    shape = draw(st.sampled_from([f for parts in (1, 2, 3) for f in factorings(world, parts)]))
    return Mesh(shape, AXES[: len(shape)], tuple(draw(st.permutations(range(world)))))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    worlds = (draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4, 8])))
    arrays: dict[TensorKey, np.ndarray] = {}
    layouts: tuple[dict[TensorKey, Layout], dict[TensorKey, Layout]] = ({}, {})
    for index in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 13]), max_size=3)))
        raw = np.random.default_rng(draw(st.integers(0, 1000))).integers(0, 256, math.prod(shape) * 8, np.uint8)
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        if dtype == np.bool_:
            raw &= 1
        key = model_key(f"tensor.{index}")
        arrays[key] = raw[: math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
        for world, placed in zip(worlds, layouts, strict=True):
            mesh = draw(meshes(world))
            placed[key] = split(mesh, *draw(st.sampled_from(every_placement(len(shape), mesh.axes))))
    return Case(arrays, worlds, layouts)


@given(cases())
def test_any_layout_becomes_any_other(case: Case) -> None:
    storage = MemoryStorage()

    def save(comm: Communicator) -> None:
        state = state_on_rank(case.arrays, case.layouts[0], comm.rank)
        reshard.save("/root", 3, communicator=comm, storage=storage, model=named(state))

    def load(comm: Communicator) -> list[str]:
        state = state_on_rank(case.arrays, case.layouts[1], comm.rank, blank=True)
        report = reshard.load("/root", communicator=comm, storage=storage, model=named(state))
        assert not report.missing
        assert not report.unexpected
        return differences(case.arrays, state)

    run_ranks(case.worlds[0], save)
    assert run_ranks(case.worlds[1], load) == [[]] * case.worlds[1]
