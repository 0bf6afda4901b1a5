"""Cells as named tensors: parameters and persistent buffers under MindSpore's own names, without the slots of optimizers inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mindspore import Tensor, nn
from mindspore.experimental import optim

from reshard.errors import CaptureError, UsageError
from reshard.frameworks.mindspore.layouts import Layouts, declared_layouts

OPTIMIZERS = (nn.Optimizer, optim.Optimizer)
"""MindSpore has two trees of optimizers; those of `mint` are of the second."""


@dataclass
class NamedTensors:
    """What a model holds on this rank, in the order of its cells.

    Attributes:
        tensors: parameters and buffers by global name.
        names: the global name of each parameter by identity.
        layouts: what is known of how they lie.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    layouts: Layouts = field(default_factory=lambda: Layouts(()))


def name_tensors(model: Any) -> NamedTensors:
    """The tensors of a model under their global names.

    A parameter's name is the one that MindSpore gave it (`Parameter.name`), as in the files that MindSpore itself writes. A buffer's is
    its path. Optimizers that a training cell has inside are left out.

    Args:
        model: None, a cell, a list of cells (the pipeline stages of this rank), or a dictionary of cells (each key and a dot are put before
            the names).

    Raises:
        CaptureError: two tensors under one name.
        UsageError: something else than cells.
    """
    result = NamedTensors()
    tables: list[tuple[str, Any]] = []
    for prefix, cell in _roots(model):
        for _, inner in cell.cells_and_names():
            tables += [(prefix + pattern, layout) for pattern, layout in declared_layouts(inner)]
        for name, tensor in _own_tensors(cell):
            _add(result, prefix + name, tensor)
    result.layouts = Layouts(tables)
    return result


def _roots(model: Any) -> list[tuple[str, nn.Cell]]:
    if model is None:
        return []
    if isinstance(model, nn.Cell):
        return [("", model)]
    roots = [(f"{key}.", cell) for key, cell in model.items()] if isinstance(model, Mapping) else [("", cell) for cell in model]
    for _, cell in roots:
        if not isinstance(cell, nn.Cell):
            raise UsageError("not a cell", field="model", found=type(cell).__name__, expected="cells, a list or dictionary of them")
    return roots


def _own_tensors(root: nn.Cell) -> Iterator[tuple[str, Tensor]]:
    slots: set[int] = set()
    for _, cell in root.cells_and_names():
        if isinstance(cell, OPTIMIZERS):
            own = {id(parameter) for parameter in cell.parameters}
            slots.update(id(parameter) for parameter in cell.get_parameters() if id(parameter) not in own)
    for parameter in root.get_parameters():
        if id(parameter) not in slots:
            yield parameter.name, parameter
    for path, cell in _walk(root, ""):
        transient = cell._non_persistent_buffers_set  # MindSpore has no public way to ask
        for name, buffer in cell._buffers.items():
            if name not in transient and buffer is not None:
                yield path + name, buffer


def _walk(cell: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All cells below one with their paths, as MindSpore makes parameters' names of them: those around a network have no part in it."""
    yield path, cell
    for name, child in cell.name_cells().items():
        yield from _walk(child, f"{path}{name}." if cell._auto_prefix else path)


def _add(result: NamedTensors, name: str, tensor: Tensor) -> None:
    present = result.tensors.get(name)
    if present is tensor:
        return
    if present is not None:
        raise CaptureError(
            "two cells have a tensor of the same name",
            tensor=name,
            fix="give the cells as a dictionary, so that its keys come before the names, or name the parameters apart",
        )
    if id(tensor) in result.names:
        return  # it belongs to a cell before this one, too
    result.tensors[name] = tensor
    result.names[id(tensor)] = name
