"""The numpy oracle: what each rank must hold, by gathering and slicing whole arrays."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from reshard.geometry import Layout, Mesh, Region
from reshard.geometry.dtypes import by_numpy
from reshard.state import HostMemory, Shard, ShardedTensor, State, TensorKey


def mesh_of(ranks: Sequence[int] | None = None, /, **axes: int) -> Mesh:
    """A mesh of these axes, outermost first: `mesh_of(dp=2, tp=4)`; over ranks 0, 1, … unless given."""
    size = int(np.prod(list(axes.values()) or [1]))
    return Mesh(tuple(axes.values()), tuple(axes), tuple(range(size) if ranks is None else ranks))


def split(mesh: Mesh, *dimensions: str | Sequence[str] | None) -> Layout:
    """A layout by axis names: `split(mesh, ("tp", "dp"), None)` splits dimension 0 by tp, then by dp, and dimension 1 not at all."""
    named = [() if d is None else (d,) if isinstance(d, str) else tuple(d) for d in dimensions]
    return Layout(mesh, tuple(tuple(mesh.axes.index(name) for name in names) for names in named))


def slice_of(array: np.ndarray, region: Region) -> np.ndarray:
    """A copy of a region of a whole array, by numpy alone."""
    index = np.ix_(*(range(o, o + n) for o, n in zip(region.offset, region.shape, strict=True)))
    return array[index].copy() if array.ndim else array.copy()


def part_by_array_split(array: np.ndarray, layout: Layout, rank: int) -> np.ndarray:
    """A rank's part of a whole array, computed without regions: chunk after chunk, as PyTorch splits.

    It shares no arithmetic with `Layout.region`, which it checks.
    """
    coordinate = dict(zip(range(len(layout.mesh.shape)), np.unravel_index(layout.mesh.ranks.index(rank), layout.mesh.shape), strict=True))
    for dimension, axes in enumerate(layout.split):
        for axis in axes:
            count = array.shape[dimension]
            part = -(-count // layout.mesh.shape[axis]) if count else 0
            edges = [min(k * part, count) for k in range(1, layout.mesh.shape[axis])]
            array = np.split(array, edges, axis=dimension)[int(coordinate[axis])]
    return array


def tensor_on_rank(key: TensorKey, array: np.ndarray, layout: Layout, rank: int, *, blank: bool = False) -> ShardedTensor | None:
    """A rank's part of a whole array as a sharded tensor with memory of its own; None when the rank isn't in the layout's mesh.

    Args:
        key: what the tensor is.
        array: the whole.
        layout: how it lies.
        rank: the global rank.
        blank: memory filled with bytes 0xA5 instead of the values, to be filled by a load.
    """
    if rank not in layout.mesh:
        return None
    region = layout.rank_region(rank, array.shape)
    part = np.ascontiguousarray(part_by_array_split(array, layout, rank))
    if blank:
        part = np.full(part.nbytes, 0xA5, np.uint8).view(part.dtype).reshape(part.shape) if part.size else np.empty_like(part)
    shards = (Shard(region, HostMemory(part.reshape(region.shape))),)
    return ShardedTensor(key, by_numpy(array.dtype), array.shape, layout, shards)


def state_on_rank(arrays: Mapping[TensorKey, np.ndarray], layouts: Mapping[TensorKey, Layout], rank: int, *, blank: bool = False) -> State:
    """A rank's state of whole arrays under a strategy: those tensors whose mesh has the rank."""
    tensors = {}
    for key, array in arrays.items():
        tensor = tensor_on_rank(key, array, layouts[key], rank, blank=blank)
        if tensor is not None:
            tensors[key] = tensor
    return State(tensors=tensors)


def differences(arrays: Mapping[TensorKey, np.ndarray], state: State) -> list[str]:
    """The tensors of a state whose bytes aren't those of the whole arrays' regions."""
    wrong = []
    for key, tensor in state.tensors.items():
        for shard in tensor.shards:
            want, have = slice_of(arrays[key], shard.region), shard.memory.read()
            if want.shape != have.shape or want.dtype != have.dtype or want.tobytes() != have.tobytes():
                wrong.append(f"{key.slot or ''}.{key.parameter} at {shard.region}")
    return wrong


def every_placement(dimensions: int, axes: Sequence[str]) -> list[tuple[tuple[str, ...], ...]]:
    """Every way to split `dimensions` dimensions by (ordered) subsets of mesh axes, each axis used at most once."""
    found = []
    for places in itertools.product(range(-1, dimensions), repeat=len(axes)):
        groups: list[list[str]] = [[] for _ in range(dimensions)]
        for axis, place in zip(axes, places, strict=True):
            if place >= 0:
                groups[place].append(axis)
        found += [tuple(combination) for combination in itertools.product(*(list(itertools.permutations(group)) for group in groups))]
    return found
