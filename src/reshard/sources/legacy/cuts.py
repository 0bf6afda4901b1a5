"""How MindSpore cut a parameter, in its own words, as a layout."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from reshard.errors import LayoutError
from reshard.geometry import Layout, Mesh
from reshard.geometry.tensor_map import layout_from_tensor_map

MOST_RANKS = 1 << 20
"""Far more than any job has, and few enough to list."""

ALL_REPLICAS = -1
"""Of `shard`: the optimizer cuts a slice over all ranks that would hold it."""


@dataclass(frozen=True)
class Cut:
    """How a parameter was cut over the ranks of a pipeline stage.

    Attributes:
        device_matrix: the sizes of the mesh's axes, outermost first.
        tensor_map: for each dimension the axes that split it, counted from the right, the outermost first; -1 for none. A strategy file
            with one list of axes doesn't say whether they split one dimension, or one each: `is_flat`.
        shard: in how many parts the optimizer cuts each slice along dimension 0; 0 for none, `ALL_REPLICAS`.
        step: how far apart the ranks of neighbouring parts are; 0 where that isn't said.
        axes: the names of the axes; empty for those of the contract, `a`, `b` and so on.
        is_flat: whether `tensor_map` is one list, which a tensor of one dimension may have for it.
    """

    device_matrix: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    shard: int = 0
    step: int = 0
    axes: tuple[str, ...] = ()
    is_flat: bool = False

    @property
    def size(self) -> int:
        """The ranks of the stage."""
        return prod(self.device_matrix)

    def layout(self, ranks: Sequence[int], dimensions: int) -> Layout:
        """The layout over these ranks of a tensor of so many dimensions, with what the optimizer cut as a split of its own.

        The ranks that would hold the same slice are taken in their order, in blocks of `shard`; within a block each has the next part of
        the slice. Source: how `mindspore.parallel` merges such files, and the runtime's groups for the parallel optimizer.

        Raises:
            LayoutError: the numbers contradict each other, or the tensor.
        """
        if min(self.device_matrix, default=0) < 1 or self.size > MOST_RANKS:
            raise LayoutError("a mesh that no job has", field="device_matrix", found=reprlib.repr(self.device_matrix))
        tensor_map = self.tensor_map
        if self.is_flat and dimensions == 1 and len(tensor_map) > 1:
            tensor_map = (tuple(axis for entry in tensor_map for axis in entry),)
        if len(tensor_map) != dimensions:
            raise LayoutError(
                "a strategy for another number of dimensions",
                field="tensor_map",
                found=_plain(tensor_map),
                expected=f"{dimensions} entries",
            )
        names = self.axes or tuple(chr(ord("a") + index) for index in range(len(self.device_matrix)))
        layout = layout_from_tensor_map(self.device_matrix, tensor_map, names, ranks)
        return layout if self.shard in (0, 1) else self._sharded(layout)

    def _sharded(self, layout: Layout) -> Layout:
        """The layout with the optimizer's cut."""
        if self.shard < ALL_REPLICAS:
            raise LayoutError("a number of parts that can't be", field="opt_weight_shard_size", found=self.shard, expected="-1 or more")
        if not layout.split:
            raise LayoutError("a scalar that the optimizer has cut", field="opt_weight_shard_size", found=self.shard)
        shape, names = list(layout.mesh.shape), list(layout.mesh.axes)
        split = [list(axes) for axes in layout.split]
        used = {axis for axes in split for axis in axes}
        free = [axis for axis, size in enumerate(shape) if axis not in used and size > 1]
        replicas = prod(shape[axis] for axis in free)
        left = replicas if self.shard == ALL_REPLICAS else self.shard
        if self.step and free and self.step != prod(shape[free[-1] + 1 :]):
            raise LayoutError(
                "the optimizer's parts are not on neighbouring ranks of those that hold a slice",
                field="opt_weight_shard_step",
                found=self.step,
                expected=prod(shape[free[-1] + 1 :]),
            )
        chosen: list[int] = []
        for axis in reversed(free):
            if left == 1:
                break
            if left % shape[axis] == 0:
                chosen.insert(0, axis)
                left //= shape[axis]
            elif shape[axis] % left == 0:
                # The inner part of the axis becomes one of its own, and those behind it move on.
                shape[axis : axis + 1] = [shape[axis] // left, left]
                names[axis : axis + 1] = [names[axis], _new_name(names)]
                split = [[each + (each > axis) for each in axes] for axes in split]
                chosen = [axis + 1, *(each + 1 for each in chosen)]
                left = 1
            else:
                break
        if left != 1:
            raise LayoutError(
                "the optimizer can't cut a slice in so many parts",
                field="opt_weight_shard_size",
                found=self.shard,
                expected=f"-1, or parts of {replicas}, the ranks that hold a slice of device_matrix {list(self.device_matrix)}",
            )
        split[0] += chosen
        return Layout(Mesh(tuple(shape), tuple(names), layout.mesh.ranks), tuple(tuple(axes) for axes in split))


def _new_name(names: Sequence[str]) -> str:
    """A name that no axis has."""
    return next(name for name in (chr(ord("a") + index) for index in range(len(names) + 1)) if name not in names)


def _plain(tensor_map: Sequence[Sequence[int]]) -> list[int | list[int]]:
    """A tensor map as it is written."""
    return [entry[0] if len(entry) == 1 else list(entry) for entry in tensor_map]
