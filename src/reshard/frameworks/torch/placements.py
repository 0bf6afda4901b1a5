"""How DTensor placements split a dimension: as an order of mesh axes where there is one, as runs of elements where there is none."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from reshard.errors import CaptureError

Run = tuple[int, int]
"""A begin and a length, in elements."""

# A placement in plain data: the tensor dimension that a mesh axis splits and the split factor (1 for `Shard`), or None where it replicates.
Split = "tuple[int, int] | None"


def dtensor_type() -> type | tuple[()]:
    """What `isinstance` takes to tell a DTensor. Doesn't import it: where nobody has, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return () if module is None else module.DTensor


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return isinstance(tensor, dtensor_type())


def dtensors_of(tensors: Iterable[torch.Tensor]) -> Iterator[Any]:
    """The DTensors among some tensors."""
    kind = dtensor_type()
    return (tensor for tensor in tensors if isinstance(tensor, kind))


def splits_of(placements: Sequence[Any], dimensions: int, name: str) -> tuple[tuple[int, int] | None, ...]:
    """For each mesh axis what it splits: the tensor dimension and the split factor, or None.

    Args:
        placements: of a DTensor, one per mesh axis.
        dimensions: of the tensor.
        name: of the tensor.

    Raises:
        CaptureError: a `Partial` placement, one that splits a dimension that the tensor hasn't, or one of an unknown kind.
    """
    types = sys.modules["torch.distributed.tensor.placement_types"]
    # Private, and `Shard`'s subclass in some releases: it must be asked for first. A release without it has no such placements.
    strided: type | None = getattr(types, "_StridedShard", None)
    result: list[tuple[int, int] | None] = []
    for placement in placements:
        if strided is not None and isinstance(placement, strided):
            result.append((placement.dim, int(placement.split_factor)))
        elif isinstance(placement, types.Shard):
            result.append((placement.dim, 1))
        elif isinstance(placement, types.Replicate):
            result.append(None)
        elif isinstance(placement, types.Partial):
            raise CaptureError(
                "a tensor with a Partial placement has no values yet: they are the sum of what the ranks hold",
                tensor=name,
                found=tuple(placements),
                fix="redistribute it to Shard or Replicate before saving or loading",
            )
        else:
            raise CaptureError("a placement of an unknown kind", tensor=name, found=tuple(placements), expected="Shard or Replicate")
        entry = result[-1]
        if entry is not None:
            dimension = entry[0] + dimensions if entry[0] < 0 else entry[0]
            if not 0 <= dimension < dimensions:
                raise CaptureError(
                    "a placement splits a dimension that the tensor doesn't have",
                    tensor=name,
                    found=tuple(placements),
                    expected=f"dimensions of a tensor with {dimensions}",
                )
            result[-1] = (dimension, entry[1])
    return tuple(result)


def split_order(splits: Sequence[tuple[int, int] | None], mesh_shape: Sequence[int], dimension: int) -> tuple[int, ...] | None:
    """The mesh axes that split a dimension, outermost first; None when no order says it.

    `_StridedShard` on an axis with split factor k says that later axes with a product of k split the dimension before it does: FSDP2
    shards what tensor parallelism has sharded. So, from the last axis to the first, each takes its place behind axes with that product.
    """
    order: list[int] = []
    for axis in reversed(range(len(splits))):
        split = splits[axis]
        if split is None or split[0] != dimension:
            continue
        product, place = 1, 0
        while product != split[1] and place < len(order):
            product *= mesh_shape[order[place]]
            place += 1
        if product != split[1]:
            return None
        order.insert(place, axis)
    return tuple(order)


def explicit_order(spec: Any, dimensions: int) -> tuple[tuple[int, ...], ...] | None:
    """The order of mesh axes of each dimension, where a DTensor's specification (of newer releases) gives one apart from its placements."""
    entries = getattr(spec, "shard_order", None)
    if not entries or getattr(spec, "use_strided_shard_as_shard_order", False):
        return None
    order: list[tuple[int, ...]] = [()] * dimensions
    for entry in entries:
        order[entry.tensor_dim] = tuple(entry.mesh_dims)
    return tuple(order)


def runs_of(
    splits: Sequence[tuple[int, int] | None], mesh_shape: Sequence[int], coordinate: Sequence[int], dimension: int, size: int
) -> list[Run]:
    """What a mesh coordinate holds of a dimension, in the order in which its local tensor holds it.

    The placements are applied from the first axis to the last, each to what the ones before have left: `Shard` takes one part;
    `_StridedShard` cuts into as many parts as its split factor says, and takes one part of each.
    """
    runs: list[Run] = [(0, size)]
    for axis, split in enumerate(splits):
        if split is None or split[0] != dimension:
            continue
        length = sum(count for _, count in runs)
        outer = -(-length // split[1])
        taken: list[Run] = []
        for begin in range(0, length, max(outer, 1)):
            inside = min(outer, length - begin)
            part = -(-inside // mesh_shape[axis])
            first = min(coordinate[axis] * part, inside)
            taken += _cut(runs, begin + first, min(part, inside - first))
        runs = taken
    return _joined(runs)


def fsdp2_runs_of(
    splits: Sequence[tuple[int, int] | None], mesh_shape: Sequence[int], coordinate: Sequence[int], dimension: int, size: int
) -> list[Run]:
    """The same for a parameter that FSDP2 manages.

    FSDP2 puts its axis before the others, with the number of parts that they make of the dimension as its split factor, and cuts what they
    have left: also where one of them interleaves (the rows of a fused projection), so that the factor says nothing of runs.
    """
    axes = [axis for axis, split in enumerate(splits) if split is not None and split[0] == dimension]
    if not axes or (splits[axes[0]] or (0, 0))[1] != math.prod(mesh_shape[axis] for axis in axes[1:]):
        return runs_of(splits, mesh_shape, coordinate, dimension, size)
    order = [*axes[1:], axes[0]]
    in_turn = [*(splits[axis] for axis in axes[1:]), (dimension, 1)]
    return runs_of(in_turn, [mesh_shape[axis] for axis in order], [coordinate[axis] for axis in order], dimension, size)


def _cut(runs: Sequence[Run], begin: int, length: int) -> list[Run]:
    """A range of what the runs hold one after the other."""
    result = []
    for start, count in runs:
        if length <= 0:
            break
        if begin >= count:
            begin -= count
            continue
        taken = min(count - begin, length)
        result.append((start + begin, taken))
        begin, length = 0, length - taken
    return result


def _joined(runs: Sequence[Run]) -> list[Run]:
    result: list[Run] = []
    for start, count in runs:
        if count and result and result[-1][0] + result[-1][1] == start:
            result[-1] = (result[-1][0], result[-1][1] + count)
        elif count:
            result.append((start, count))
    return result
