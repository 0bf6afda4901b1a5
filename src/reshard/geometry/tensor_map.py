"""The contract's arithmetic of layouts: `device_matrix`, `tensor_map`, `replica_id`.

Source: `metadata.json` of Checkpoint 2.0. An axis of the mesh is counted from the right (0 is the innermost), -1 says "not split", and a
list says "split by several axes, the left one outermost".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reshard.errors import LayoutError
from reshard.geometry.layout import Layout, Mesh
from reshard.geometry.region import Region

TensorMap = Sequence["int | Sequence[int]"]


def layout_from_tensor_map(
    device_matrix: Sequence[int], tensor_map: TensorMap, alias_name: Sequence[str], rank_list: Sequence[int]
) -> Layout:
    """The layout that the contract's four fields describe.

    Raises:
        LayoutError: they contradict each other.
    """
    mesh = Mesh(tuple(device_matrix), tuple(alias_name), tuple(rank_list))
    last = len(mesh.shape) - 1
    split = []
    for entry in tensor_map:
        values = [entry] if isinstance(entry, int) else list(entry)
        for value in values:
            if not -1 <= value <= last:
                raise LayoutError(
                    "tensor_map names an axis that device_matrix doesn't have",
                    field="tensor_map",
                    found=list(tensor_map),
                    expected=f"-1 to {last}",
                )
        split.append(tuple(last - value for value in values if value != -1))
    return Layout(mesh, tuple(split))


def tensor_map_of(layout: Layout) -> list[int | list[int]]:
    """The contract's `tensor_map` of a layout."""
    last = len(layout.mesh.shape) - 1
    result: list[int | list[int]] = []
    for axes in layout.split:
        if not axes:
            result.append(-1)
        elif len(axes) == 1:
            result.append(last - axes[0])
        else:
            result.append([last - axis for axis in axes])
    return result


def replica_ids(layout: Layout) -> list[int]:
    """The contract's `replica_id`: for each place in `rank_list` its ordinal among the places that hold the same slice."""
    numbers = layout.slice_ids()
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    # In the order of the slices, each begins where the number changes; a place's ordinal is its distance from there.
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    result = np.empty(len(numbers), np.int64)
    result[order] = np.arange(len(numbers)) - np.repeat(begins, np.diff(begins, append=len(numbers)))
    return result.tolist()


def slices_of(layout: Layout, global_shape: tuple[int, ...]) -> dict[int, Region]:
    """The region of every slice of a tensor by the contract's slice id, in the order in which the places of `rank_list` hold them first.

    Raises:
        LayoutError: the shape has another number of dimensions than the layout.
    """
    boxes = layout.regions(global_shape)
    numbers = layout.slice_ids()
    first = np.sort(np.unique(numbers, return_index=True)[1])
    return dict(zip(numbers[first].tolist(), boxes.take(first).regions(), strict=True))
