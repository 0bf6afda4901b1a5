"""How MindSpore's tensors lie on the ranks: what the user declares, and what MindSpore knows by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mindspore
import numpy as np
from mindspore import nn

from reshard.errors import CaptureError, LayoutError, UsageError
from reshard.frameworks.mindspore.memory import checked_dtype, memory_of
from reshard.geometry import Layout, Region
from reshard.geometry.tensor_map import layout_from_tensor_map
from reshard.state import Shard, ShardedTensor, TensorKey, whole_tensor

# Where `lay_out` keeps its declarations on a cell.
_DECLARED = "_reshard_layouts"


def lay_out(cell: nn.Cell, layouts: Mapping[str, Any]) -> None:
    """Declare how tensors of a cell, and the optimizer's slots of them, lie on the ranks.

    MindSpore's own record says nothing of parameters that a program cut by itself. Declaring again adds to what was declared.

    Args:
        cell: a pipeline stage or a whole network.
        layouts: for each pattern of names (globs: `*.linear_fc1.weight`; the first that fits counts) a layout: a `mindspore.Layout`
            that was called with a tensor map, as `Layout((2, 2), ("dp", "tp"))("tp", "None")`; a `reshard.geometry.Layout`; or an entry of
            `mindspore.parallel.strategy.get_strategy_metadata`, which starts with a layout and ends with the whole tensor's shape.
            The parameter is this rank's part. A slot has its parameter's layout, unless a pattern fits the slot's own name
            (`adam_m.*`).

    Raises:
        UsageError: not a cell, or something else than layouts.
    """
    if not isinstance(cell, nn.Cell):
        raise UsageError("only cells have tensors to lay out", field="cell", found=type(cell).__name__)
    for pattern, layout in layouts.items():
        _converted(layout, pattern)
    object.__setattr__(cell, _DECLARED, {**dict(declared_layouts(cell)), **layouts})


def declared_layouts(cell: nn.Cell) -> Iterator[tuple[str, Any]]:
    """What `lay_out` declared for a cell: patterns and layouts, in order."""
    yield from cell.__dict__.get(_DECLARED, {}).items()


class Layouts:
    """How the tensors of a model lie.

    Args:
        table: patterns and layouts, as in `lay_out`.
    """

    def __init__(self, table: Sequence[tuple[str, Any]]) -> None:
        self._table = [(pattern, *_converted(layout, pattern)) for pattern, layout in table]

    def sharded(
        self, key: TensorKey, tensor: mindspore.Tensor, name: str, like: tuple[str, mindspore.Tensor] | None = None
    ) -> ShardedTensor:
        """A tensor as this rank holds it.

        Args:
            key: what it is.
            tensor: the tensor: this rank's part where there is a layout.
            name: what to look for in the table, and what to call it in errors.
            like: the name and the tensor of a slot's parameter.

        Raises:
            CaptureError: a layout that this rank has no part in, or that doesn't fit the tensor's shape.
        """
        dtype = checked_dtype(tensor, name)
        local = tuple(tensor.shape)
        layout, whole = self._layout(tensor, name)
        if layout is None and like is not None and tuple(like[1].shape) == local:
            layout, whole = self._layout(like[1], like[0])
        if layout is None:
            return ShardedTensor(key, dtype, local, None, (Shard(Region.whole(local), memory_of(tensor)),))
        rank = current_rank()
        try:
            if whole is None:
                whole = tuple(size * parts for size, parts in zip(local, layout.fragments, strict=True))
            region = layout.rank_region(rank, whole)
        except (LayoutError, ValueError) as error:
            raise CaptureError("a tensor doesn't lie on the ranks as its layout says", tensor=name, rank=rank, found=str(error)) from error
        if region.shape != local:
            raise CaptureError(
                "a tensor doesn't have the shape that its layout gives this rank",
                tensor=name,
                rank=rank,
                found=f"shape {list(local)}",
                expected=f"{list(region.shape)} of {list(whole)}",
                fix="give the network a layout that fits: reshard.mindspore.lay_out(cell, {pattern: layout})",
            )
        return ShardedTensor(key, dtype, whole, layout, (Shard(region, memory_of(tensor)),))

    def of_the_run(self, key: TensorKey, array: np.ndarray, beside: Iterable[tuple[str, mindspore.Tensor]]) -> ShardedTensor:
        """A value that all ranks of this rank's mesh hold whole, such as the step count.

        Args:
            key: what it is.
            array: its memory.
            beside: names and tensors; the mesh is that of the first of them that lies on one.
        """
        known = (self._layout(tensor, name)[0] for name, tensor in beside)
        layout = next((one for one in known if one is not None), None)
        return whole_tensor(key, array, None if layout is None else Layout(layout.mesh, ((),) * array.ndim))

    def _layout(self, tensor: mindspore.Tensor, name: str) -> tuple[Layout | None, tuple[int, ...] | None]:
        for pattern, layout, whole in self._table:
            if fnmatchcase(name, pattern):
                return layout, whole
        return _known(tensor, name)


def current_rank() -> int:
    """This process's global rank; 0 where MindSpore's communication isn't initialised."""
    from mindspore import communication

    return communication.get_rank() if communication.GlobalComm.INITED else 0


def _known(tensor: mindspore.Tensor, name: str) -> tuple[Layout | None, tuple[int, ...] | None]:
    """What MindSpore itself knows: the layout of a distributed tensor, and that of a parameter which it has cut."""
    info = getattr(tensor, "_dtensor_info", None)
    if info is not None:
        return _converted(info.layout, name)
    record = getattr(tensor, "param_info", None)
    # Before MindSpore has compiled a network a parameter with a plan is still whole.
    if record is None or not record.device_matrix or not getattr(tensor, "sliced", False):
        return None, None
    ranks = range(math.prod(record.device_matrix))
    return layout_from_tensor_map(record.device_matrix, record.tensor_map, record.alias_name, ranks), None


def _converted(value: Any, name: str) -> tuple[Layout, tuple[int, ...] | None]:
    """A layout as geometry has it, and the whole tensor's shape where it is given."""
    whole = None
    if isinstance(value, list | tuple) and len(value) == 3:
        value, _, shape = value
        whole = tuple(int(size) for size in shape)
    if isinstance(value, Layout):
        return value, whole
    if isinstance(value, mindspore.Layout):
        entry: dict[str, Any] = value.to_dict()
        if entry["interleaved_parallel"]:
            raise UsageError(
                "a layout with micro-slices on one card is one of activations, not of parameters",
                field=name,
                found=f"alias_name {list(entry['alias_name'])}",
                fix="leave interleaved_parallel out of the layout",
            )
        return layout_from_tensor_map(entry["device_matrix"], entry["tensor_map"], entry["alias_name"], entry["rank_list"]), whole
    raise UsageError(
        "not a layout", field=name, found=type(value).__name__, expected='such as mindspore.Layout((2, 2), ("dp", "tp"))("tp", "None")'
    )
